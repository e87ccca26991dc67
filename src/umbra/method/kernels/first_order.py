"""Autograd functions whose gradients are written by hand, and are right once: they cannot be differentiated again."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from umbra.errors import StateError

P = ParamSpec("P")
R = TypeVar("R")


class Context(FunctionCtx):
    """The context of a `torch.autograd.Function`, for type checkers; a subclass declares the attributes of one function."""

    saved_tensors: tuple[Tensor, ...]  # None among them where None was saved
    needs_input_grad: tuple[bool, ...]


def first_order(backward: Callable[P, R]) -> Callable[P, R]:
    """Return a backward that refuses ``create_graph=True``.

    torch's once_differentiable raises only if the incoming gradient has a graph, which the gradient of a loss has not; then
    second derivatives would silently be partial.

    Args:
        backward: the ``backward`` of a `torch.autograd.Function`.

    Raises:
        StateError: if the gradient itself is to be differentiated.
    """

    @functools.wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise StateError(
                "A gradient of a gradient (create_graph=True) was requested, which the fast kernels cannot compute: run the "
                "forward within `with umbra.method.kernels.reference():`, or set UMBRA_KERNELS=reference in the environment."
            )
        return backward(*args, **kwargs)

    return checked
