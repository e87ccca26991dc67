"""One seam: the update after block l and the injection before the next, which read the same h and s.

    n  = norm(h);  a = n · G₁ᵀ;  b = n · T₁ᵀ
    s' = s + σ(act(a) · G₂ᵀ) ⊙ (act(b) · T₂ᵀ − s)
    h' = h + α · ((h − s') · Downᵀ) · Upᵀ

Autograd keeps s, s' (the s of the next seam), h' (which the block keeps anyway) and the R numbers between Down and Up, and
computes the rest again in the backward, h too: D numbers per token and seam instead of about seven times D.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.method.kernels.once import first_order


class Seam(NamedTuple):
    """Weights of one seam, all of one dtype; a seam has an update, an injection, or both.

    norm (D,) twice; gate and transform: in (G, D), (G,), out (D, G), (D,); down (R, D), up (D, R).
    """

    norm: tuple[Tensor, Tensor, float] | None  # weight, bias, ε
    gate: tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None
    transform: tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None
    activation: str  # "silu" or "gelu"
    down: Tensor | None
    up: Tensor | None
    alpha: float


class Masks(NamedTuple):
    """Dropout: factors 0 or 1 / (1 − p) on the transform's G, on the R of the injection, and on its D; None for none."""

    transform: Tensor | None = None
    rank: Tensor | None = None
    delta: Tensor | None = None


NO_MASKS = Masks()
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
WIDEST_GATE, WIDEST_RANK = 32, 64  # that couple_triton.py takes, which bounds its registers
GRADIENTS = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}


def couple(h: Tensor, s: Tensor, seam: Seam, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """(h', s') of one seam; ``h`` where there is no injection, ``s`` where there is no update.

    Args:
        h: (…, D), of any floating dtype; h' has the same.
        s: (…, D), in the dtype of the weights.
    """
    if _on_triton(h, s, seam):
        from umbra.method.kernels import couple_triton

        return couple_triton.couple(h, s, seam, masks)
    if not torch.is_grad_enabled():
        return forward(h, s, seam, masks)[:2]
    out, state = _Couple.apply(h, s, seam, masks, *weights_of(seam))  # type: ignore[misc]
    return h if out is None else out, s if state is None else state


def forward(h: Tensor, s: Tensor, seam: Seam, masks: Masks) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equations at the top: h', s', and (h − s') · Downᵀ, (…, R), as Up reads it."""
    x, r = h.to(s.dtype), None
    if seam.gate is not None and seam.transform is not None:
        n = x if seam.norm is None else F.layer_norm(x, x.shape[-1:], *seam.norm)
        inner, bias = _inner(*seam.gate[:2], *seam.transform[:2])
        act_a, act_b = ACTIVATIONS[seam.activation](F.linear(n, inner, bias)).chunk(2, -1)
        act_b = act_b if masks.transform is None else act_b.mul_(masks.transform)
        s = torch.lerp(s, F.linear(act_b, *seam.transform[2:]), F.linear(act_a, *seam.gate[2:]).sigmoid_())
    if seam.down is not None and seam.up is not None:
        delta = x - s
        delta = delta if masks.delta is None else delta.mul_(masks.delta)
        r = F.linear(delta, seam.down)
        r = r if masks.rank is None else r.mul_(masks.rank)
        if h.dtype == s.dtype:
            h = torch.addmm(h.flatten(0, -2), r.flatten(0, -2), seam.up.T, alpha=seam.alpha).view(h.shape)
        else:
            h = h + F.linear(r, seam.up).mul_(seam.alpha).to(h.dtype)
    return h, s, r


def _inner(g1: Tensor, g1_bias: Tensor | None, t1: Tensor, t1_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The in-projections of gate and transform as one, (2G, D) and (2G,): half the walks over the rows."""
    return torch.cat([g1, t1]), None if g1_bias is None or t1_bias is None else torch.cat([g1_bias, t1_bias])


def _on_triton(h: Tensor, s: Tensor, seam: Seam) -> bool:
    """Whether couple_triton.py takes this seam: on a GPU, with a G and an R that are not too wide for it."""
    if not h.is_cuda or not _has_triton(h.device):
        return False
    G, R = 0 if seam.gate is None else len(seam.gate[0]), 0 if seam.down is None else len(seam.down)
    return G <= WIDEST_GATE and R <= WIDEST_RANK and {h.dtype, s.dtype} <= FLOATS


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and its kernels fit this GPU: NVIDIA's, from compute capability 8 (A100) on."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def weights_of(seam: Seam) -> tuple[Tensor | None, ...]:
    """norm, gate, transform, down and up in a row: 12 tensors, None for those that the seam lacks."""
    norm = (None, None) if seam.norm is None else seam.norm[:2]
    none = (None,) * 4
    return (*norm, *(seam.gate or none), *(seam.transform or none), seam.down, seam.up)


# -- decoding: a few rows, where each operation costs more to start than to do ------------------------------------------

FEW = 16  # rows (tokens) up to which the packed form is the faster one


class Pack(NamedTuple):
    """A seam with its matrices put together: gate and transform in one product, α in ``up``."""

    norm: tuple[Tensor, Tensor, float] | None
    inner: Tensor | None  # (2G, D)
    inner_bias: Tensor | None
    outer: Tensor | None  # (2D, 2G), the blocks of gate and transform on its diagonal
    outer_bias: Tensor | None
    activation: str
    down: Tensor | None
    up: Tensor | None


@torch.no_grad()
def pack(seam: Seam) -> Pack:
    """Copies of the weights, to be thrown away before these change."""
    inner = inner_bias = outer = outer_bias = None
    if seam.gate is not None and seam.transform is not None:
        (g1, g1_bias, g2, g2_bias), (t1, t1_bias, t2, t2_bias) = seam.gate, seam.transform
        inner, inner_bias = _inner(g1, g1_bias, t1, t1_bias)
        outer = torch.block_diag(g2, t2)
        outer_bias = None if g2_bias is None or t2_bias is None else torch.cat([g2_bias, t2_bias])
    up = None if seam.up is None else seam.alpha * seam.up
    return Pack(seam.norm, inner, inner_bias, outer, outer_bias, seam.activation, seam.down, up)


def couple_few(h: Tensor, s: Tensor, seam: Pack) -> tuple[Tensor, Tensor]:
    """`couple` without gradients or dropout."""
    x = h if h.dtype == s.dtype else h.to(s.dtype)
    if seam.inner is not None and seam.outer is not None:
        n = x if seam.norm is None else F.layer_norm(x, x.shape[-1:], *seam.norm)
        a = ACTIVATIONS[seam.activation](F.linear(n, seam.inner, seam.inner_bias))
        gate, transform = F.linear(a, seam.outer, seam.outer_bias).chunk(2, -1)
        s = torch.lerp(s, transform, gate.sigmoid())
    if seam.down is not None and seam.up is not None:
        correction = F.linear(F.linear(x - s, seam.down), seam.up)
        h = h + (correction if h.dtype == s.dtype else correction.to(h.dtype))
    return h, s


# -- training ----------------------------------------------------------------------------------------------------------


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, seam: Seam, masks: Masks, *weights: Tensor | None) -> Any:  # type: ignore[override]
        out, state, r = forward(h, s, seam, masks)
        ctx.set_materialize_grads(False)
        ctx.is_after = (
            r is not None and h.dtype == s.dtype
        )  # else h, added to in another precision, cannot be told from h'
        ctx.save_for_backward(out if ctx.is_after else h, s, state, r, *masks, *weights)
        ctx.epsilon, ctx.activation, ctx.alpha = seam.norm and seam.norm[2], seam.activation, seam.alpha
        return None if seam.down is None else out, None if seam.gate is None else state

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> Any:  # type: ignore[override]
        h, s, state, r, in_transform, in_rank, in_delta, *weights = ctx.saved_tensors
        d_h, d_s, d_down, d_up = None, d_state, None, None
        D, x = h.shape[-1], h.to(s.dtype).reshape(-1, h.shape[-1])
        if ctx.is_after:
            x = torch.addmm(x, r.reshape(len(x), r.shape[-1]), weights[-1].T, alpha=-ctx.alpha)
        if d_out is not None:
            d_s, d_delta, d_down, d_up = _inject_backward(ctx, d_out, d_state, x, state, r, in_rank, in_delta)
            d_h = d_out + d_delta.view(h.shape).to(h.dtype)
        d_weights = (None,) * 10
        if weights[2] is not None and d_s is not None:
            d_n, d_s, *d_weights = _update_backward(ctx, d_s, x, s.reshape(-1, D), in_transform)
            d_n = d_n.view(h.shape).to(h.dtype)
            d_h = d_n if d_h is None else d_h.add_(d_n)
        d_s = None if d_s is None else d_s.view(s.shape)
        return d_h, d_s, None, None, *d_weights, d_down, d_up


def _inject_backward(
    ctx: Any, d_out: Tensor, d_state: Tensor | None, x: Tensor, state: Tensor, r: Tensor, in_rank: Tensor | None,
    in_delta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of s', h − s' (both (N, D)), down and up."""
    down, up = ctx.saved_tensors[-2:]
    d = d_out.reshape(x.shape).to(x.dtype)
    delta = x - state.reshape(x.shape)
    delta = delta if in_delta is None else delta.mul_(in_delta.reshape(x.shape))
    d_r = (d @ up).mul_(ctx.alpha)
    d_r = d_r if in_rank is None else d_r.mul_(in_rank.reshape(d_r.shape))
    d_down, d_up = d_r.T @ delta, (d.T @ r.reshape(d_r.shape)).mul_(ctx.alpha)
    d_delta = d_r @ down
    d_delta = d_delta if in_delta is None else d_delta.mul_(in_delta.reshape(x.shape))
    d_s = -d_delta if d_state is None else d_state.reshape(x.shape) - d_delta
    return d_s, d_delta, d_down, d_up


def _update_backward(ctx: Any, d_s: Tensor, x: Tensor, s: Tensor, in_transform: Tensor | None) -> tuple[Any, ...]:
    """Gradients of h and s (both (N, D)), and of the weights of norm, gate and transform."""
    norm, norm_bias, g1, g1_bias, g2, g2_bias, t1, t1_bias, t2, t2_bias = ctx.saved_tensors[7:-2]
    d_s, act, act_backward = d_s.reshape(x.shape), ACTIVATIONS[ctx.activation], GRADIENTS[ctx.activation]
    n, mean, scale = x, None, None
    if norm is not None:
        n, mean, scale = torch.native_layer_norm(x, x.shape[-1:], norm, norm_bias, ctx.epsilon)
    inner, inner_bias = _inner(g1, g1_bias, t1, t1_bias)
    ab = F.linear(n, inner, inner_bias)
    act_a, act_b = act(ab).chunk(2, -1)
    act_b = act_b if in_transform is None else act_b.mul_(in_transform.reshape(act_b.shape))
    gate, t = F.linear(act_a, g2, g2_bias).sigmoid_(), F.linear(act_b, t2, t2_bias)

    d_t = d_s * gate
    d_z = torch.ops.aten.sigmoid_backward(t.sub_(s).mul_(d_s), gate)
    d_s = d_s - d_t
    d_act_b = d_t @ t2
    d_act_b = d_act_b if in_transform is None else d_act_b.mul_(in_transform.reshape(d_act_b.shape))
    d_ab = act_backward(torch.cat([d_z @ g2, d_act_b], -1), ab)
    d_n = d_ab @ inner
    (d_g1, d_t1), (d_g1_bias, d_t1_bias) = (_halves(d) for d in _linear(d_ab, n, inner_bias))
    weights = (d_g1, d_g1_bias, *_linear(d_z, act_a, g2_bias), d_t1, d_t1_bias, *_linear(d_t, act_b, t2_bias))
    if norm is None:
        return d_n, d_s, None, None, *weights
    d_n, d_norm, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
        d_n, x, x.shape[-1:], mean, scale, norm, norm_bias, [True, True, True]
    )
    return d_n, d_s, d_norm, d_norm_bias, *weights


def _linear(d_out: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return d_out.T @ x, None if bias is None else d_out.sum(0)


def _halves(x: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None) if x is None else x.chunk(2)
