"""A training that was killed and resumed ends as an uninterrupted one: same steps, weights, losses and history.

transformers' Trainer restores weights, optimizer, schedule, data order and random state. `Resumable` adds the rest: the
losses summed so far, the seconds spent, an epoch's end that the checkpoint did not see, and a run that had nothing left to
train. `last_checkpoint` chooses the newest checkpoint from which all of this can be restored.
"""

import json
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from umbra.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_weights
from umbra.adapters.integrity import check_digest
from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.options import speaks

PROGRESS = "training_progress.json"  # what transformers' own files do not hold
NAME = re.compile(r"checkpoint-(\d+)")
DEEPSPEED = "latest"  # a file that DeepSpeed writes beside its own folders


class Resumable:
    """Put before a trainer class, makes a resumed training equal to an uninterrupted one."""

    _resumed: dict[str, Any] | None = None  # the progress that the checkpoint holds
    _earlier_seconds = 0.0  # of training before the checkpoint
    _epoch_ended = False
    _last_step: tuple[Any, float | None] = (None, None)  # gradient norm and learning rate

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As transformers' trainers do; True resumes from the newest complete checkpoint.

        Raises:
            CheckpointError: True, and there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir} has no checkpoint to resume from: train without it.")
        return super().train(resume_from_checkpoint, *args, **options)  # type: ignore[misc]

    def _inner_training_loop(self: Any, *args: Any, **options: Any) -> Any:
        path = options.get("resume_from_checkpoint")
        self._resumed = None if path is None else read_progress(Path(path))
        self._earlier_seconds, self._epoch_ended, self._last_step = 0.0, False, (None, None)
        watch = _Watch(self, path)
        self.add_callback(watch)
        try:
            return super()._inner_training_loop(*args, **options)  # type: ignore[misc]
        finally:
            self.remove_callback(watch)

    def _init_training_state(self: Any, max_steps: int, per_epoch: int, epochs: int, resumed: Any, trial: Any) -> Any:
        """Epochs and batches to skip; where only an epoch's end is left of it, all of its batches."""
        skipped = super()._init_training_state(max_steps, per_epoch, epochs, resumed, trial)  # type: ignore[misc]
        step, is_over = self.state.global_step, self.state.global_step >= max_steps
        if resumed is None or step == 0:
            return skipped
        ended = self._resumed is None or self._resumed["epoch_ended"] or self.args.ignore_data_skip
        if not ended and (is_over or step % per_epoch == 0):
            return (step - 1) // per_epoch, per_epoch * self.args.gradient_accumulation_steps
        return (epochs, 0) if is_over else skipped

    def _restore_progress(self: Any) -> None:
        """Go on with the sums and the clock of the checkpoint."""
        if self._resumed is None:
            return
        ranks, index = self._resumed["ranks"], self.args.process_index
        values = ranks[index] if len(ranks) == self.args.world_size else _mean(ranks)
        self._total_loss_scalar = values["total_loss"]
        self._tr_loss += values["loss"]
        self._globalstep_last_logged = self._resumed["logged_step"]
        self._initial_global_step = 0
        self._earlier_seconds = self._resumed["seconds"]
        self._last_step = (self._resumed["grad_norm"], self._resumed["learning_rate"])
        self._restore_sums(values)

    def _progress_sums(self: Any) -> dict[str, float]:
        """What this rank has summed up since it was last logged."""
        return {"total_loss": self._total_loss_scalar, "loss": self._tr_loss.item()}

    def _restore_sums(self: Any, values: dict[str, Any]) -> None:
        """For what a subclass has added to `_progress_sums`."""

    def _maybe_log_save_evaluate(
        self: Any, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: float | None = None
    ) -> None:
        """Remembers the last step's figures, which the end of an epoch logs again."""
        if learning_rate is None:
            grad_norm, learning_rate = self._last_step
        self._last_step = (grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate)  # type: ignore[misc]

    def _finalize_training(self: Any, trial: Any, num_train_samples: float, start_time: float) -> Any:
        """With the seconds before the checkpoint in the runtime, from which rates are computed."""
        with _own_rotation(self.args):
            started = start_time - self._earlier_seconds
            output = super()._finalize_training(trial, num_train_samples, started)  # type: ignore[misc]
        self._rotate(trial)  # in case that a kill has kept the last checkpoint from doing it
        return output

    def _rotate(self: Any, trial: Any) -> None:
        if self.args.should_save:
            run = Path(self._get_output_dir(trial=trial))
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """A checkpoint counts from the moment that its trainer state is written, last."""
        run = Path(self._get_output_dir(trial=trial))
        place = run / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (place / TRAINER_STATE_NAME).unlink(missing_ok=True)
            with _own_rotation(self.args):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_about_a_file(error):
                raise
            raise CheckpointError(
                f"{place} cannot be written: {str(error).splitlines()[0]:.200}. Make room and run the same command again: "
                "training goes on from the checkpoint before."
            ) from error
        self._rotate(trial)

    def _save_scaler(self: Any, output_dir: str) -> None:
        super()._save_scaler(output_dir)  # type: ignore[misc]
        ranks = gather_object([self._progress_sums()])
        if self.args.should_save:
            norm, rate = self._last_step
            progress = {
                "logged_step": self._globalstep_last_logged, "max_steps": self.state.max_steps,
                "seconds": self._earlier_seconds + time.time() - self._started, "epoch_ended": self._epoch_ended,
                "grad_norm": None if norm is None else float(norm), "learning_rate": rate, "ranks": ranks,
            }  # fmt: skip
            folder.write_text(Path(output_dir) / PROGRESS, json.dumps(progress) + "\n")

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        """Where the run has become longer, its schedule is that of the new length, from the next step on."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        scheduler = self.lr_scheduler
        is_longer = self._resumed is not None and self._resumed["max_steps"] != self.state.max_steps
        if checkpoint is not None and is_longer and isinstance(scheduler, LambdaLR):
            factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [rate * factor(scheduler.last_epoch) for rate, factor in factors]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})


class ResumableTrainer(Resumable, Trainer):
    """transformers' Trainer, for any model, whose resumed training equals an uninterrupted one."""


class _Watch(TrainerCallback):
    """Tells a trainer's `Resumable` part where training begins and an epoch ends."""

    def __init__(self, trainer: Any, checkpoint: str | None):
        self.trainer, self.checkpoint, self.is_first = trainer, checkpoint, True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._started = time.time()
        self.trainer._restore_progress()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._epoch_ended, self.begun_at = False, self.trainer.state.global_step

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.trainer._epoch_ended = True
        if self.checkpoint is not None and self.is_first and self.trainer.state.global_step == self.begun_at:
            self.trainer._load_rng_state(self.checkpoint)  # of an epoch of which only this was left
        self.is_first = False


@contextmanager
def _own_rotation(arguments: Any) -> Iterator[None]:
    """Keep transformers from removing old checkpoints: it takes every folder called checkpoint-… for one."""
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        yield
    finally:
        arguments.save_total_limit = limit


def _mean(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of a run of another number of ranks."""
    return {k: None if v is None else sum(r[k] for r in ranks) / len(ranks) for k, v in ranks[0].items()}


def _is_about_a_file(error: RuntimeError) -> bool:
    """Whether torch.save failed to write, for which it has no type of its own."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream", "No space left"))


# -- which checkpoints there are ---------------------------------------------------------------------------------------


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(out: Path) -> list[Path]:
    """The folders called checkpoint-N, newest first."""
    places = [p for p in out.glob("checkpoint-*") if step_of(p) is not None and p.is_dir() and not p.is_symlink()]
    return sorted(places, key=lambda p: step_of(p) or 0, reverse=True)


def rotate(out: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, never the newest nor the best one."""
    keep = {Path(best).name} if best is not None else set()
    places = checkpoints(out)
    keep |= {p.name for p in places[:1]}
    spare = [p for p in places if p.name not in keep]
    if limit is not None and limit > 0:
        for path in spare[max(limit - len(keep), 0) :]:
            with suppress(OSError):
                folder.remove(path)


def read_progress(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's `PROGRESS`; None where an earlier version of Umbra, or another trainer, wrote it."""
    try:
        values = json.loads(folder.read_text(path / PROGRESS))
        ranks = values["ranks"]
        keys = ("logged_step", "max_steps", "seconds", "epoch_ended", "grad_norm", "learning_rate")
        return values if ranks and all("total_loss" in r for r in ranks) and all(k in values for k in keys) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint in a run's folder; None where there is none, or where a kill cut off the first one.

    Those that are passed over are reported, with the reason.

    Raises:
        CheckpointError: there are checkpoints, but all of them have been damaged.
    """
    passed: dict[str, str] = {}
    damaged = False
    for path in checkpoints(out):
        problem = _problem(path)
        if problem is None:
            _report(passed, f"training goes on from {path.name}")
            return str(path)
        passed[path.name] = problem
        damaged = damaged or not problem.startswith(TRAINER_STATE_NAME)
    if damaged:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in passed.items())
        raise CheckpointError(
            f"No checkpoint in {out} is complete ({reasons}): restore one, or start anew with overwrite (--overwrite)."
        )
    _report(passed, "training begins anew")
    return None


def _report(passed: dict[str, str], then: str) -> None:
    if passed and speaks():
        reasons = "; ".join(f"{name} ({problem})" for name, problem in passed.items())
        print(f"Incomplete checkpoints are passed over, {then}: {reasons}.", file=sys.stderr)


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can."""
    try:
        state = json.loads(folder.read_text(path / TRAINER_STATE_NAME))
        if state["global_step"] != step_of(path):
            return f"{TRAINER_STATE_NAME} is of step {state['global_step']}"
    except (OSError, ValueError, LookupError, TypeError):
        return f"{TRAINER_STATE_NAME} is missing or damaged"
    progress = read_progress(path)
    if progress is None:
        return f"{PROGRESS} is missing or damaged"
    ranks = len(progress["ranks"])
    archives = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    if not (path / DEEPSPEED).exists():
        archives += [OPTIMIZER_NAME, SCHEDULER_NAME]
    for name in [*archives, *([SCALER_NAME] if (path / SCALER_NAME).exists() else [])]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if not _is_whole(path / name):
            return f"{name} is damaged"
    return _weights_problem(path)


def _is_whole(file: Path) -> bool:
    """Whether every member of a torch archive has its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive may fail in any way
        return False


def _weights_problem(path: Path) -> str | None:
    """Of the model's own files: an adapter of Umbra, or that of another method."""
    files = sorted({f.name for f in path.glob("*.safetensors")})
    if not files:
        return f"{WEIGHTS_FILE} is missing"
    try:
        if WEIGHTS_FILE in files:
            values = json.loads(folder.read_text(path / CONFIG_FILE))
            if values.get("peft_type") == "UMBRA":
                check_digest(values, read_weights(path), path / CONFIG_FILE)
    except CheckpointError:
        return f"{WEIGHTS_FILE} is damaged, or not what {CONFIG_FILE} describes"
    except (OSError, ValueError, AttributeError):
        return f"{CONFIG_FILE} is missing or damaged"
    for name in files:
        try:
            with safe_open(path / name, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            return f"{name} is damaged: {error}"
    return None
