"""Which positions of a batch each loss reads, and the targets there."""

from typing import NamedTuple

import torch
from torch import Tensor

from umbra.errors import ConfigError
from umbra.method.losses import IGNORED, as_classes, labelled_positions


class Labels(NamedTuple):
    """The labelled positions of both paths, flat in (B, T), with the targets of the next token.

    Attributes:
        positions: (N,), those of the attached path.
        targets: (N,).
        shadow_positions: (M,), those of the shadow.
        shadow_targets: (M,).
        same: (M,), for each shadow position the number of the attached one with the same target, -1 if there is none; None if
            both paths have the same labels.
    """

    positions: Tensor
    targets: Tensor
    shadow_positions: Tensor
    shadow_targets: Tensor
    same: Tensor | None = None

    @classmethod
    def of(cls, labels: Tensor, shadow_targets: Tensor | None, shift_labels: Tensor | None = None) -> "Labels":
        """Read labels.

        Args:
            labels: (B, T), aligned with the input.
            shadow_targets: (B, T), the shadow's labels if they differ.
            shift_labels: (B, T), the labels of the next tokens, in place of ``labels``.

        Raises:
            ConfigError: ``shadow_targets`` of another shape.
        """
        positions, targets = labelled_positions(labels, shift_labels)
        if shadow_targets is None:
            return cls(positions, targets, positions, targets)
        if shadow_targets.shape != labels.shape:
            raise ConfigError(
                f"shadow_targets must be of the labels' shape {tuple(labels.shape)}, got {tuple(shadow_targets.shape)}."
            )
        shadow_positions, own_targets = labelled_positions(shadow_targets)
        number = torch.full((labels.numel(),), -1, device=positions.device)
        number[positions] = torch.arange(len(positions), device=positions.device)
        same = number[shadow_positions].where(labels.flatten()[shadow_positions + 1] == own_targets, -1)
        return cls(positions, targets, shadow_positions, own_targets, same)

    def counts(self, training: bool) -> tuple[int, int]:
        """Return the divisors of the task's and of the shadow's sums where the caller passes none."""
        if training and self.same is not None:
            either = max(torch.cat([self.positions, self.shadow_positions]).unique().numel(), 1)
            return either, either
        return max(self.positions.numel(), 1), max(self.shadow_positions.numel(), 1)


class LabelArguments(NamedTuple):
    """The arguments of a forward that hold labels.

    Attributes:
        labels: (B, T), aligned with the input.
        shadow_targets: (B, T), the shadow's labels if they differ.
        shift_labels: (B, T), the labels of the next tokens.
    """

    labels: Tensor | None
    shadow_targets: Tensor | None = None
    shift_labels: Tensor | None = None

    def masked(self, ignore_index: int) -> "LabelArguments":
        """Return the arguments with `IGNORED` in place of another ``ignore_index``.

        Raises:
            ConfigError: ``shadow_targets`` and ``shift_labels`` are both given.
        """
        labels, shadow_targets, shift_labels = self
        if shadow_targets is not None and shift_labels is not None:
            raise ConfigError("shadow_targets are aligned with the input, shift_labels are not: pass one of them.")
        if labels is None or ignore_index == IGNORED:
            return self
        labels = labels.masked_fill(labels == ignore_index, IGNORED)
        if shift_labels is not None:
            shift_labels = shift_labels.masked_fill(shift_labels == ignore_index, IGNORED)
        return LabelArguments(labels, shadow_targets, shift_labels)

    def of_path(self, only: str | None) -> "LabelArguments":
        """Return the arguments of one path: the shadow alone learns its own targets where there are any."""
        if only == "shadow" and self.shadow_targets is not None:
            return LabelArguments(self.shadow_targets, None, self.shift_labels)
        return self

    def read(self, x: Tensor, num_tokens: int) -> Labels | None:
        """Return the labelled positions; None without labels.

        Args:
            x: the input, (B, T) or (B, T, D).
            num_tokens: V.

        Raises:
            ConfigError: labels that are not tokens, or whose shape is not the input's.
        """
        if self.labels is None:
            return None
        shadow_targets, shift_labels = self.shadow_targets, self.shift_labels
        if shift_labels is not None:
            shift_labels = _aligned("shift_labels", shift_labels, x, num_tokens)
        if shadow_targets is not None:
            shadow_targets = as_classes(shadow_targets, num_tokens, "shadow_targets")
        return Labels.of(_aligned("labels", self.labels, x, num_tokens), shadow_targets, shift_labels)


def _aligned(name: str, labels: Tensor, x: Tensor, num_tokens: int) -> Tensor:
    """Return labels of the input's shape (B, T) as `torch.long`."""
    if labels.shape != x.shape[:2]:
        raise ConfigError(f"{name} must be of the input's shape {tuple(x.shape[:2])}, got {tuple(labels.shape)}.")
    return as_classes(labels, num_tokens, name)
