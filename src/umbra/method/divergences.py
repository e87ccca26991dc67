"""Divergences between a teacher's and a student's next-token distributions.

    forward   KL(p ‖ q) = Σ p · (log p − log q)     mean-seeking: the student covers every mode of the teacher
    reverse   KL(q ‖ p)                             mode-seeking: the student concentrates on the teacher's main modes
    js        ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = ½ (p + q)

p and q are softmax(z / τ). If only the teacher's k most likely tokens are known, all other tokens count as one: p and q then
have k + 1 entries, and differences among the other tokens are ignored.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from umbra.method.kernels.head_loss import Head

KINDS = ("forward", "reverse", "js")
CHUNK = 2**24  # logits per chunk
MIN_OTHERS = 1e-12  # probability of all other tokens: below it a difference from 1 has no digits left


class Teacher(NamedTuple):
    """A teacher's distributions.

    Attributes:
        log_p: (N, V); or (N, k), of the k most likely tokens.
        tokens: (N, k), those tokens; None for the whole vocabulary.
    """

    log_p: Tensor
    tokens: Tensor | None = None


def teacher_log_probs(logits: Tensor, temperature: float, top_k: int | None) -> Teacher:
    """Return the distributions of logits (N, V), restricted to the ``top_k`` most likely tokens if given."""
    log_p = F.log_softmax(logits.float() / temperature, -1)
    return Teacher(log_p) if top_k is None else Teacher(*log_p.topk(min(top_k, log_p.shape[-1])))


def divergence(logits: Tensor, teacher: Teacher, kind: str, temperature: float) -> Tensor:
    """Return Σ over the rows of τ² · D(p, q).

    Args:
        logits: (N, V), the student's.
        teacher: p.
        kind: one of `KINDS`.
        temperature: τ.
    """
    log_q, log_p = F.log_softmax(logits.float() / temperature, -1), teacher.log_p
    if teacher.tokens is not None:
        log_p, log_q = _with_others(log_p), _with_others(log_q.gather(-1, teacher.tokens))
    if kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        total = 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))
    else:
        total = _kl(log_p, log_q) if kind == "forward" else _kl(log_q, log_p)
    return temperature**2 * total


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def _with_others(log_p: Tensor) -> Tensor:
    """(N, k) → (N, k + 1): append the probability of all other tokens."""
    others = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=MIN_OTHERS)
    return torch.cat([log_p, others.log()], -1)


def linear_divergence(
    x: Tensor, head: Head, teacher: Callable[[slice], Teacher], kind: str, temperature: float
) -> Tensor:  # fmt: skip
    """Return `divergence` of a head's logits, a chunk of rows at a time; the backward recomputes the logits.

    Args:
        x: (N, D), the input of the head.
        head: the student's head.
        teacher: returns the distributions of a slice of the rows.
        kind: one of `KINDS`.
        temperature: τ.
    """

    def of_chunk(rows: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = teacher(part)
        return divergence(head.logits(rows), target, kind, temperature)

    total, size = x.new_zeros(()), max(1, CHUNK // head.weight.shape[0])
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        total = total + cast(Tensor, checkpoint(of_chunk, x[part], part, use_reentrant=False))
    return total
