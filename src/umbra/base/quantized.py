"""Quantised layers: their weights as plain tensors, whatever library has packed them.

    W · e_j + b = layer(e_j)

A packed layer is asked instead of unpacked, so that bitsandbytes, torchao, HQQ, quanto, GPTQ and what comes after them
need no code of their own.
"""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn


def is_plain(weight: Any) -> bool:
    """Whether this is a floating-point tensor that can be read as it lies: no packed, sharded or meta one."""
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
        return False
    return weight.is_floating_point() and weight.element_size() > 1


def is_packed(module: Any) -> bool:
    """Whether the weight of this linear layer or embedding table is quantised, whole and on a device."""
    from torch.distributed.tensor import DTensor

    weight = getattr(module, "weight", None)
    if is_plain(weight) or isinstance(weight, DTensor):
        return False
    return all(t.numel() and not t.is_meta for t in _tensors(module))


def is_packed_linear(module: Any) -> bool:
    """Whether this is a quantised linear layer."""
    return isinstance(getattr(module, "in_features", None), int) and is_packed(module)


def _tensors(layer: nn.Module) -> list[Tensor]:
    return list(itertools.chain(layer.parameters(), layer.buffers()))


@torch.no_grad()
def columns(layer: Any, places: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, out): the columns of a linear layer's weight at ``places`` (N,), computed in ``dtype``."""
    one_hot = torch.zeros(len(places), layer.in_features, dtype=dtype).scatter_(1, places[:, None], 1.0)
    repacking = keep_unpacked(layer)
    bias, layer.bias = layer.bias, None  # subtracted afterwards, a large one would take the weight's digits with it
    try:
        return layer(one_hot.to(_tensors(layer)[0].device))
    finally:
        layer.bias = bias
        allow_repacking(repacking)


def linear_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """(out, in): a linear layer's weight as a plain tensor, without a gradient; its own storage where that is plain."""
    if not is_packed(layer):
        return layer.weight.detach()
    return columns(layer, torch.arange(layer.in_features), dtype).T


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """A copy of a module of the base. A hook on it would bring along a copy of all that it knows: the whole base."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return copy.deepcopy(module, {id(hook): type(hook)() for hook in hooks})


def trainable_copy(head: Any, dtype: torch.dtype) -> nn.Module:
    """A head of the same weights that can be trained: a packed one becomes a plain linear layer."""
    if not is_packed(head):
        return copy_without_hooks(head).requires_grad_()
    weight = linear_weight(head, dtype)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None, device=weight.device, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if head.bias is not None:
            plain.bias.copy_(head.bias)
    return plain


def keep_unpacked(model: nn.Module) -> list[Any]:
    """Stop bitsandbytes from repacking 4-bit weights for the CPU; gives the layers that it would have done so with.

    On CPUs with AVX512-BF16 its first evaluation repacks each weight for a kernel without a backward: in a later training
    step, gradients end silently at every linear layer. And ``state_dict()`` then unpacks the scales in the wrong order
    (bitsandbytes 0.50.2).
    """
    layers: list[Any] = [m for m in model.modules() if m.__dict__.get("support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            _unpack(layer.weight)
    return layers


def allow_repacking(layers: list[Any]) -> None:
    """The inverse of `keep_unpacked`."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True


def _unpack(weight: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    weight.quant_state.original_nested = False  # quantising the scales again would change them
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    weight.quant_state.absmax = scales
