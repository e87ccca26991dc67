"""Cross-entropy and divergence of the two heads: from logits, or from the rows that the heads would read.

Both kernels compute the same sums. They multiply and divide in different orders, which recorded runs rely on to the bit.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import token_loss


class Share(NamedTuple):
    """What a sum over sampled rows is multiplied by, and divided by."""

    factor: int
    divisor: Tensor | int


class HeadKernel(Protocol):
    """The losses of N attached rows and n shadow rows."""

    def task(self, targets: Tensor, count: Tensor | int) -> Tensor:
        """Return Σ CE / count over the attached rows, for targets (N,)."""
        ...

    def shadow(self, targets: Tensor, share: Share) -> Tensor:
        """Return factor · Σ CE / count over the shadow's rows, for targets (n,)."""
        ...

    def shadow_and_divergence(
        self, targets: Tensor, teachers: Tensor, has_all: bool, share: Share
    ) -> tuple[Tensor, Tensor]:
        """Return `shadow`, and Σ KL(attached ‖ shadow) over the shadow's rows that have a teacher.

        Args:
            targets: (n,).
            teachers: (n,), for each shadow row the number of its attached row; -1 for none.
            has_all: whether every row has a teacher.
            share: of the CE.
        """
        ...


@dataclass
class LogitsKernel:
    """The losses from logits.

    Args:
        attached: (N, V); None if the shadow runs alone.
        shadow_logits: (n, V).
    """

    attached: Tensor | None
    shadow_logits: Tensor

    def task(self, targets: Tensor, count: Tensor | int) -> Tensor:
        """Return Σ CE / count: see `HeadKernel`."""
        assert self.attached is not None
        return token_loss(self.attached, targets, count)

    def shadow(self, targets: Tensor, share: Share) -> Tensor:
        """Return factor · Σ CE / count: see `HeadKernel`."""
        return share.factor * token_loss(self.shadow_logits, targets, share.divisor)

    def shadow_and_divergence(
        self, targets: Tensor, teachers: Tensor, has_all: bool, share: Share
    ) -> tuple[Tensor, Tensor]:
        """Return the shadow's CE and Σ KL: see `HeadKernel`."""
        assert self.attached is not None
        cross_entropy, student = self.shadow(targets, share), self.shadow_logits
        wide = torch.promote_types(student.dtype, torch.float32)
        if not has_all:
            student, teachers = student[(teachers >= 0).to(student.device)], teachers[teachers >= 0]
        teacher = self.attached.detach()[teachers.to(self.attached.device)]
        log_p, log_q = F.log_softmax(teacher, -1, dtype=wide), F.log_softmax(student, -1, dtype=wide)
        return cross_entropy, F.kl_div(log_q, log_p, log_target=True, reduction="sum")


@dataclass
class ChunkedKernel:
    """The losses without logits: `linear_loss` computes them a chunk of rows at a time.

    Args:
        heads: of the attached path and of the shadow.
        rows: (N, D), the attached path's; None if the shadow runs alone.
        states: (n, D), the shadow's, on the same device; None if only the task's loss is computed.
    """

    heads: tuple[Head, Head]
    rows: Tensor | None
    states: Tensor | None

    def task(self, targets: Tensor, count: Tensor | int) -> Tensor:
        """Return Σ CE / count: see `HeadKernel`."""
        assert self.rows is not None
        return linear_loss(self.rows, self.heads[0], targets.to(self.rows.device))[0] / count

    def shadow(self, targets: Tensor, share: Share) -> Tensor:
        """Return factor · Σ CE / count: see `HeadKernel`."""
        assert self.states is not None
        return share.factor * linear_loss(self.states, self.heads[1], targets.to(self.states.device))[0] / share.divisor

    def shadow_and_divergence(
        self, targets: Tensor, teachers: Tensor, has_all: bool, share: Share
    ) -> tuple[Tensor, Tensor]:
        """Return the shadow's CE and Σ KL: see `HeadKernel`."""
        assert self.rows is not None and self.states is not None
        (attached, head), states = self.heads, self.states
        targets, teachers = targets.to(states.device), teachers.to(states.device)
        untaught: Tensor | float = 0.0
        if not has_all:
            untaught = linear_loss(states[teachers < 0], head, targets[teachers < 0])[0]
            taught = teachers >= 0
            states, targets, teachers = states[taught], targets[taught], teachers[taught]
        cross_entropy, divergence = linear_loss(states, head, targets, (self.rows.detach()[teachers], attached))
        return share.factor * (cross_entropy + untaught) / share.divisor, divergence
