"""Errors and warnings for training steps that would train nothing, or would leave out the shadow's own loss."""

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from umbra.errors import ConfigError
from umbra.method.hooks import Attachment
from umbra.method.kernels.first_order import Context
from umbra.model.adapter_set import AdapterSet

NOTHING_TO_TRAIN = (
    "The model is in training, but no parameter of its shadow requires a gradient. Load the adapter by "
    "umbra.load(…, trainable=True), or call requires_grad_(True) on the parts of model.shadow to train; call eval() otherwise."
)


class TrainingGuard:
    """Check training steps of one model.

    Args:
        base: the base model.
        adapters: the active one is trained.
        attachment: knows the path that a thread runs.
    """

    def __init__(self, base: PreTrainedModel, adapters: AdapterSet, attachment: Attachment):
        self.base, self.adapters, self.attachment = base, adapters, attachment
        self.has_warned = False

    def shadow_weight(self) -> float:
        """Return λ, or 0 where the caller computes the shadow's loss."""
        return 0.0 if self.attachment.only == "attached" else self.adapters.active.config.auxiliary_loss_weight

    def missing_shadow_loss(self, training: bool) -> str | None:
        """Return why a loss computed outside the model is incomplete in training; None if it is complete."""
        weight = self.shadow_weight()
        if not training or not torch.is_grad_enabled() or self.attachment.current() or weight == 0:
            return None
        return (
            f"this loss is computed outside the model and leaves the shadow's own (auxiliary_loss_weight={weight}) "
            "out. Pass labels and use the loss returned, train with umbra.with_shadow_loss(<your Trainer>), or set "
            "auxiliary_loss_weight=0."
        )

    def warn_without_labels(self, training: bool) -> None:
        """Warn about a call without labels in training, whose loss will lack the shadow's."""
        problem = None if torch.compiler.is_compiling() else self.missing_shadow_loss(training)
        if problem:
            warnings.warn(f"Called without labels in training: {problem}", stacklevel=4)

    def with_gradient(self, x: Tensor | None, embeds: Tensor | None, training: bool) -> Tensor | None:
        """Return x; in training without trainable parameters, a copy whose backward raises a `ConfigError`.

        Args:
            x: a loss, or the logits or states from which one is computed.
            embeds: the input of the model, which may require a gradient itself. A graph of x shows nothing: activation
                checkpointing starts one at the input.
            training: the mode of the model.
        """
        trains = training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if x is None or not trains or self.attachment.only is not None or not x.is_floating_point():
            return x
        learns = any(p.requires_grad for part in (self.adapters.active, self.base) for p in part.parameters())
        if learns or (embeds is not None and embeds.requires_grad):
            return x
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(NOTHING_TO_TRAIN, stacklevel=4)
        return _Untrainable.apply(x, torch.zeros((), device=x.device, requires_grad=True))


class _Untrainable(torch.autograd.Function):
    """The identity; its backward raises where autograd would complain about a tensor without a graph."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()  # trainers scale a loss in place

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        raise ConfigError(NOTHING_TO_TRAIN)
