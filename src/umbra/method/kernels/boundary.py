"""A block boundary as the kernels see it: its weights as plain tensors, and its dropout masks."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from umbra.method.core import Couplings, Injection, Update

Layers = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # of gate or transform: in, its bias, out, its bias


class Boundary(NamedTuple):
    """The weights of one block boundary, all of one dtype; a boundary has an update, an injection, or both.

    Attributes:
        norm: weight (D,), bias (D,) and ε of the layer norm.
        gate: in (G, D), bias (G,), out (D, G), bias (D,).
        transform: like ``gate``.
        activation: "silu" or "gelu".
        down: (R, D), with the input scale multiplied in.
        up: (D, R).
        alpha: α.
    """

    norm: tuple[Tensor, Tensor, float] | None
    gate: Layers | None
    transform: Layers | None
    activation: str
    down: Tensor | None
    up: Tensor | None
    alpha: float

    def weights(self) -> tuple[Tensor | None, ...]:
        """Return norm, gate, transform, down and up as 12 tensors, None for those that the boundary lacks."""
        norm = (None, None) if self.norm is None else self.norm[:2]
        none = (None,) * 4
        return (*norm, *(self.gate or none), *(self.transform or none), self.down, self.up)

    def sizes(self) -> tuple[int, int]:
        """Return G and R, 0 for a missing update or injection."""
        return 0 if self.gate is None else len(self.gate[0]), 0 if self.down is None else len(self.down)


class Masks(NamedTuple):
    """Dropout masks, whose entries are 0 or 1 / (1 − p); None where nothing is dropped.

    Attributes:
        transform: (…, G), on the hidden units of the transform.
        rank: (…, R), on the hidden units of the injection.
        delta: (…, D), on the input of the injection.
    """

    transform: Tensor | None = None
    rank: Tensor | None = None
    delta: Tensor | None = None


NO_MASKS = Masks()


def modules_at(couplings: Couplings, l: int) -> tuple[Update | None, Injection | None]:
    """Return the update and the injection of the boundary before block l; None for one that it lacks."""
    update, injection = _get(couplings.updates, l - 1), _get(couplings.injections, l)
    return cast(Update | None, update), cast(Injection | None, injection)


def _get(modules: nn.ModuleDict, l: int) -> nn.Module | None:
    return dict(modules.items()).get(str(l))


def boundary_of(couplings: Couplings, l: int) -> Boundary:
    """Return the weights of the boundary before block l."""
    update, injection = modules_at(couplings, l)
    norm = couplings.norm
    return Boundary(
        (norm.weight, norm.bias, norm.eps) if update and isinstance(norm, nn.LayerNorm) else None,
        _layers(update.gate) if update else None,
        _layers(update.transform) if update else None,
        couplings.config.constants.activation or "",
        injection.scaled_down() if injection else None,
        injection.up.weight if injection else None,
        injection.alpha if injection else 0.0,
    )


def draw_masks(couplings: Couplings, l: int, h: Tensor) -> Masks:
    """Draw the dropout masks of the boundary before block l, in the order in which its `nn.Dropout` modules would.

    Args:
        h: (…, D), the output of block l − 1.
    """
    if not couplings.training:
        return NO_MASKS

    def mask(layer: nn.Dropout, size: int) -> Tensor | None:
        if (p := layer.p) == 0:
            return None
        dtype = next(couplings.parameters()).dtype
        return torch.empty(*h.shape[:-1], size, dtype=dtype, device=h.device).bernoulli_(1 - p).div_(1 - p)

    update, injection = modules_at(couplings, l)
    G, R = couplings.config.gate_rank or 0, couplings.config.rank or 0
    transform = mask(_dropout(update.transform), G) if update else None
    rank = mask(injection.dropout_rank, R) if injection else None
    delta = mask(injection.dropout_delta, h.shape[-1]) if injection else None
    return NO_MASKS if transform is rank is delta is None else Masks(transform, rank, delta)


def _dropout(network: nn.Sequential) -> nn.Dropout:
    return next(m for m in network if isinstance(m, nn.Dropout))


def _layers(network: nn.Sequential) -> Layers:
    first, last = cast(nn.Linear, network[0]), cast(nn.Linear, network[-1])
    return first.weight, first.bias, last.weight, last.bias
