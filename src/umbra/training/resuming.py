"""Exact resuming: a run that was killed and resumed ends with the steps, weights, losses and history of an uninterrupted one.

transformers' Trainer restores weights, optimizer, schedule, data order and random state. `ResumableTrainer` adds the rest: the
losses summed since the last log, the elapsed seconds, and epochs or runs that had ended just before the checkpoint was resumed.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.training.checkpoints import PROGRESS, SavedProgress, Sums, last_checkpoint, read_progress, rotate

Trial = dict[str, object] | None  # of a hyperparameter search


@dataclass
class Progress:
    """State of one training run that transformers' own checkpoint files leave out.

    Args:
        checkpoint: path of the checkpoint that the run resumes from.
        resumed: the progress stored there.
        earlier_seconds: training time before that checkpoint.
        started: time at which this process began to train.
        epoch_ended: whether the current epoch is over.
        grad_norm: gradient norm of the last step.
        learning_rate: learning rate of the last step.
    """

    checkpoint: str | None = None
    resumed: SavedProgress | None = None
    earlier_seconds: float = 0.0
    started: float = 0.0
    epoch_ended: bool = False
    grad_norm: torch.Tensor | float | None = None
    learning_rate: float | None = None

    @classmethod
    def from_checkpoint(cls, path: str | None) -> "Progress":
        """Return the progress at the start of a run that resumes from ``path``, or begins if it is None."""
        return cls(path, None if path is None else read_progress(Path(path)))

    def saved(self, trainer: Trainer, ranks: list[Sums]) -> SavedProgress:
        """Return what a checkpoint stores.

        Args:
            trainer: the trainer of the run.
            ranks: the sums of every rank.
        """
        return {
            "logged_step": trainer._globalstep_last_logged, "max_steps": trainer.state.max_steps,
            "seconds": self.earlier_seconds + time.time() - self.started, "epoch_ended": self.epoch_ended,
            "grad_norm": None if self.grad_norm is None else float(self.grad_norm), "learning_rate": self.learning_rate,
            "ranks": ranks,
        }  # fmt: skip

    def skipped(self, trainer: Trainer, max_steps: int, per_epoch: int) -> tuple[int, int] | None:
        """Return the epochs and batches to skip if the checkpoint was written before its epoch ended; None otherwise.

        Args:
            trainer: the trainer of the run.
            max_steps: number of optimizer steps of the run.
            per_epoch: number of optimizer steps in an epoch.
        """
        step, is_over = trainer.state.global_step, trainer.state.global_step >= max_steps
        ended = self.resumed is None or self.resumed["epoch_ended"] or trainer.args.ignore_data_skip
        if not ended and (is_over or step % per_epoch == 0):
            return (step - 1) // per_epoch, per_epoch * trainer.args.gradient_accumulation_steps
        return None


class ResumableTrainer(Trainer):
    """transformers' Trainer, for any model, with exact resuming."""

    _progress: Progress

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train the model, see transformers' Trainer; True resumes from the newest complete checkpoint.

        Raises:
            CheckpointError: ``resume_from_checkpoint`` is True, and no checkpoint exists.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir or ""))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir} has no checkpoint to resume from: train without it.")
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        self._restore_sums({"total_loss": 0.0, "loss": 0.0})
        self._progress = Progress.from_checkpoint(resume_from_checkpoint)
        callback = _ProgressCallback(self)
        self.add_callback(callback)
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.remove_callback(callback)

    def _init_training_state(
        self, max_steps: int, per_epoch: int, epochs: int, resumed: str | None, trial: Trial
    ) -> tuple[int, int]:
        """Return the epochs and batches to skip; all batches of the last epoch if only its end is left to do."""
        skipped = super()._init_training_state(max_steps, per_epoch, epochs, resumed, trial)
        if resumed is None or self.state.global_step == 0:
            return skipped
        is_over = self.state.global_step >= max_steps
        return self._progress.skipped(self, max_steps, per_epoch) or ((epochs, 0) if is_over else skipped)

    def _restore_progress(self) -> None:
        """Continue the sums and the clock of the checkpoint."""
        progress, resumed = self._progress, self._progress.resumed
        if resumed is None:
            return
        ranks, index = resumed["ranks"], self.args.process_index
        sums = ranks[index] if len(ranks) == self.args.world_size else _mean(ranks)
        self._total_loss_scalar = sums["total_loss"]
        self._tr_loss += sums["loss"]
        self._globalstep_last_logged = resumed["logged_step"]
        self._initial_global_step = 0
        progress.earlier_seconds = resumed["seconds"]
        progress.grad_norm, progress.learning_rate = resumed["grad_norm"], resumed["learning_rate"]
        self._restore_sums(sums)

    def _sums(self) -> Sums:
        """Return what this rank has summed up since its last log."""
        loss: torch.Tensor = self._tr_loss
        return {"total_loss": self._total_loss_scalar, "loss": loss.item()}

    def _restore_sums(self, sums: Sums) -> None:
        """Restore the sums that a subclass adds to `_sums`; without entries, start them at zero."""

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Trial,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Remember the values of the last step, which are logged again at the end of an epoch."""
        progress = self._progress
        if learning_rate is None:
            grad_norm, learning_rate = progress.grad_norm, progress.learning_rate
        progress.grad_norm, progress.learning_rate = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def _finalize_training(self, trial: Trial, num_train_samples: float, start_time: float) -> TrainOutput:
        """Include the seconds before the checkpoint in the runtime, from which rates are computed."""
        with _no_rotation(self.args):
            started = start_time - self._progress.earlier_seconds
            output = super()._finalize_training(trial, num_train_samples, started)
        self._rotate(trial)  # a kill may have prevented it after the last checkpoint
        return output

    def _rotate(self, trial: Trial) -> None:
        if self.args.should_save:
            run = Path(self._get_output_dir(trial=trial))
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Trial) -> None:
        """Write a checkpoint, which is complete once its last file, the trainer state, is there."""
        path = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (path / TRAINER_STATE_NAME).unlink(missing_ok=True)
            with _no_rotation(self.args):
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_about_a_file(error):
                raise
            raise CheckpointError(
                f"{path} cannot be written: {str(error).splitlines()[0]:.200}. Make room and run the same command again: "
                "training resumes from the previous checkpoint."
            ) from error
        self._rotate(trial)

    def _save_scaler(self, output_dir: str) -> None:
        super()._save_scaler(output_dir)
        ranks = gather_object([self._sums()])
        if self.args.should_save:
            progress = self._progress.saved(self, ranks)
            folder.write_text(Path(output_dir) / PROGRESS, json.dumps(progress) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; the schedule of a run that was made longer is that of the new length, from the next step on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler, resumed = self.lr_scheduler, self._progress.resumed
        is_longer = resumed is not None and resumed["max_steps"] != self.state.max_steps
        if checkpoint is not None and is_longer and isinstance(scheduler, LambdaLR):
            optimizer = cast(Optimizer, self.optimizer)
            factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [rate * factor(scheduler.last_epoch) for rate, factor in factors]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})


class _ProgressCallback(TrainerCallback):
    """Keeps a trainer's `Progress`."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.is_first_epoch, self.first_step = True, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.trainer._progress.started = time.time()
        self.trainer._restore_progress()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.trainer._progress.epoch_ended, self.first_step = False, self.trainer.state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        progress = self.trainer._progress
        progress.epoch_ended = True
        is_empty = self.trainer.state.global_step == self.first_step
        if progress.checkpoint is not None and self.is_first_epoch and is_empty:
            self.trainer._load_rng_state(progress.checkpoint)  # all steps of this epoch precede the checkpoint
        self.is_first_epoch = False


@contextmanager
def _no_rotation(arguments: TrainingArguments) -> Iterator[None]:
    """Keep transformers from removing old checkpoints: it removes any folder named checkpoint-…; `rotate` does not."""
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        yield
    finally:
        arguments.save_total_limit = limit


def _mean(ranks: list[Sums]) -> Sums:
    """Return the sums of one rank for a run that was saved with another number of ranks."""
    mean = {k: None if v is None else sum(rank[k] for rank in ranks) / len(ranks) for k, v in ranks[0].items()}
    return cast(Sums, mean)


def _is_about_a_file(error: RuntimeError) -> bool:
    """Return whether torch.save failed to write: it raises a plain RuntimeError then."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream", "No space left"))
