"""Modules with a weight matrix: embedding tables and heads, quantized, sharded and offloaded ones included."""

from typing import cast

import torch
from torch import Tensor, nn

from umbra.base import quantized


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of an embedding table or a linear layer, as its library stores it."""
    return cast(Tensor, module.weight)


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear layer, or None where it has none."""
    return getattr(module, "bias", None)


def vocabulary_size(module: nn.Module) -> int:
    """Return the number of rows of an embedding table."""
    return _table_shape(module)[0]


def table_width(module: nn.Module) -> int:
    """Return the number of columns of an embedding table."""
    return _table_shape(module)[1]


def _table_shape(module: nn.Module) -> torch.Size:
    weight = weight_of(module)
    return getattr(weight, "ds_shape", weight.shape)  # of a weight that ZeRO-3 has partitioned


def table_sizes(module: nn.Module) -> tuple[int, int]:
    """Return the number of tokens or classes, and the width, of an embedding table or a head, also a quantized one."""
    for rows, columns in (("num_embeddings", "embedding_dim"), ("out_features", "in_features")):
        if hasattr(module, rows):
            return getattr(module, rows), getattr(module, columns)
    return vocabulary_size(module), table_width(module)


def head_width(head: nn.Module) -> int:
    """Return the number of logits of a head."""
    return table_sizes(head)[0]


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module with a weight computes.

    Between calls, accelerate keeps offloaded weights on the meta device, and the execution device in a hook.
    """
    weight, hook = weight_of(module), getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if weight.is_meta and device is not None:
            return torch.device(device)
    return weight.device


def embedding_scale(table: nn.Module) -> float:
    """Return the factor that an embedding module applies to its rows: √D in Gemma, 1 in most architectures."""
    scale = getattr(table, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


@torch.no_grad()
def embedding_rows(table: nn.Module, tokens: Tensor | None = None) -> Tensor:
    """Return the embeddings (N, D) of tokens, without the module's `embedding_scale`.

    A quantized table, and a module that does more than a lookup, is evaluated.

    Args:
        table: an embedding module.
        tokens: (N,); all tokens by default.
    """
    looks_up = type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")
    weight = weight_of(table)
    if looks_up and not quantized.is_packed(table):
        return weight.detach() if tokens is None else weight[tokens.to(weight.device)]
    tokens = torch.arange(vocabulary_size(table)) if tokens is None else tokens
    return table(tokens.to(weight.device)) / embedding_scale(table)
