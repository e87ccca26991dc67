"""Stopping a training run that has diverged."""

import math

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbra.base import sharded
from umbra.errors import ConfigError


class StopOnDivergence(TrainerCallback):
    """End a training run whose loss or weights are not finite, before they are saved.

    Raises:
        ConfigError: names the step.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: object
    ) -> None:  # fmt: skip
        """Check the weights whenever the trainer is about to log, save or stop."""
        if control.should_log or control.should_save or control.should_training_stop:
            _check_weights(args, state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: object
    ) -> None:  # fmt: skip
        """Check the weights at the end of an epoch."""
        _check_weights(args, state, model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:  # fmt: skip
        """Check every loss that is logged, in training and in evaluation, and the gradient norm.

        Clipping by an infinite norm leaves no gradient to learn from. With fp16, the gradient scaler skips such steps.
        """
        for name, value in (logs or {}).items():
            is_checked = name.endswith("loss") or (name == "grad_norm" and not args.fp16)
            if is_checked and not math.isfinite(value):
                raise _divergence(args, state, f"{name} is {value}")


def _check_weights(args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
    assert model is not None
    trained = (sharded.local(p) for p in model.parameters() if p.requires_grad)
    if not all(bool(p.isfinite().all()) for p in trained):
        raise _divergence(args, state, "its weights are not finite")


def _divergence(args: TrainingArguments, state: TrainerState, symptom: str) -> ConfigError:
    return ConfigError(
        f"Training has diverged by step {state.global_step}: {symptom}. Lower learning_rate ({args.learning_rate:g}), warm up "
        "longer, or check the shadow's scales (alpha, init_scale) and the data; earlier checkpoints are unchanged."
    )
