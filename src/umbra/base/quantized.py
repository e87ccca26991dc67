"""Weights of quantized layers as plain tensors, whatever library has packed them.

    W · e_j + b = layer(e_j)

A packed layer is evaluated instead of unpacked, so that bitsandbytes, torchao, HQQ, quanto, GPTQ and later libraries need
no code of their own.
"""

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from umbra.base import private_torch


def is_plain(weight: object) -> bool:
    """Return whether this is a floating-point tensor whose storage can be read: not packed, sharded or on meta."""
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
        return False
    return weight.is_floating_point() and weight.element_size() > 1


def is_packed(module: nn.Module) -> bool:
    """Return whether the weight of this linear layer or embedding table is quantized, whole and on a device."""
    from torch.distributed.tensor import DTensor

    weight = getattr(module, "weight", None)
    if is_plain(weight) or isinstance(weight, DTensor):
        return False
    return all(t.numel() and not t.is_meta for t in _tensors(module))


def is_packed_linear(module: nn.Module) -> bool:
    """Return whether this is a quantized linear layer."""
    return isinstance(getattr(module, "in_features", None), int) and is_packed(module)


def _tensors(layer: nn.Module) -> list[Tensor]:
    return list(itertools.chain(layer.parameters(), layer.buffers()))


@torch.no_grad()
def columns(layer: nn.Module, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return columns (N, out) of a linear layer's weight.

    Args:
        layer: a linear layer of any quantization library.
        places: (N,), the columns.
        dtype: of the computation.
    """
    linear = cast(Any, layer)
    one_hot = torch.zeros(len(places), linear.in_features, dtype=dtype).scatter_(1, places[:, None], 1.0)
    repacking = keep_unpacked(layer)
    bias, linear.bias = linear.bias, None  # subtracting a large one afterwards would lose digits of the weight
    try:
        return layer(one_hot.to(_tensors(layer)[0].device))
    finally:
        linear.bias = bias
        allow_repacking(repacking)


def linear_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return a linear layer's weight (out, in) as a plain tensor without a gradient; a plain weight shares its storage.

    Args:
        layer: a linear layer of any quantization library.
        dtype: of the computation for a packed weight.
    """
    linear = cast(nn.Linear, layer)
    if not is_packed(layer):
        return linear.weight.detach()
    return columns(layer, torch.arange(linear.in_features), dtype).T


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module without its forward hooks, which refer to the whole base."""
    tables = private_torch.forward_hook_tables(module)
    return copy.deepcopy(module, {id(table): type(table)() for table in tables})


def trainable_copy(head: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a trainable head with the same weights: a plain linear layer in place of a packed one.

    Args:
        head: of the base.
        dtype: for the weights of a packed one.
    """
    if not is_packed(head):
        return copy_without_hooks(head).requires_grad_()
    weight, bias = linear_weight(head, dtype), cast(nn.Linear, head).bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Prevent bitsandbytes from repacking 4-bit weights for the CPU, and unpack those that it has repacked.

    On CPUs with AVX512-BF16 its first evaluation repacks each weight for a kernel without a backward: in a later training
    step, gradients silently end at every linear layer. And ``state_dict()`` then unpacks the scales in the wrong order
    (bitsandbytes 0.50.2).

    Returns:
        The layers that would have been repacked, for `allow_repacking`.
    """
    layers = [m for m in model.modules() if m.__dict__.get("support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.__dict__["support_avx512bf16_for_cpu"] = False
        weight: Any = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            _unpack(weight)
    return layers


def allow_repacking(layers: list[nn.Module]) -> None:
    """Undo `keep_unpacked`."""
    for layer in layers:
        layer.__dict__["support_avx512bf16_for_cpu"] = True


def _unpack(weight: Any) -> None:
    from umbra.base.private_bitsandbytes import unpack_for_cpu

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    weight.quant_state.original_nested = False  # quantizing the scales again would change them
    weight.data, weight.quant_state = unpack_for_cpu(weight.data, weight.quant_state)
    weight.quant_state.absmax = scales
