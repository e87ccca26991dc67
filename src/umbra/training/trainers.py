"""Training with any trainer of transformers or TRL: `with_shadow_loss`, and `ShadowTrainer` made by it.

    loss = L(attached) + λ · L(shadow)      # L: whatever loss the trainer computes

A trainer that reads the loss of the model's own forward gets this sum from there, in one pass. Any other (label
smoothing, TRL's) computes its loss twice: once on the attached model, once on the shadow alone (a pass of the shadow
costs a fraction of the base's). So both paths learn the same objective, normalised alike, and λ is what the user set.
"""

import copy
import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from umbra.adapters.files import PREFIX
from umbra.adapters.reading import restore_checkpoint
from umbra.base import sharded
from umbra.errors import ConfigError
from umbra.method.losses import IGNORED
from umbra.model.shadow_model import ShadowModel
from umbra.model.training_guard import NOTHING_TO_TRAIN
from umbra.training.resuming import Resumable

# Of an earlier state of the attached policy: no measure of how far the shadow's has moved.
NOT_THE_SHADOWS = ("old_per_token_logps",)


class _ShadowLoss(Resumable):
    """What `with_shadow_loss` puts before a trainer class."""

    model: ShadowModel

    def __init__(self: Any, *args: Any, **options: Any):
        parameters = inspect.signature(super().__init__)  # type: ignore[misc]
        given = parameters.bind(*args, **options).arguments
        model, arguments = given.get("model"), given.get("args")
        if not isinstance(model, ShadowModel) and (model is not None or "model_init" not in given):
            raise ConfigError(
                f"{type(self).__name__} trains a ShadowModel, got {type(model).__name__}: attach or load one first."
            )
        if given.get("peft_config") is not None:
            raise ConfigError(
                "peft_config puts an adapter of PEFT into a model that a shadow is attached to: take one of both. Leave it out."
            )
        if arguments is not None:
            arguments._n_gpu = min(arguments.n_gpu, 1)  # or DataParallel would copy hooks that know one device
        if arguments is not None and arguments.ddp_find_unused_parameters is None:
            # All are used, and of two forwards before one backward DDP would search the second alone.
            arguments.ddp_find_unused_parameters = False if model is None or weight(model) > 0 else None
        self._shadow_train: torch.Tensor | float = 0.0
        self._shadow_since: int | None = None  # the step at which that sum began
        self._shadow_eval: list[torch.Tensor] = []  # one value for each example, of all ranks
        self._task_eval: list[torch.Tensor] = []  # (sum, labels) of each batch, where some are the shadow's alone
        with _sharing_the_base(self, given, "ref_model" in parameters.parameters):
            super().__init__(**given)
        reads_the_models = super().compute_loss.__func__ is Trainer.compute_loss  # type: ignore[misc]
        self._one_pass = reads_the_models and self.label_smoother is None and self.compute_loss_func is None
        if not self._one_pass and self.model.shadow_config.distillation_weight > 0:
            raise ConfigError(
                "distillation_weight is part of the model's own loss, which this trainer does not read (it computes another, "
                "or smooths the labels): use ShadowTrainer with plain labels, or set distillation_weight=0."
            )

    # -- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss, plus λ times the shadow's in training."""
        if self._one_pass:
            if self.model.training:
                inputs = {**inputs, "skip_logits": True}
            elif "shadow_targets" in inputs:
                num_items_in_batch = None  # of either path: each is divided by its own
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
            shadow = outputs.get("shadow_loss") if isinstance(outputs, dict) else None
            self._note(shadow, num_items_in_batch)
            if not self.model.training and self.model.shadow_config.escalation is not None:
                self._note_task(loss, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

        inputs, items = dict(inputs), num_items_in_batch
        labels, own = inputs.get("labels"), inputs.pop("shadow_targets", None)
        alone = {k: v for k, v in inputs.items() if k not in NOT_THE_SHADOWS}
        if own is not None:
            alone["labels"] = own
            if not self.model.training:  # each is divided by its own
                num_items_in_batch, items = (_labelled(told).clamp(min=1) for told in (labels, own))
        with self.model.attached_only():
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training and labels is not None and self.model.shadow_config.escalation is not None:
            self._note_task(loss[0] if return_outputs else loss, labels)
        if weight(self.model) == 0:
            return loss
        if "old_logps" in inputs:
            raise ConfigError(
                "This trainer measures how far the policy has moved from its old log-probabilities (old_logps), which are the "
                "pair's, not the shadow's: set auxiliary_loss_weight=0."
            )
        with self.model.shadow_only(), nullcontext() if self.model.training else torch.no_grad():
            shadow = super(_ShadowLoss, self._twin()).compute_loss(model, alone, False, items)  # type: ignore[misc]
        self._note(shadow, items)
        if not self.model.training:
            return loss
        if return_outputs:
            return loss[0] + weight(self.model) * shadow, loss[1]
        return loss + weight(self.model) * shadow

    def _twin(self: Any) -> Any:
        """This trainer for one more pass: what is counted and collected there is thrown away."""
        twin = copy.copy(self)
        for name in ("_metrics", "_logs"):
            if name in vars(self):
                setattr(twin, name, copy.deepcopy(vars(self)[name]))
        if "aux_loss_enabled" in vars(self):
            twin.aux_loss_enabled = False  # the router's: the base has one, the shadow none
        return twin

    def _note(self: Any, shadow: torch.Tensor | None, items: Any) -> None:
        if shadow is None:
            return
        value = shadow.detach()  # read only when it is logged: no waiting for a GPU in every step
        if self._one_pass and items is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # as the loss itself: the mean over ranks is their sum
        if not self.model.training:
            self._shadow_eval.append(self.gather_function(value.repeat(self.args.eval_batch_size)))
            return
        if self._shadow_since is None:
            self._shadow_since = self.state.global_step
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        self._shadow_train += value if scaled else value / self.current_gradient_accumulation_steps

    def _note_task(self: Any, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """For an evaluation in which some rows are the shadow's alone."""
        count = _labelled(labels)
        self._task_eval.append(self.gather_function(torch.stack([loss.detach().double() * count, count])[None]))

    def _inner_training_loop(self: Any, *args: Any, **options: Any) -> Any:
        self._shadow_train, self._shadow_since = 0.0, None  # of a training before, which counted other steps
        return super()._inner_training_loop(*args, **options)  # type: ignore[misc]

    def _progress_sums(self: Any) -> dict[str, float]:
        sums = {"shadow_loss": float(self._shadow_train), "shadow_since": self._shadow_since}
        return {**super()._progress_sums(), **sums}

    def _restore_sums(self: Any, values: dict[str, Any]) -> None:
        if "shadow_loss" in values:
            self._shadow_train, self._shadow_since = values["shadow_loss"], values["shadow_since"]

    def _set_signature_columns_if_needed(self: Any) -> None:
        """The base's arguments too, images among them, or their columns would be dropped."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            columns: Any = self._signature_columns
            columns += [n for n in inspect.signature(self.model.base.forward).parameters if n not in columns]

    def _get_num_items_in_batch(self: Any, batch_samples: list[Any], device: Any) -> Any:
        """Tokens with a label of either path."""
        told = [
            b | {"labels": _either(b["labels"], b["shadow_targets"])} if "shadow_targets" in b else b
            for b in batch_samples
        ]
        return super()._get_num_items_in_batch(told, device)  # type: ignore[misc]

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``shadow_loss``, the mean over the ranks and over the steps since the last log."""
        if "loss" in logs and self._shadow_since is not None:
            of_ranks: Any = self.accelerator.gather(torch.as_tensor(self._shadow_train))
            logs["shadow_loss"] = float(of_ranks.mean()) / (self.state.global_step - self._shadow_since)
            self._shadow_train, self._shadow_since = 0.0, None
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluation_loop(self: Any, *args: Any, **options: Any) -> Any:
        """Adds the shadow's loss to the metrics, averaged as the task's is.

        Where records are passed on, some rows are the shadow's alone: the task's loss is then that of a label.
        """
        self._shadow_eval.clear()
        self._task_eval.clear()
        output = super().evaluation_loop(*args, **options)  # type: ignore[misc]
        prefix = options.get("metric_key_prefix", "eval")
        if self._task_eval:
            total, count = torch.cat(self._task_eval).sum(0).tolist()
            output.metrics[f"{prefix}_loss"] = total / max(count, 1)
        if self._shadow_eval:
            output.metrics[f"{prefix}_shadow_loss"] = float(torch.cat(self._shadow_eval).mean())
        return output

    def compute_ref_log_probs(self: Any, model: Any, inputs: Any) -> Any:
        """TRL's precomputed reference: the bare base."""
        with self.model.disable_adapter():
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def create_optimizer(self: Any, *args: Any, **options: Any) -> Any:
        """The parent's.

        Raises:
            ConfigError: there is nothing to train.
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError(NOTHING_TO_TRAIN)
        return super().create_optimizer(*args, **options)  # type: ignore[misc]

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_checkpoint(self.model.shadow, self.model.base, Path(resume_from_checkpoint))

    def _load_best_model(self: Any) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()  # type: ignore[misc]
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        here = Path(self.args.output_dir, best.name)  # of a run whose folder was moved
        self._load_from_checkpoint(str(here if here.is_dir() else best))

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder; called by all ranks, of which one writes. A sharded base is never gathered."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self: Any, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        path = output_dir or self.args.output_dir
        weights = sharded.whole_state(self.model.shadow, PREFIX) if state_dict is None else state_dict
        if self.args.should_save:
            arguments = vars(
                self.args
            )  # of trainers that render prompts by themselves (GRPO, RLOO), the template's too
            template = (arguments["chat_template_kwargs"] or {}) if "chat_template_kwargs" in arguments else None
            self.model.save_pretrained(
                path, state_dict=weights, overwrite=True, tokenizer=self.processing_class,
                chat_template_kwargs=template,
            )  # fmt: skip

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        """Under FSDP as one process would, so that any number of ranks can go on, and without the frozen base."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state = sharded.gather(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        handle = self.optimizer.optimizer.register_load_state_dict_pre_hook(sharded.spread_optimizer_state)
        self.is_fsdp_enabled = False  # for what one process has saved
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self.is_fsdp_enabled = True
        handle.remove()


class ShadowTrainer(_ShadowLoss, Trainer):
    """transformers' Trainer for a ShadowModel, as `with_shadow_loss` makes it.

    The shadow's own loss is logged beside the task's, in training and in evaluation. Checkpoints hold the adapter
    folder; resuming and loading the best one read it back whole.
    """

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Logits only where there is a label, unless somebody wants the predictions."""
        inputs = {**inputs, "skip_logits": prediction_loss_only}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class StopWhereDiverged(TrainerCallback):
    """End a training whose loss or weights are not finite, before they are saved.

    Raises:
        ConfigError: with the step.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the weights whenever the trainer is about to log, save or stop."""
        if control.should_log or control.should_save or control.should_training_stop:
            self._check_weights(args, state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """As after a step."""
        self._check_weights(args, state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at every loss that is logged, in training and in evaluation, and at the gradient's norm.

        Clipping by an infinite norm leaves no gradient to learn from. With fp16, the scaler passes such steps over.
        """
        for name, value in (logs or {}).items():
            decides = name.endswith("loss") or (name == "grad_norm" and not args.fp16)
            if decides and not math.isfinite(value):
                raise _divergence(args, state, f"{name} is {value}")

    def _check_weights(self, args: Any, state: Any, model: Any) -> None:
        trained = (sharded.local(p) for p in model.parameters() if p.requires_grad)
        if not all(bool(p.isfinite().all()) for p in trained):
            raise _divergence(args, state, "its weights are not finite")


def _divergence(args: Any, state: Any, symptom: str) -> ConfigError:
    return ConfigError(
        f"Training has diverged by step {state.global_step}: {symptom}. Lower learning_rate ({args.learning_rate:g}), warm up "
        "longer, or check the shadow's scales (alpha, init_scale) and the data; earlier checkpoints are as they were."
    )


@functools.cache
def with_shadow_loss(trainer_class: Any) -> Any:
    """A subclass of a trainer in which the shadow learns the trainer's own objective too, with weight λ.

    For transformers' Trainer and those of TRL: ``with_shadow_loss(SFTTrainer)(model=model, …)``. Evaluation reports the
    attached model's loss, the shadow's beside it. Where the trainer compares with a reference model and is given none,
    that is the bare base within the same model: nothing is loaded or copied. Checkpoints are adapter folders.

    Raises:
        ConfigError: no subclass of transformers' Trainer.
    """
    if not inspect.isclass(trainer_class) or not issubclass(trainer_class, Trainer):
        raise ConfigError(f"with_shadow_loss needs a subclass of transformers' Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, _ShadowLoss):
        return trainer_class
    if trainer_class is Trainer:
        return ShadowTrainer
    about = {"__doc__": trainer_class.__doc__, "__module__": __name__}
    return type(f"Shadow{trainer_class.__name__}", (_ShadowLoss, trainer_class), about)


def _either(labels: torch.Tensor, shadow_targets: torch.Tensor) -> torch.Tensor:
    return labels.where(labels != IGNORED, shadow_targets)


def _labelled(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens are learned."""
    return (labels[:, 1:] != IGNORED).sum()


def weight(model: ShadowModel) -> float:
    """λ."""
    return model.shadow_config.auxiliary_loss_weight


class _Reference(nn.Module):
    """The reference model of a TRL trainer: the bare base of the model in training, so that there is no second copy.

    Holds no parameters of its own. The last answer is kept: the second pass of a step asks for it again.
    """

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer
        self.asked: Any = None
        self.answer: Any = None

    @property
    def config(self) -> Any:
        return self.trainer.model.config

    def forward(self, **inputs: Any) -> Any:
        if self.asked is not inputs["input_ids"]:
            with self.trainer.model.disable_adapter():
                self.asked, self.answer = inputs["input_ids"], self.trainer.model(**inputs)
        return self.answer


@contextmanager
def _sharing_the_base(trainer: Any, given: dict[str, Any], takes_reference: bool) -> Iterator[None]:
    """While a TRL trainer is made: keep it from loading a reference model, and give it a `_Reference` afterwards."""
    settings = {} if given.get("args") is None else vars(given["args"])
    if given.get("ref_model") is not None:
        yield
        return
    if settings.get("sync_ref_model"):
        raise ConfigError(
            "sync_ref_model=True: the reference is the frozen base, which follows nothing. Set it to False."
        )
    reference, beta = _Reference(trainer), 0.0 if takes_reference else settings.get("beta", 0.0)
    if takes_reference and not settings.get("precompute_ref_log_probs"):
        given["ref_model"] = reference
    try:
        if beta:
            settings["beta"] = 0.0  # otherwise TRL loads a copy of the base
        yield
    finally:
        if beta:
            settings["beta"] = trainer.beta = beta
    if takes_reference or beta:
        vars(reference).pop("forward", None)  # TRL has put its own there
        trainer.ref_model = reference
