"""The private parts of torch that the method reads: this module alone names them.

A torch release may change any of them; `check` raises an error that names the missing one, and a test calls it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from umbra.errors import StateError

TESTED = "2.13"  # the release with which these were last checked
HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check() -> None:
    """Raise if this torch lacks a private name that Umbra reads.

    Raises:
        StateError: with the missing name.
    """
    places = [
        (nn_module, "_has_any_global_hook"),
        (forward_ad, "_current_level"),
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C._autograd, "_top_saved_tensors_default_hooks"),  # pyright: ignore[reportAttributeAccessIssue]
        *((nn.Module(), table) for table in HOOK_TABLES),
        (torch.zeros(()), "_version"),
        (torch.nn.functional.silu(torch.zeros(1, requires_grad=True)).grad_fn, "_saved_self"),
        (torch.nn.functional.gelu(torch.zeros(1, requires_grad=True)).grad_fn, "_saved_approximate"),
    ]
    for place, name in places:
        if name not in dir(place):
            raise StateError(
                f"torch {torch.__version__} has no {place!r}.{name}, which Umbra reads (checked with torch {TESTED}): install "
                "that release, or report this error."
            )


def has_global_hook() -> bool:
    """Return whether a hook is registered for all modules of this process."""
    return bool(nn_module._has_any_global_hook())


def hooks_of(module: nn.Module) -> Iterator[object]:
    """Yield the forward and backward hooks of a module."""
    for table in HOOK_TABLES:
        yield from cast(Mapping[int, object], vars(module)[table]).values()


def forward_pre_hooks_of(module: nn.Module) -> Iterator[object]:
    """Yield the hooks that run before a module's forward."""
    yield from module._forward_pre_hooks.values()


def is_transformed() -> bool:
    """Return whether forward-mode differentiation or torch.func is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks for saved tensors are set already."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]


def saved_input(node: torch.autograd.graph.Node) -> Tensor:
    """Return the input that the autograd node of an activation saved."""
    return cast(Any, node)._saved_self


def saved_approximation(node: torch.autograd.graph.Node) -> str:
    """Return the approximation of a GELU, which its autograd node saved."""
    return cast(Any, node)._saved_approximate


def version(tensor: Tensor) -> int:
    """Return how often a tensor was modified in place."""
    return tensor._version


def has_onednn_linear() -> bool:
    """Return whether this torch can multiply by oneDNN directly."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(…, K), (N, K), (N,) → (…, N), multiplied by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
