"""How far a student's next-token distribution is from a teacher's.

    forward   KL(p ‖ q) = Σ p · (log p − log q)     the student covers all that the teacher does
    reverse   KL(q ‖ p)                             the student keeps to what the teacher surely does
    js        ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = ½ (p + q)

p and q are softmax(z / τ). Of a teacher whose k likeliest tokens alone are known, all others count as one: p and q have
then k + 1 entries, and no divergence between those others is seen.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from umbra.method.kernels import Head

KINDS = ("forward", "reverse", "js")
CHUNK = 2**24  # logits at once
LEAST = 1e-12  # of the probability of all others: below it a difference from 1 has no digits left


class Teacher(NamedTuple):
    """log p (N, V), or of the k likeliest ``tokens`` (N, k) their log p (N, k)."""

    log_p: Tensor
    tokens: Tensor | None = None


def teach(logits: Tensor, temperature: float, top_k: int | None) -> Teacher:
    """The distribution that logits (N, V) stand for."""
    log_p = F.log_softmax(logits.float() / temperature, -1)
    return Teacher(log_p) if top_k is None else Teacher(*log_p.topk(min(top_k, log_p.shape[-1])))


def divergence(logits: Tensor, teacher: Teacher, kind: str, temperature: float) -> Tensor:
    """Σ over the rows of τ² · D(p, q), for a student's logits (N, V)."""
    log_q, log_p = F.log_softmax(logits.float() / temperature, -1), teacher.log_p
    if teacher.tokens is not None:
        log_p, log_q = _with_others(log_p), _with_others(log_q.gather(-1, teacher.tokens))
    if kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        found = 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))
    else:
        found = _kl(log_p, log_q) if kind == "forward" else _kl(log_q, log_p)
    return temperature**2 * found


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _with_others(log_p: Tensor) -> Tensor:
    """(N, k) → (N, k + 1): the probability of all other tokens behind them."""
    others = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
    return torch.cat([log_p, others.log()], -1)


def linear_divergence(
    x: Tensor, head: Head, teacher: Callable[[slice], Teacher], kind: str, temperature: float
) -> Tensor:  # fmt: skip
    """`divergence` of the logits that ``head`` gives for x (N, D), a chunk of rows at a time, computed again backward.

    Args:
        teacher: of some of the rows.
    """

    def of(rows: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            told = teacher(part)
        return divergence(head.logits(rows), told, kind, temperature)

    total, size = x.new_zeros(()), max(1, CHUNK // head.weight.shape[0])
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        total = total + checkpoint(of, x[part], part, use_reentrant=False)
    return total
