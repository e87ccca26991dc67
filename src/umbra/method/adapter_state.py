"""The state s of one adapter in one forward, in a slot per block boundary; nothing of it lies on a module."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from umbra.base import sharded
from umbra.errors import StateError
from umbra.method import kernels
from umbra.method.core import Couplings


class _Packed(threading.local):
    """Per thread: the couplings that decode with packed weights."""

    def __init__(self) -> None:
        self.weights: dict[Couplings, dict[int, kernels.PackedBoundary]] = {}


_packed = _Packed()


@contextmanager
def packed(couplings: Iterable[Couplings]) -> Iterator[None]:
    """Let this thread decode with packed weights within the context; the weights must not change meanwhile."""
    before = _packed.weights
    _packed.weights = {c: kernels.pack_all(c) for c in couplings if sharded.is_whole(next(c.parameters()))}
    try:
        yield
    finally:
        _packed.weights = before


class AdapterState:
    """The state of one adapter on its way through one forward of the base.

    Args:
        couplings: the adapter's couplings.
        s0: (B, T, D); (N, T, D) if the adapter runs on N rows of the batch.
        rows: (N,), the numbers of these rows; None for all.
    """

    def __init__(self, couplings: Couplings, s0: Tensor, rows: Tensor | None = None):
        self.couplings, self.rows = couplings, rows
        self.slots: dict[int, Tensor] = {couplings.boundaries[0]: s0}
        may_pack = kernels.may_decode_packed(couplings, s0)
        self.packed = (_packed.weights.get(couplings) or None) if may_pack else None
        self.is_readable = (
            self.packed is None and sharded.is_whole(next(couplings.parameters())) and kernels.are_plain(couplings)
        )

    def update_and_inject(self, l: int, h: Tensor) -> Tensor:
        """Run the boundary before block l: update the state, and correct this adapter's rows of h (B, T, D)."""
        boundaries = self.couplings.boundaries
        if l not in boundaries:
            return h
        selected = h if self.rows is None else h[self.rows]
        s = self._slot(l, selected)
        if self.packed is None:
            corrected, s = kernels.update_and_inject(self.couplings, l, selected, s, self.is_readable)
        else:
            corrected, s = kernels.update_and_inject_packed(selected, s, self.packed[l])
        if not torch.is_grad_enabled():
            del self.slots[l]
        if l < boundaries[-1]:
            self.slots[boundaries[boundaries.index(l) + 1]] = s
        return corrected if self.rows is None else h.index_copy(0, self.rows, corrected)

    def _slot(self, l: int, h: Tensor) -> Tensor:
        s = self.slots.get(l)
        if s is None or s.shape != h.shape:
            content = "nothing" if s is None else f"a state of shape {tuple(s.shape)}"
            raise StateError(f"Block {l} has a hidden state of shape {tuple(h.shape)}, but its slot holds {content}.")
        return s
