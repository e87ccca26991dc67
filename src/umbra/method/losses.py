"""Where a loss is read, and its plain forms, which compute from logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.errors import ConfigError

IGNORED = -100  # the label of a position without a loss


def labelled_positions(labels: Tensor, shift_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the flat positions (N,) whose next token is labelled, and these labels (N,).

    Args:
        labels: (B, T), aligned with the input; `IGNORED` where there is no loss.
        shift_labels: (B, T), the labels of the next tokens, in place of ``labels``.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift_labels is None else shift_labels
    following = following.reshape(-1)
    positions = (following != IGNORED).nonzero().squeeze(-1)
    return positions, following[positions]


def as_classes(labels: Tensor, count: int, name: str = "labels") -> Tensor:
    """Return class numbers as `torch.long`.

    Args:
        labels: of any shape and any integer dtype.
        count: the number of classes.
        name: the argument's name, for the error message.

    Raises:
        ConfigError: another dtype, or a value that is neither a class nor `IGNORED`.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ConfigError(f"{name} must be integers, got {labels.dtype}: convert them by .long().")
    labels = labels.long()
    if torch.compiler.is_compiling() or labels.is_meta:
        return labels
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= count)
    if bool(wrong.any()):
        raise ConfigError(
            f"{name} must lie in 0 to {count - 1}, or be {IGNORED} where there is no loss; got {int(labels[wrong][0])}."
        )
    return labels


def at_least_one(items: Tensor | int) -> Tensor | int:
    """Return the divisor for a sum over ``items`` labels: a batch without labels has a loss of 0."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def token_loss(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """Return Σ CE / items; with N = 0 it is 0 and still connected to the graph.

    Args:
        logits: (N, V).
        targets: (N,).
        items: the number of labels in the whole accumulated batch; None for N.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    return total / at_least_one(targets.numel() if items is None else items)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str, items: Tensor | int | None) -> Tensor:
    """Return the loss of a classifier, normalised like `token_loss`.

    Args:
        logits: (B, C).
        labels: (B,) classes, (B,) or (B, C) values for regression, (B, C) of 0 and 1 for multi-label.
        problem_type: regression (MSE), single_label_classification (CE) or multi_label_classification (BCE).
        items: the number of labels in the whole accumulated batch; None for those of this batch.
    """
    logits = logits.float()
    if problem_type == "single_label_classification":
        labels = as_classes(labels.reshape(-1), logits.shape[-1])
        total, count = F.cross_entropy(logits, labels, reduction="sum"), (labels != IGNORED).sum()
    elif problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        count = labels.numel()
    else:
        total = F.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape), reduction="sum")
        count = labels.numel()
    return total / at_least_one(count if items is None else items)
