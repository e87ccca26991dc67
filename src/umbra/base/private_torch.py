"""Private names of torch that Umbra reads: see `umbra.base.private`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils import _pytree

from umbra.base import private
from umbra.base.private import PrivateName

SUPPORTED = ">=2.11"  # as in pyproject.toml
HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
SAVED_VALUES = ("_saved_self", "_saved_approximate")  # of autograd nodes, which exist once a forward has run
NAMES = (
    *(PrivateName("torch.nn:Module", table, on_instance=True) for table in HOOK_TABLES),
    PrivateName("torch.nn:Module", "_compiled_call_impl"),
    PrivateName("torch.nn.modules.module", "_has_any_global_hook", ()),
    PrivateName("torch.utils._pytree", "tree_map_only"),
    PrivateName("torch.autograd.forward_ad", "_current_level"),
    PrivateName("torch._C", "_are_functorch_transforms_active"),
    PrivateName("torch._C._autograd", "_top_saved_tensors_default_hooks"),
    PrivateName("torch:Tensor", "_version"),
)


def check() -> None:
    """Check the private names of torch.

    Raises:
        ImportError: a name is missing or takes other parameters.
    """
    private.check("torch", SUPPORTED, [name for name in NAMES if not name.on_instance])


def is_compiled_module(module: object) -> bool:
    """Return whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def map_tree(kind: type | tuple[type, ...], function: Callable[[Any], object], tree: Any) -> Any:
    """Return a nested structure with ``function`` applied to the leaves of this type."""
    return _pytree.tree_map_only(kind, function, tree)


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


def forward_hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of a module's forward hooks."""
    return module._forward_hooks, module._forward_pre_hooks


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
    """Return x (…, K) · weightᵀ (K, N) + bias (N,), of shape (…, N), computed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
