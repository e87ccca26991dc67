"""Activations of the frozen base that autograd need not save, because they are cheap to recompute.

A gated feed-forward multiplies act(gate) by up. Autograd saves gate, act(gate) and up, the three widest tensors of a block,
though the second follows from the first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from umbra.base.private_torch import has_saved_tensor_hooks, saved_approximation, saved_input, version

# From an activation's autograd node, which saves the activation's input, to the activation's output.
RECOMPUTE: dict[str, Callable[[Node], Tensor]] = {
    "SiluBackward0": lambda node: F.silu(saved_input(node)),
    "GeluBackward0": lambda node: F.gelu(saved_input(node), approximate=saved_approximation(node)),
}


class Recomputed(NamedTuple):
    """Stands for an activation's output: the autograd node of the activation, one of `RECOMPUTE`."""

    node: Node

    def unpack(self) -> Tensor:
        """Return the output, bit for bit."""
        return RECOMPUTE[self.node.name()](self.node)


class Saved(NamedTuple):
    """Any other tensor, detached from its graph: a node that saved its own output would otherwise keep itself alive."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: if it was modified in place meanwhile, like autograd's own check.
        """
        if version(self.tensor) != self.version:
            raise RuntimeError(
                f"One of the tensors needed for the backward, of shape {tuple(self.tensor.shape)}, was modified in place: it "
                f"is at version {version(self.tensor)}, expected {self.version}."
            )
        return self.tensor


def recompute_activations() -> AbstractContextManager[object]:
    """Return a context in which autograd saves no outputs of activations, and recomputes them in the backward.

    The context does nothing without gradients, or if hooks for saved tensors are set already (activation checkpointing).
    """
    if not torch.is_grad_enabled() or has_saved_tensor_hooks():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, lambda packed: packed.unpack())


def _pack(x: Tensor) -> Recomputed | Saved:
    node = x.grad_fn
    return Recomputed(node) if node is not None and node.name() in RECOMPUTE else Saved(x.detach(), version(x))
