"""Decoder, blocks, embeddings and head of a base."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from umbra.base import quantized
from umbra.base.architectures.families import (
    BLOCK_COUNTS,
    CLASSIFIER_NAMES,
    ENCODER,
    LAYER_INDICES,
    UNFIT,
    UNPACKED,
    WRAPPERS,
    WRAPPING_PACKAGES,
)
from umbra.errors import BaseModelError, ConfigError


@dataclass
class Anatomy:
    """The parts of a decoder-only model that a shadow is coupled to."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    blocks: nn.ModuleList
    head: Any
    head_name: str
    is_classifier: bool

    @property
    def config(self) -> PretrainedConfig:
        """The decoder's own (text) configuration."""
        return self.decoder.config

    @property
    def embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    @property
    def is_tied(self) -> bool:
        """Whether the head and the embeddings share one weight."""
        return not self.is_classifier and self.head.weight is self.embeddings.weight

    @property
    def merges_embeddings(self) -> bool:
        """Whether the decoder is fed embeddings into which those of images have been put (vision-language models)."""
        return not is_text_only(self.model.config)

    @property
    def stream(self) -> int | None:
        """Which of the N parallel hidden states (N, B, T, D) its blocks work on (AltUp of Gemma 3n); None for one (B, T, D)."""
        return getattr(self.config, "altup_active_idx", None)


def locate(model: nn.Module) -> Anatomy:
    """Find the decoder, its blocks and its task head.

    Raises:
        BaseModelError: not a transformers decoder with a language-model or classification head.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(f"The base must be a transformers PreTrainedModel, got {name}.")
    if model.config.is_encoder_decoder:
        raise BaseModelError(f"{name} is an encoder-decoder; a shadow rides beside a decoder-only model.")
    reason = refusal(model.config.model_type)
    if reason is not None:
        raise BaseModelError(f"{name} ({model.config.model_type}) cannot carry a shadow: {reason}.")
    text_config = model.config.get_text_config(decoder=True)
    block_name, blocks = _find_blocks(model, _num_blocks(text_config))
    decoder = model.get_submodule(block_name.rpartition(".")[0])
    head_name, head = _find_head(model)
    if not isinstance(decoder, PreTrainedModel) or decoder is model:
        raise BaseModelError(
            f"{name} has no task head around its decoder: load the base with AutoModelForCausalLM "
            "or AutoModelForSequenceClassification."
        )
    return Anatomy(model, decoder, blocks, head, head_name, is_classifier=model.get_output_embeddings() is None)


def check_bare(model: Any) -> None:
    """Refuse a model around which, or into which, somebody has put something, with the way out.

    Raises:
        BaseModelError: it is no model as transformers makes it.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    reasons = [
        WRAPPING_PACKAGES.get(kind.__module__.partition(".")[0]) for kind in kinds
    ]  # PEFT has a ShadowModel, too
    reasons += [WRAPPERS.get(kind.__name__) for kind in kinds]
    reason = next(filter(None, reasons), None)
    if reason is None and getattr(model, "_compiled_call_impl", None) is not None:
        reason = WRAPPERS["OptimizedModule"]
    if reason is not None:
        raise BaseModelError(f"{type(model).__name__} cannot be given a shadow as it is: {reason}.")


def is_causal(config: PretrainedConfig) -> bool:
    """Whether no position sees what follows it: neither an encoder nor an encoder-decoder."""
    return refusal(config.model_type) != ENCODER and not config.is_encoder_decoder


def refusal(model_type: str) -> str | None:
    """Why no model of this type can carry a shadow; None where it can."""
    return UNFIT.get(model_type)


def _num_blocks(config: PretrainedConfig) -> int:
    return next(getattr(config, name) for name in BLOCK_COUNTS if hasattr(config, name))


def is_unpacked(config: PretrainedConfig) -> bool:
    """Whether plain weights of this model have been quantised before: of a GGUF file that no kernel of this machine reads."""
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    return method in UNPACKED


def is_text_only(config: PretrainedConfig) -> bool:
    """Whether the model is its text decoder, with no tower for images beside it."""
    return config.get_text_config(decoder=True) is config


def _find_blocks(model: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
    tower = model if is_text_only(model.config) else model.get_decoder()
    inside = set(tower.modules())
    lists = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == num_layers and m in inside
    ]
    if not lists:
        raise BaseModelError(f"{type(model).__name__} has no list of {num_layers} decoder blocks to couple to.")
    return min(lists, key=lambda item: item[0].count("."))


def _find_head(model: PreTrainedModel) -> tuple[str, nn.Module]:
    head = model.get_output_embeddings()
    if head is not None:
        return next(n for n, m in model.named_modules() if m is head), head
    for name in CLASSIFIER_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name, getattr(model, name)
    raise BaseModelError(
        f"{type(model).__name__} has neither a language-model head nor one of {', '.join(CLASSIFIER_NAMES)}: load the "
        "base with AutoModelForCausalLM or AutoModelForSequenceClassification."
    )


def name_of(root: nn.Module, module: nn.Module) -> str:
    """The name of a module within another."""
    return next(name for name, m in root.named_modules() if m is module)


def vocabulary_size(module: Any) -> int:
    """Rows of an embedding table."""
    return _table_shape(module)[0]


def table_width(module: Any) -> int:
    """Columns of an embedding table."""
    return _table_shape(module)[1]


def _table_shape(module: Any) -> torch.Size:
    return getattr(module.weight, "ds_shape", module.weight.shape)  # ZeRO-3 keeps that of a partitioned one beside it


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear layer, or None where it has none."""
    return getattr(module, "bias", None)


def table_sizes(module: Any) -> tuple[int, int]:
    """Tokens or classes, and the width, of an embedding table or a head, packed ones too."""
    for rows, columns in (("num_embeddings", "embedding_dim"), ("out_features", "in_features")):
        if hasattr(module, rows):
            return getattr(module, rows), getattr(module, columns)
    return vocabulary_size(module), table_width(module)


def device_of(module: Any) -> torch.device:
    """Where a module with a weight computes: between calls, accelerate keeps offloaded weights on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    one: Any
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if module.weight.is_meta and device is not None:
            return torch.device(device)
    return module.weight.device


def shift_layer_indices(backbone: nn.Module, offset: int) -> None:
    """Give the shadow's attention layers the cache slots behind the base's."""
    module: Any
    for module in backbone.modules():
        for name in LAYER_INDICES:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + offset)


def remove_embeddings(backbone: PreTrainedModel) -> None:
    """Take the input embeddings out of a backbone that is fed ``inputs_embeds``, whatever they are called."""
    table = backbone.get_input_embeddings()
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, None)


def copy_blocks(source: Anatomy, backbone: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Start the shadow from these blocks of the base and from its final norm.

    Raises:
        ConfigError: the shadow's shapes differ from the base's.
    """
    modules, origin = dict(source.decoder.named_modules()), source.decoder.state_dict()
    stem = name_of(source.decoder, source.blocks)
    for key, value in backbone.state_dict().items():
        if not value.is_floating_point():
            continue
        number, _, rest = key.removeprefix(f"{stem}.").partition(".")
        copied = f"{stem}.{layers[int(number)]}.{rest}" if key.startswith(f"{stem}.") else key
        found, (owner, _, name) = origin.get(copied), copied.rpartition(".")
        module = modules.get(owner)
        if name == "weight" and quantized.is_packed_linear(module):
            found = quantized.linear_weight(module, source.model.dtype)
            mine = backbone.get_submodule(key.rpartition(".")[0])
            found = found if isinstance(mine, nn.Linear) else found.T  # GPT-2's Conv1D
        elif name == "weight" and module is source.embeddings:
            found = embedding_rows(module)
            if found.shape != value.shape:
                continue  # it is another's width that this table has, as OPT-350m's
        if found is None or found.shape != value.shape:
            raise ConfigError(
                f"init='base' copies blocks of the base, but {key} does not fit: the shadow has {tuple(value.shape)}, the "
                f"base {'no such tensor' if found is None else tuple(found.shape)}. Leave the shadow's sizes alone."
            )
        value.copy_(found)


@torch.no_grad()
def scale_final_norm(backbone: PreTrainedModel, factor: float) -> None:
    """Multiply what a backbone's final norm gives, where it has one: by its weight, or by 1 + weight as in Gemma."""
    norms = [m for name, m in backbone.named_children() if "norm" in name or name.startswith("ln_")]
    norm: Any = next((m for m in reversed(norms) if getattr(m, "weight", None) is not None), None)
    if norm is None or factor == 1:
        return
    probe = torch.linspace(-1, 1, norm.weight.numel()).to(norm.weight)
    expected = factor * norm(probe)
    for p in norm.parameters():
        p.mul_(factor)
    if not torch.allclose(norm(probe), expected, rtol=1e-3, atol=1e-5):
        norm.weight.add_(factor - 1)


def embedding_scale(table: nn.Module) -> float:
    """What an embedding module multiplies its rows by (Gemma's √D), 1 for nearly all."""
    scale = getattr(table, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


@torch.no_grad()
def embedding_rows(table: Any, tokens: Tensor | None = None) -> Tensor:
    """(N, D): what an embedding module gives for ``tokens`` (N,), for all by default, but for its `embedding_scale`.

    A quantised table, and one with more behind it than a lookup, is read off.
    """
    looks_up = type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")
    if looks_up and not quantized.is_packed(table):
        return table.weight.detach() if tokens is None else table.weight[tokens.to(table.weight.device)]
    tokens = torch.arange(vocabulary_size(table)) if tokens is None else tokens
    return table(tokens.to(table.weight.device)) / embedding_scale(table)


def announce(causal_lm: type, classifier: type) -> None:
    """Enter our classes where transformers looks a class up by name: Trainer before it shifts labels for label
    smoothing (of an unknown class it would not, and train every token to predict itself), pipelines before they warn.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["umbra"] = causal_lm.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["umbra"] = classifier.__name__


def modes(model: nn.Module) -> dict[str, tuple[bool, bool | None]]:
    """Of each module by name: whether it trains, and whether it checkpoints its activations, if it can."""
    return {n: (m.training, getattr(m, "gradient_checkpointing", None)) for n, m in model.named_modules()}


def restore_modes(model: nn.Module, before: dict[str, tuple[bool, bool | None]]) -> None:
    """Put back what `modes` has told, of the modules that are still there."""
    for name, module in model.named_modules():
        module.training, checkpoints = before.get(name, (module.training, None))
        if checkpoints is not None:
            module.gradient_checkpointing = checkpoints  # type: ignore[assignment]


def accelerators(model: PreTrainedModel) -> set[str]:
    """The devices beside the CPU on which parts of the model lie or compute."""
    devices = {str(p.device) for p in model.parameters()}
    is_offloaded = "meta" in devices  # then the map says where things are brought to compute
    places = (getattr(model, "hf_device_map", None) or {}) if is_offloaded else {}
    devices |= {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places.values()}
    return devices - {"cpu", "disk", "meta"}


def is_placed(model: PreTrainedModel) -> bool:
    """Whether somebody has chosen the model's device, or it cannot be moved."""
    return bool(getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False))


def exempt_from_checkpointing(blocks: Iterable[Any]) -> None:
    """Switch gradient checkpointing off for these blocks."""
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing = False
