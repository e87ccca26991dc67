"""A head and its losses in one operation, a chunk of rows at a time: no (N, V) tensor is ever stored.

    z = f · x · Wᵀ + b;  z ← c · tanh(z / c) where capped
    CE = Σ logsumexp(z) − z[target]          KL = Σ p_teacher · (log p_teacher − log p),  p = softmax(z)

The forward also computes the gradients of x, and of W and b if they are trained, so that the backward only scales them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.method.kernels.first_order import Context, first_order
from umbra.method.kernels.products import product

CHUNK = 2**24  # logits at once: 64 MB in fp32
TINY = 1e-30  # a probability below it has lost digits that its logarithm would need


class Head(NamedTuple):
    """A language-model head as plain tensors.

    Attributes:
        weight: (V, D).
        bias: (V,).
        factor: multiplies the logits.
        cap: bounds them by c · tanh(z / c); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0
    cap: float | None = None

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) → (N, V), in float32 unless the weight is float64."""
        z = product(x.to(self.weight.dtype), self.weight, self.bias)
        z = z if z.dtype == torch.float64 else z.float()
        z = z if self.factor == 1 else z.mul_(self.factor)
        return z if self.cap is None else z.div_(self.cap).tanh_() * self.cap


def linear_loss(
    x: Tensor, head: Head, targets: Tensor, teacher: tuple[Tensor, Head] | None = None
) -> tuple[Tensor, Tensor]:
    """Return CE and KL, summed over the rows; KL is 0 without a teacher.

    Args:
        x: (N, D), the input of the head.
        head: the student's head.
        targets: (N,).
        teacher: rows (N, D) and their head; no gradient reaches them.
    """
    return _LinearLoss.apply(x, head, targets, teacher, head.weight, head.bias)


class _LossContext(Context):
    kinds: int  # 1 for CE alone, 2 for CE and KL
    parts: tuple[bool, bool, bool]  # whether the gradients of x, W and b were computed


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LossContext, x: Tensor, head: Head, targets: Tensor, teacher: tuple[Tensor, Head] | None, weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Compute both sums, and the gradients [of CE, of KL] of x (N, D), W (V, D) and b (V,)."""
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        kinds = 1 if teacher is None else 2
        d_x = [torch.empty_like(x) for _ in range(kinds)] if needs_x else []
        d_weight = [torch.zeros_like(weight) for _ in range(kinds)] if needs_weight else []
        d_bias = [torch.zeros_like(bias) for _ in range(kinds)] if needs_weight and bias is not None else []
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        sums = [x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)]
        rows = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            p, ce, slope, log_p = _softmax(x[part], head, target, needs_log=teacher is not None)
            sums[0] += ce
            toward = [p]
            if teacher is not None and log_p is not None:
                q = F.log_softmax(teacher[1].logits(teacher[0][part].detach()), -1)
                p_teacher = q.exp()
                sums[1] += (p_teacher * q.sub_(log_p)).sum()
                toward.append(p - p_teacher)
            if not needs_x and not needs_weight:
                continue
            p.scatter_add_(-1, target, -torch.ones_like(target, dtype=p.dtype))
            for kind, d in enumerate(toward):
                d = d if slope is None else d * slope
                d = (d if head.factor == 1 else d * head.factor).to(weight.dtype)
                if needs_x:
                    d_x[kind][part] = product(d, weight.T).to(x.dtype)
                if needs_weight:
                    d_weight[kind].addmm_(d.T, x[part].to(d.dtype))
                if d_bias:
                    d_bias[kind] += d.sum(0)
        ctx.kinds, ctx.parts = kinds, (bool(d_x), bool(d_weight), bool(d_bias))
        ctx.save_for_backward(*d_x, *d_weight, *d_bias)
        return sums[0], sums[1]

    @staticmethod
    @first_order
    def backward(ctx: _LossContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_ce, of_kl = gradients
        saved = iter(ctx.saved_tensors)
        scaled: list[Tensor | None] = []
        for is_computed in ctx.parts:
            parts = [next(saved) for _ in range(ctx.kinds)] if is_computed else []
            total = parts[0] * of_ce.to(parts[0].dtype) if parts else None
            if total is not None and len(parts) > 1:
                total = total.add_(parts[1] * of_kl.to(total.dtype))
            scaled.append(total)
        return scaled[0], None, None, None, scaled[1], scaled[2]


def _softmax(
    x: Tensor, head: Head, target: Tensor, needs_log: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return p (N, V), Σ CE, the slope of the cap (N, V) if there is one, and log p if it is needed."""
    z = head.logits(x)
    slope = None if head.cap is None else (z / head.cap).square_().neg_().add_(1)
    if needs_log or z.device.type != "cpu":
        log_p = F.log_softmax(z, -1)
        return log_p.exp(), -log_p.gather(-1, target).sum(), slope, log_p
    p = torch.softmax(z, -1, out=z)  # in place: each pass over memory costs a tenth of the whole
    at_target = p.gather(-1, target)
    loss = -at_target.log()
    tiny = (at_target < TINY).squeeze(-1).nonzero().squeeze(-1)
    if len(tiny):
        loss[tiny] = -F.log_softmax(head.logits(x[tiny]), -1).gather(-1, target[tiny])
    return p, loss.sum(), slope, None
