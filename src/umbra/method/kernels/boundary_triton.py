"""A block boundary on a GPU: launches the Triton kernels of triton_kernels.py, which compute what boundary_torch.py does."""

import functools
from typing import Any, overload

import torch
from torch import Tensor

from umbra.method.kernels import triton_kernels
from umbra.method.kernels.boundary import Boundary, Masks
from umbra.method.kernels.first_order import Context, first_order

kernels: Any = triton_kernels  # type checkers see plain functions, which cannot be subscripted by a grid

# Chosen from what the compiler reports for sm_80, sm_86 and sm_90: larger tiles spill registers; rank 64 hardly more than rank 32.
TILE = {"BN": 32, "BD": 32, "num_warps": 4}
PARTS = 16  # of D, for few rows


def update_and_inject(h: Tensor, s: Tensor, boundary: Boundary, masks: Masks) -> tuple[Tensor, Tensor]:
    """Return (h', s'), as `boundary_torch.update_and_inject`."""
    if not torch.is_grad_enabled():
        out, state, _ = _run_forward(h, s, boundary, masks, saves=False)
    else:
        out, state = _UpdateAndInject.apply(h, s, boundary, masks, *boundary.weights())
    return h if out is None else out, s if state is None else state


def _sizes(D: int, G: int, R: int) -> dict[str, int]:
    return {"D": D, "G": G, "R": R, "BG": _padded(G), "BR": _padded(R)}


def _precision(activation: str, dtype: torch.dtype) -> dict[str, object]:
    """Return the activation, and how tensor cores multiply fp32: 22 bits of each factor, by three products of 11 bits.

    One product suffices for weights in fp16 and bf16, and for users of torch.set_float32_matmul_precision.
    """
    one = dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return {"GELU": activation == "gelu", "DOT": "tf32" if one else "tf32x3"}


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


@overload
def _flat(x: Tensor) -> Tensor: ...
@overload
def _flat(x: Tensor | None) -> Tensor | None: ...
def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _run_forward(
    h: Tensor, s: Tensor, boundary: Boundary, masks: Masks, saves: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return h' and s', None if the boundary does not change them, and the numbers per row that the backward reads."""
    x, y, D = _flat(h), _flat(s), h.shape[-1]
    N, (G, R) = len(x), boundary.sizes()
    tiles, part, parts, phases = _cdiv(N, TILE["BN"]), D, 1, (0,)
    if not saves and TILE["BD"] < D and 4 * tiles <= _processors(h.device):
        part = _cdiv(D, PARTS * TILE["BD"]) * TILE["BD"]
        parts, phases = _cdiv(D, part), (1,) * (G > 0) + (2,) + (3,) * (R > 0)
    out = torch.empty_like(x) if R else None
    state = torch.empty_like(y) if G else None
    buffer = None
    if saves or parts > 1:
        buffer = torch.empty(parts * (2 * N + 2 * N * G + 4 * G + N * R), dtype=torch.float32, device=h.device)
    weights = [w if w is None else w.contiguous() for w in boundary.weights()]
    with torch.cuda.device_of(h):
        for phase in phases:
            kernels.forward[(tiles, parts)](
                x, y, out, state, *weights, *map(_flat, masks), buffer, N, boundary.norm and boundary.norm[2], boundary.alpha,
                **_sizes(D, G, R), **_precision(boundary.activation, s.dtype), **TILE,
                PHASE=phase, PART=part, PARTS=parts, num_stages=3,
            )  # fmt: skip
    return None if out is None else out.view(h.shape), None if state is None else state.view(s.shape), buffer


class _BoundaryContext(Context):
    activation: str
    alpha: float


class _UpdateAndInject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _BoundaryContext, h: Tensor, s: Tensor, boundary: Boundary, masks: Masks, *weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        out, state, buffer = _run_forward(h, s, boundary, masks, saves=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, s, state, buffer, *masks, *weights)  # pyright: ignore[reportArgumentType]
        ctx.activation, ctx.alpha = boundary.activation, boundary.alpha
        return out, state

    @staticmethod
    @first_order
    def backward(ctx: _BoundaryContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h, s, state, buffer, *saved = ctx.saved_tensors
        masks, weights = Masks(*map(_flat, saved[:3])), [w if w is None else w.contiguous() for w in saved[3:]]
        norm, _, g1, _, g2, g2_bias, t1, _, t2, t2_bias, down, up = weights
        x, y, new = map(_flat, (h, s, s if state is None else state))
        d_out, d_state = map(_flat, gradients)
        G, R = 0 if g1 is None else len(g1), 0 if d_out is None or down is None else len(down)
        N, D = x.shape
        d_h, d_s = torch.empty_like(x), torch.empty_like(y)
        d_small = torch.empty(N * (2 * G + R), dtype=torch.float32, device=h.device)
        tiles, strips = _cdiv(N, TILE["BN"]), _cdiv(D, TILE["BD"])
        shares = max(1, min(tiles, 2 * _processors(h.device) // strips))
        sizes = [D * G] * 4 + [D] * 2 + [D * R] * 2
        d_weights = torch.empty(shares, sum(sizes), dtype=torch.float32, device=h.device)
        options = {**_sizes(D, G, R), **_precision(ctx.activation, s.dtype), **TILE}
        with torch.cuda.device_of(h):
            kernels.rows_backward[(tiles,)](
                x, y, d_out, d_state, d_h, d_s, norm, g1, g2, g2_bias, t1, t2, t2_bias, down, up,
                *masks, buffer, d_small, N, ctx.alpha, **options, num_stages=3,
            )  # fmt: skip
            kernels.columns_backward[(strips, shares)](
                x, y, new, d_out, d_state, norm, g2, g2_bias, t2, t2_bias, down,
                masks.transform, masks.delta, buffer, d_small, d_weights, N,
                _cdiv(tiles, shares) * TILE["BN"], ctx.alpha, **options, num_stages=2,
            )  # fmt: skip
        total = d_weights[0] if shares == 1 else d_weights.sum(0)
        d_g1, d_t1, d_g2, d_t2, d_g2_bias, d_t2_bias, d_down, d_up = total.split(sizes)
        d_tensors: list[Tensor | None] = [None] * 10
        if G:
            d_a, d_b = d_small[: 2 * N * G].view(2, N, G).sum(1)
            d_norm, d_norm_bias, d_g1, d_t1 = _norm_backward(weights, d_a, d_b, d_g1.view(G, D), d_t1.view(G, D))
            d_tensors = [d_norm, d_norm_bias, d_g1, d_a, d_g2, d_g2_bias, d_t1, d_b, d_t2, d_t2_bias]
        d_tensors += [d_down, d_up] if R else [None, None]
        pairs = zip(d_tensors, weights, strict=True)
        d_weights = [None if d is None or w is None else d.view(w.shape).to(w.dtype) for d, w in pairs]
        return d_h.view(h.shape), d_s.view(s.shape), None, None, *d_weights


def _norm_backward(
    weights: list[Tensor], d_a: Tensor, d_b: Tensor, d_g1: Tensor, d_t1: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return the gradients of the norm's weight and bias, and of both in-projections.

    Args:
        weights: the tensors of `Boundary.weights`.
        d_a: (G,), summed over the rows: the gradient of the gate's inner bias.
        d_b: (G,), the same of the transform.
        d_g1: (G, D), the gradient of the gate's in-projection if the norm had neither weight nor bias.
        d_t1: (G, D), the same of the transform.
    """
    norm, norm_bias, g1, t1 = weights[0], weights[1], weights[2].float(), weights[6].float()
    if norm is None:
        return None, None, d_g1, d_t1
    d_norm, d_norm_bias = (g1 * d_g1 + t1 * d_t1).sum(0), d_a @ g1 + d_b @ t1
    return d_norm, d_norm_bias, torch.outer(d_a, norm_bias) + d_g1 * norm, torch.outer(d_b, norm_bias) + d_t1 * norm


@functools.cache
def _processors(device: torch.device) -> int:
    """Return how many programs run at once; 8 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
