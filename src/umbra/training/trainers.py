"""Training with any trainer of transformers or TRL: `with_shadow_loss`, and `ShadowTrainer`, its form for transformers' Trainer.

    loss = L(attached) + λ · L(shadow)      # L: the loss that the trainer computes

A trainer that reads the loss of the model's own forward gets this sum from there, in one pass. Any other (label smoothing, TRL's)
computes its loss twice: once with the attached model, once with the shadow alone, at a fraction of the cost. Both ways learn the
same objective with the same normalisation, weighted by the λ that the user set.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from umbra.adapters.files import PREFIX
from umbra.adapters.reading import restore_checkpoint
from umbra.base import private_transformers, sharded
from umbra.errors import ConfigError
from umbra.method.losses import IGNORED
from umbra.model.shadow_model import ShadowModel
from umbra.model.training_guard import NOTHING_TO_TRAIN
from umbra.training.checkpoints import Sums
from umbra.training.reference import base_as_reference
from umbra.training.resuming import ResumableTrainer
from umbra.training.shadow_loss_log import ShadowLossLog, num_labels

T = TypeVar("T", bound=Trainer)
Inputs = dict[str, Any]  # of a model's forward
Loss = Tensor | tuple[Tensor, Any]  # () alone, or with the model's outputs
# Log-probabilities of an earlier attached policy: they do not measure how far the shadow's policy has moved.
POLICY_STATE = ("old_per_token_logps",)


class _WithShadowLoss(ResumableTrainer):
    """Trains the shadow by the loss of the trainer class that follows in the order of base classes: see `with_shadow_loss`."""

    model: ShadowModel

    def __init__(self, *args: object, **options: object):
        parameters = inspect.signature(super().__init__)
        arguments = parameters.bind(*args, **options).arguments
        _check_arguments(type(self).__name__, arguments)
        if isinstance(settings := arguments.get("args"), TrainingArguments):
            _adapt_to_hooks(settings, arguments.get("model"))
        self._losses = ShadowLossLog()
        with base_as_reference(self, arguments, "ref_model" in parameters.parameters):
            super().__init__(**arguments)
        reads_the_models = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        self._is_one_pass = reads_the_models and self.label_smoother is None and self.compute_loss_func is None
        if not self._is_one_pass and self.model.shadow_config.distillation_weight > 0:
            raise ConfigError(
                "distillation_weight is part of the model's own loss, which this trainer does not read (it computes another, "
                "or smooths the labels): use ShadowTrainer with plain labels, or set distillation_weight=0."
            )

    # -- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Loss:
        """Return the trainer's loss (), in training plus λ times the shadow's; and the outputs, if asked for."""
        compute = self._loss_in_one_pass if self._is_one_pass else self._loss_in_two_passes
        return compute(model, inputs, return_outputs, num_items_in_batch)

    def _loss_in_one_pass(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool, num_items: Tensor | int | None
    ) -> Loss:
        """Return the loss that the model's forward computes, which includes the shadow's."""
        if self.model.training:
            inputs = {**inputs, "skip_logits": True}
        elif "shadow_targets" in inputs:
            num_items = None  # each of the two losses is divided by its own number of labels
        loss, outputs = super().compute_loss(model, inputs, True, num_items)
        self._log_shadow_loss(outputs.get("shadow_loss") if isinstance(outputs, dict) else None, num_items)
        if self._has_unlabelled_rows:
            self._losses.add_task_evaluation(loss, inputs["labels"], self)
        return (loss, outputs) if return_outputs else loss

    def _loss_in_two_passes(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool, num_items: Tensor | int | None
    ) -> Loss:
        """Return the loss that the trainer computes from the attached model, and then from the shadow alone."""
        inputs = dict(inputs)
        labels: Tensor | None = inputs.get("labels")
        shadow_targets: Tensor | None = inputs.pop("shadow_targets", None)
        shadow_inputs = {k: v for k, v in inputs.items() if k not in POLICY_STATE}
        task_items = shadow_items = num_items
        if shadow_targets is not None:
            shadow_inputs["labels"] = shadow_targets
            if not self.model.training and labels is not None:  # each of the two losses is divided by its own count
                task_items, shadow_items = (num_labels(x).clamp(min=1) for x in (labels, shadow_targets))
        with self.model.attached_only():
            result = super().compute_loss(model, inputs, return_outputs, task_items)
        loss = result[0] if return_outputs else cast(Tensor, result)
        if labels is not None and self._has_unlabelled_rows:
            self._losses.add_task_evaluation(loss, labels, self)
        weight = auxiliary_weight(self.model)
        if weight == 0:
            return result
        if "old_logps" in inputs:
            raise ConfigError(
                "This trainer measures how far the policy has moved from its old log-probabilities (old_logps), which are the "
                "attached model's, not the shadow's: set auxiliary_loss_weight=0."
            )
        with self.model.shadow_only(), nullcontext() if self.model.training else torch.no_grad():
            shadow_loss = super(_WithShadowLoss, _discarding_metrics(self)).compute_loss(
                model, shadow_inputs, False, shadow_items
            )
        assert isinstance(shadow_loss, Tensor)
        self._log_shadow_loss(shadow_loss, shadow_items)
        if not self.model.training:
            return result
        total = loss + weight * shadow_loss
        return (total, result[1]) if return_outputs else total

    @property
    def _has_unlabelled_rows(self) -> bool:
        """Whether this is an evaluation in which some rows have labels for the shadow alone."""
        return not self.model.training and self.model.shadow_config.escalation is not None

    def _log_shadow_loss(self, shadow_loss: Tensor | None, num_items: Tensor | int | None) -> None:
        if shadow_loss is None:
            return
        value = shadow_loss.detach()
        if self._is_one_pass and num_items is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # like the loss itself, whose mean over the ranks is the sum
        if not self.model.training:
            self._losses.add_shadow_evaluation(value, self)
            return
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            counts_items = self.model_accepts_loss_kwargs and num_items is not None
            is_scaled = counts_items or self.compute_loss_func is not None
        step_part = value if is_scaled else value / self.current_gradient_accumulation_steps
        self._losses.add(step_part, self.state.global_step)

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Tensor | int | None:
        """Count the tokens that are labelled for the attached model or for the shadow."""
        samples = [
            batch | {"labels": batch["labels"].where(batch["labels"] != IGNORED, batch["shadow_targets"])}
            if "shadow_targets" in batch
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(samples, device)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of the base's arguments too, such as images."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: list[str] = self._signature_columns or []
            columns += [n for n in inspect.signature(self.model.base.forward).parameters if n not in columns]

    # -- logs ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``shadow_loss`` too: the mean over the ranks and over the steps since the last log."""
        if "loss" in logs and (shadow_loss := self._losses.pop_mean(self)) is not None:
            logs["shadow_loss"] = shadow_loss
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, and add the shadow's loss to the metrics, averaged like the task's.

        If some rows have labels for the shadow alone, the task's loss is a mean over labels instead of rows.
        """
        self._losses.clear_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        return output._replace(metrics={**(output.metrics or {}), **self._losses.metrics(metric_key_prefix)})

    def _sums(self) -> Sums:
        return {
            **super()._sums(),
            "shadow_loss": float(self._losses.total),
            "shadow_since": self._losses.since,
        }

    def _restore_sums(self, sums: Sums) -> None:
        self._losses.reset(sums.get("shadow_loss", 0.0), sums.get("shadow_since"))

    # -- optimizer and checkpoints ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the trainer's optimizer.

        Raises:
            ConfigError: no parameter is trainable.
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError(NOTHING_TO_TRAIN)
        return super().create_optimizer(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_checkpoint(self.model.shadow, self.model.base, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        moved = Path(self.args.output_dir or "", best.name)  # in a run's folder that was moved
        self._load_from_checkpoint(str(moved if moved.is_dir() else best))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder; all ranks must call it together, and one writes. A sharded base is never gathered."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        weights = sharded.whole_state(self.model.shadow, PREFIX) if state_dict is None else state_dict
        if self.args.should_save:
            settings = vars(self.args)  # a trainer that renders prompts (GRPO, RLOO) has arguments of the chat template
            template = (settings["chat_template_kwargs"] or {}) if "chat_template_kwargs" in settings else None
            self.model.save_pretrained(
                output_dir or self.args.output_dir or "", state_dict=weights, overwrite=True,
                tokenizer=self.processing_class, chat_template_kwargs=template,
            )  # fmt: skip

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP, save what one process would, without the frozen base: any number of ranks can resume from it."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, scheduler = cast(AcceleratedOptimizer, self.optimizer), cast(AcceleratedScheduler, self.lr_scheduler)
        state = sharded.gather(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(AcceleratedOptimizer, self.optimizer).optimizer
        handle = optimizer.register_load_state_dict_pre_hook(sharded.spread_optimizer_state)
        self.is_fsdp_enabled = False  # the files are those of one process
        super()._load_optimizer_and_scheduler(checkpoint)
        self.is_fsdp_enabled = True
        handle.remove()


class ShadowTrainer(_WithShadowLoss):
    """transformers' Trainer for a ShadowModel: ``with_shadow_loss(Trainer)``.

    The shadow's own loss is logged beside the task's, in training and in evaluation. Checkpoints are adapter folders; resuming and
    loading the best one restore it completely.
    """

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Predict one batch, with logits only where there is a label, unless the predictions are asked for."""
        inputs = {**inputs, "skip_logits": prediction_loss_only}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def with_shadow_loss(trainer_class: type[T]) -> type[T]:
    """Return a subclass of a trainer class in which the shadow learns the trainer's objective too, with weight λ.

    For transformers' Trainer and those of TRL: ``with_shadow_loss(SFTTrainer)(model=model, …)``. Evaluation reports the attached
    model's loss, and the shadow's beside it. A trainer that compares with a reference model, and is given none, compares with
    the bare base within the same model: nothing is loaded or copied. Checkpoints are adapter folders.

    Args:
        trainer_class: transformers' Trainer or a subclass of it.

    Raises:
        ConfigError: another class.
    """
    return cast(type[T], _shadow_trainer_class(trainer_class))


@functools.cache
def _shadow_trainer_class(trainer_class: type[Trainer]) -> type[Trainer]:
    if not inspect.isclass(trainer_class) or not issubclass(trainer_class, Trainer):
        raise ConfigError(f"with_shadow_loss needs a subclass of transformers' Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, _WithShadowLoss):
        return trainer_class
    if trainer_class is Trainer:
        return ShadowTrainer
    members: dict[str, object] = {"__doc__": trainer_class.__doc__, "__module__": __name__}
    if reference := getattr(trainer_class, "compute_ref_log_probs", None):
        members["compute_ref_log_probs"] = _with_bare_base(reference)
    return type(f"Shadow{trainer_class.__name__}", (_WithShadowLoss, trainer_class), members)


def _with_bare_base(compute: Callable[[Trainer, nn.Module, Inputs], object]) -> Callable[..., object]:
    """Return TRL's method that precomputes reference log-probabilities, run on the bare base."""

    @functools.wraps(compute)
    def compute_ref_log_probs(trainer: _WithShadowLoss, model: nn.Module, inputs: Inputs) -> object:
        with trainer.model.disable_adapter():
            return compute(trainer, model, inputs)

    return compute_ref_log_probs


def _check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Raise a ConfigError if the arguments of a trainer of class ``name`` hold no ShadowModel, or an adapter of PEFT."""
    model = arguments.get("model")
    if not isinstance(model, ShadowModel) and (model is not None or "model_init" not in arguments):
        raise ConfigError(f"{name} trains a ShadowModel, got {type(model).__name__}: attach or load one first.")
    if arguments.get("peft_config") is not None:
        raise ConfigError(
            "peft_config adds an adapter of PEFT to a model that already has a shadow: use one of the two. Leave it out."
        )


def _adapt_to_hooks(settings: TrainingArguments, model: ShadowModel | None) -> None:
    """Turn off DataParallel, and the search of DistributedDataParallel for unused parameters if all are used."""
    private_transformers.use_one_gpu(settings)  # DataParallel would copy hooks that refer to one device
    if settings.ddp_find_unused_parameters is None:
        # Of two forward passes before one backward pass, DDP would search the second alone.
        uses_all = model is None or auxiliary_weight(model) > 0
        settings.ddp_find_unused_parameters = False if uses_all else None


def _discarding_metrics(trainer: T) -> T:
    """Return a copy of the trainer for one more pass, whose counts and metrics are thrown away."""
    twin = copy.copy(trainer)
    for name in ("_metrics", "_logs"):
        if name in vars(trainer):
            vars(twin)[name] = copy.deepcopy(vars(trainer)[name])
    if "aux_loss_enabled" in vars(trainer):
        vars(twin)["aux_loss_enabled"] = False  # a router's loss: the base may have a router, the shadow has none
    return twin


def auxiliary_weight(model: ShadowModel) -> float:
    """Return λ."""
    return model.shadow_config.auxiliary_loss_weight
