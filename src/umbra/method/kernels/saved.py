"""What autograd need not keep of the frozen base, because it is quickly computed again.

A gated feed-forward multiplies act(gate) with up: autograd keeps gate, act(gate) and up, the three widest tensors of a block,
though the second follows from the first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


class Again(NamedTuple):
    """In place of an activation's output: its node of autograd, one of `AGAIN`, which keeps the input."""

    node: Any

    def give_back(self) -> Tensor:
        """The output, bit for bit."""
        return AGAIN[self.node.name()](self.node)


class Kept(NamedTuple):
    """Any other tensor, apart from its graph: a node that kept its own output would otherwise keep itself alive."""

    tensor: Tensor
    version: int

    def give_back(self) -> Tensor:
        """The tensor; a RuntimeError, as autograd's own, where it was changed meanwhile."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"One of the tensors needed for the backward, of shape {tuple(self.tensor.shape)}, was modified in place: it "
                f"is at version {self.tensor._version}, expected {self.version}."
            )
        return self.tensor


def sparing() -> AbstractContextManager[Any]:
    """A context in which forwards keep no outputs of activations; nothing where somebody else sees to what is kept."""
    hooks_are_set = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
    if not torch.is_grad_enabled() or hooks_are_set:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_keep, lambda kept: kept.give_back())


def _keep(x: Tensor) -> Again | Kept:
    node = x.grad_fn
    return Again(node) if node is not None and node.name() in AGAIN else Kept(x.detach(), x._version)
