"""Prepare a shadow's backbone: copy blocks of the base, and adapt its modules to run in parallel with the base."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import quantized
from umbra.base.architectures.families import LAYER_INDICES
from umbra.base.architectures.parts import Architecture, name_of
from umbra.base.architectures.tables import embedding_rows, weight_of
from umbra.errors import ConfigError


def shift_layer_indices(backbone: nn.Module, offset: int) -> None:
    """Move the layers of a shadow by ``offset`` places in the shared cache."""
    for module in backbone.modules():
        for name in LAYER_INDICES:
            index = getattr(module, name, None)
            if isinstance(index, int):
                setattr(module, name, index + offset)


def remove_embeddings(backbone: PreTrainedModel) -> None:
    """Remove the input embeddings, by whatever name, from a backbone that reads ``inputs_embeds``."""
    table = backbone.get_input_embeddings()
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, None)


def copy_blocks(source: Architecture, backbone: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Initialize a shadow with blocks of the base and with its final norm.

    Args:
        source: the base.
        backbone: of the shadow; changed in place.
        layers: the base's block for each block of the shadow.

    Raises:
        ConfigError: the shadow's shapes differ from the base's.
    """
    modules, tensors = dict(source.decoder.named_modules()), source.decoder.state_dict()
    stem = name_of(source.decoder, source.blocks)
    for key, target in backbone.state_dict().items():
        if not target.is_floating_point():
            continue
        number, _, suffix = key.removeprefix(f"{stem}.").partition(".")
        source_key = f"{stem}.{layers[int(number)]}.{suffix}" if key.startswith(f"{stem}.") else key
        parent, _, name = source_key.rpartition(".")
        value, module = tensors.get(source_key), modules.get(parent)
        if name == "weight" and module is not None and quantized.is_packed_linear(module):
            value = quantized.linear_weight(module, source.model.dtype)
            is_linear = isinstance(backbone.get_submodule(key.rpartition(".")[0]), nn.Linear)
            value = value if is_linear else value.T  # GPT-2's Conv1D
        elif name == "weight" and module is source.embeddings:
            value = embedding_rows(source.embeddings)
            if value.shape != target.shape:
                continue  # the table's width differs from the blocks', as in OPT-350m
        if value is None or value.shape != target.shape:
            raise ConfigError(
                f"init='base' copies blocks of the base, but {key} does not fit: the shadow has {tuple(target.shape)}, the "
                f"base {'no such tensor' if value is None else tuple(value.shape)}. Leave the shadow's sizes alone."
            )
        target.copy_(value)


@torch.no_grad()
def scale_final_norm(backbone: PreTrainedModel, factor: float) -> None:
    """Multiply the output of a backbone's final norm, if any, by scaling its weight, or 1 + weight as in Gemma."""
    norms = [m for name, m in backbone.named_children() if "norm" in name or name.startswith("ln_")]
    norm = next((m for m in reversed(norms) if getattr(m, "weight", None) is not None), None)
    if norm is None or factor == 1:
        return
    weight: Tensor = weight_of(norm)
    probe = torch.linspace(-1, 1, weight.numel()).to(weight)
    expected = factor * norm(probe)
    for p in norm.parameters():
        p.mul_(factor)
    if not torch.allclose(norm(probe), expected, rtol=1e-3, atol=1e-5):
        weight.add_(factor - 1)
