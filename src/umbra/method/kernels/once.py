"""Gradients that the kernels write by hand, and that are right once: not to be differentiated again."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from umbra.errors import StateError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses ``create_graph=True``.

    torch's once_differentiable raises only where the incoming gradient has a graph, which that of a loss has not; elsewhere
    second derivatives are silently partial.

    Raises:
        StateError: the gradient is to be differentiated.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise StateError(
                "A gradient of a gradient (create_graph=True) was asked for, which the fast kernels cannot give: run the forward "
                "within `with umbra.method.kernels.reference():`, or set UMBRA_KERNELS=reference in the environment."
            )
        return backward(ctx, *gradients)

    return checked
