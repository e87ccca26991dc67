"""Block boundaries in decoding: for a few rows, starting an operation costs more than running it, so weights are packed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.method.kernels.boundary import Boundary
from umbra.method.kernels.boundary_torch import ACTIVATIONS, in_projections

MAX_ROWS = 16  # rows (tokens) up to which the packed form is faster


class PackedBoundary(NamedTuple):
    """A boundary with its matrices merged: gate and transform in one product, α in ``up``.

    Attributes:
        norm: weight (D,), bias (D,) and ε.
        inner: (2G, D), the in-projections of gate and transform.
        inner_bias: (2G,).
        outer: (2D, 2G), the out-projections as diagonal blocks.
        outer_bias: (2D,).
        activation: "silu" or "gelu".
        down: (R, D).
        up: (D, R), multiplied by α.
    """

    norm: tuple[Tensor, Tensor, float] | None
    inner: Tensor | None
    inner_bias: Tensor | None
    outer: Tensor | None
    outer_bias: Tensor | None
    activation: str
    down: Tensor | None
    up: Tensor | None


@torch.no_grad()
def pack(boundary: Boundary) -> PackedBoundary:
    """Return packed copies of the weights; they are stale as soon as the weights change."""
    inner = inner_bias = outer = outer_bias = None
    if boundary.gate is not None and boundary.transform is not None:
        (g1, g1_bias, g2, g2_bias), (t1, t1_bias, t2, t2_bias) = boundary.gate, boundary.transform
        inner, inner_bias = in_projections(g1, g1_bias, t1, t1_bias)
        outer = torch.block_diag(g2, t2)
        outer_bias = None if g2_bias is None or t2_bias is None else torch.cat([g2_bias, t2_bias])
    up = None if boundary.up is None else boundary.alpha * boundary.up
    return PackedBoundary(boundary.norm, inner, inner_bias, outer, outer_bias, boundary.activation, boundary.down, up)


def update_and_inject_packed(h: Tensor, s: Tensor, packed: PackedBoundary) -> tuple[Tensor, Tensor]:
    """Return h and s, both (…, D), after one boundary, without gradients or dropout."""
    x = h if h.dtype == s.dtype else h.to(s.dtype)
    if packed.inner is not None and packed.outer is not None:
        n = x if packed.norm is None else F.layer_norm(x, x.shape[-1:], *packed.norm)
        a = ACTIVATIONS[packed.activation](F.linear(n, packed.inner, packed.inner_bias))
        gate, transform = F.linear(a, packed.outer, packed.outer_bias).chunk(2, -1)
        s = torch.lerp(s, transform, gate.sigmoid())
    if packed.down is not None and packed.up is not None:
        correction = F.linear(F.linear(x - s, packed.down), packed.up)
        h = h + (correction if h.dtype == s.dtype else correction.to(h.dtype))
    return h, s
