"""A block boundary in PyTorch, with a gradient written by hand: the update after block l − 1, the injection before block l.

    n  = norm(h);  a = n · G₁ᵀ;  b = n · T₁ᵀ
    s' = s + σ(act(a) · G₂ᵀ) ⊙ (act(b) · T₂ᵀ − s)
    h' = h + α · ((h − s') · Downᵀ) · Upᵀ

Autograd keeps s, s' (the s of the next boundary), h' (which the block keeps anyway) and the R numbers between Down and Up.
The backward recomputes the rest, h included: D numbers per token and boundary are stored instead of about seven times D.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.method.kernels.boundary import NO_MASKS, Boundary, Masks
from umbra.method.kernels.first_order import Context, first_order

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
GRADIENTS = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}


def update_and_inject(h: Tensor, s: Tensor, boundary: Boundary, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """Return (h', s'); h itself without an injection, s itself without an update.

    Args:
        h: (…, D), of any floating dtype; h' has the same.
        s: (…, D), in the dtype of the weights.
        boundary: the weights.
        masks: dropout masks.
    """
    if not torch.is_grad_enabled():
        return forward(h, s, boundary, masks)[:2]
    out, state = _UpdateAndInject.apply(h, s, boundary, masks, *boundary.weights())
    return h if out is None else out, s if state is None else state


def forward(h: Tensor, s: Tensor, boundary: Boundary, masks: Masks) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the equations at the top: h', s', and (h − s') · Downᵀ (…, R), the input of Up."""
    x, r = h.to(s.dtype), None
    if boundary.gate is not None and boundary.transform is not None:
        n = x if boundary.norm is None else F.layer_norm(x, x.shape[-1:], *boundary.norm)
        inner, bias = in_projections(*boundary.gate[:2], *boundary.transform[:2])
        act_a, act_b = ACTIVATIONS[boundary.activation](F.linear(n, inner, bias)).chunk(2, -1)
        act_b = act_b if masks.transform is None else act_b.mul_(masks.transform)
        s = torch.lerp(s, F.linear(act_b, *boundary.transform[2:]), F.linear(act_a, *boundary.gate[2:]).sigmoid_())
    if boundary.down is not None and boundary.up is not None:
        delta = x - s
        delta = delta if masks.delta is None else delta.mul_(masks.delta)
        r = F.linear(delta, boundary.down)
        r = r if masks.rank is None else r.mul_(masks.rank)
        if h.dtype == s.dtype:
            h = torch.addmm(h.flatten(0, -2), r.flatten(0, -2), boundary.up.T, alpha=boundary.alpha).view(h.shape)
        else:
            h = h + F.linear(r, boundary.up).mul_(boundary.alpha).to(h.dtype)
    return h, s, r


def in_projections(
    g1: Tensor, g1_bias: Tensor | None, t1: Tensor, t1_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the in-projections of gate and transform as one, (2G, D) and (2G,), which reads the rows once."""
    return torch.cat([g1, t1]), None if g1_bias is None or t1_bias is None else torch.cat([g1_bias, t1_bias])


class _BoundaryContext(Context):
    is_after: bool  # whether h' is saved in place of h
    epsilon: float  # 0 without a norm
    activation: str
    alpha: float


class _UpdateAndInject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _BoundaryContext, h: Tensor, s: Tensor, boundary: Boundary, masks: Masks, *weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        out, state, r = forward(h, s, boundary, masks)
        ctx.set_materialize_grads(False)
        # In another precision than s, h cannot be recovered from h'.
        ctx.is_after = r is not None and h.dtype == s.dtype
        ctx.save_for_backward(out if ctx.is_after else h, s, state, r, *masks, *weights)  # pyright: ignore[reportArgumentType]
        ctx.epsilon = boundary.norm[2] if boundary.norm else 0.0
        ctx.activation, ctx.alpha = boundary.activation, boundary.alpha
        return None if boundary.down is None else out, None if boundary.gate is None else state

    @staticmethod
    @first_order
    def backward(ctx: _BoundaryContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h, s, state, r, in_transform, in_rank, in_delta, *weights = ctx.saved_tensors
        d_out, d_state = gradients
        d_h, d_s, d_down, d_up = None, d_state, None, None
        D, x = h.shape[-1], h.to(s.dtype).reshape(-1, h.shape[-1])
        if ctx.is_after:
            x = torch.addmm(x, r.reshape(len(x), r.shape[-1]), weights[-1].T, alpha=-ctx.alpha)
        if d_out is not None:
            d_s, d_delta, d_down, d_up = _inject_backward(ctx, d_out, d_state, x, state, r, in_rank, in_delta)
            d_h = d_out + d_delta.view(h.shape).to(h.dtype)
        d_weights: tuple[Tensor | None, ...] = (None,) * 10
        if weights[2] is not None and d_s is not None:
            d_n, d_s, *d_update = _update_backward(ctx, d_s, x, s.reshape(-1, D), in_transform)
            d_weights = tuple(d_update)
            assert d_n is not None
            d_n = d_n.view(h.shape).to(h.dtype)
            d_h = d_n if d_h is None else d_h.add_(d_n)
        d_s = None if d_s is None else d_s.view(s.shape)
        return d_h, d_s, None, None, *d_weights, d_down, d_up


def _inject_backward(
    ctx: _BoundaryContext, d_out: Tensor, d_state: Tensor | None, x: Tensor, state: Tensor, r: Tensor, in_rank: Tensor | None,
    in_delta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of s' and h − s', both (N, D), of down and of up."""
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


def _update_backward(
    ctx: _BoundaryContext, d_s: Tensor, x: Tensor, s: Tensor, in_transform: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of h and s, both (N, D), and of the weights of norm, gate and transform."""
    norm, norm_bias, g1, g1_bias, g2, g2_bias, t1, t1_bias, t2, t2_bias = ctx.saved_tensors[7:-2]
    d_s, act, act_backward = d_s.reshape(x.shape), ACTIVATIONS[ctx.activation], GRADIENTS[ctx.activation]
    n, mean, scale = x, None, None
    if norm is not None:
        n, mean, scale = torch.native_layer_norm(x, x.shape[-1:], norm, norm_bias, ctx.epsilon)
    inner, inner_bias = in_projections(g1, g1_bias, t1, t1_bias)
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
    (d_g1, d_t1), (d_g1_bias, d_t1_bias) = (_halves(d) for d in _linear_backward(d_ab, n, inner_bias))
    weights = (
        d_g1,
        d_g1_bias,
        *_linear_backward(d_z, act_a, g2_bias),
        d_t1,
        d_t1_bias,
        *_linear_backward(d_t, act_b, t2_bias),
    )
    if norm is None:
        return d_n, d_s, None, None, *weights
    d_n, d_norm, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
        d_n, x, x.shape[-1:], mean, scale, norm, norm_bias, [True, True, True]
    )
    return d_n, d_s, d_norm, d_norm_bias, *weights


def _linear_backward(d_out: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return d_out.T @ x, None if bias is None else d_out.sum(0)


def _halves(x: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None) if x is None else x.chunk(2)
