"""Where things are in other people's models: the only room that knows foreign attribute names.

A change that wants ``if model_type == …`` is data for this file.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import BaseModelError, ConfigError

CLASSIFIER_NAMES = ("score", "classifier")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


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
    kind = model.config.model_type
    if not is_causal(model.config):
        raise BaseModelError(
            f"{name} ({kind}) is encoder-only; a shadow rides beside a causal decoder, "
            "such as Llama, Qwen3, Gemma 3, Mistral or GPT-2."
        )
    text_config = model.config.get_text_config(decoder=True)
    block_name, blocks = _find_blocks(model, text_config.num_hidden_layers)
    decoder = model.get_submodule(block_name.rpartition(".")[0])
    head_name, head = _find_head(model)
    if not isinstance(decoder, PreTrainedModel) or decoder is model:
        raise BaseModelError(
            f"{name} has no task head around its decoder: load the base with AutoModelForCausalLM "
            "or AutoModelForSequenceClassification."
        )
    return Anatomy(model, decoder, blocks, head, head_name, is_classifier=model.get_output_embeddings() is None)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether no position sees what follows it: neither an encoder nor an encoder-decoder."""
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return not encoder and not config.is_encoder_decoder


def _find_blocks(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
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


def vocabulary_size(module: Any) -> int:
    """Rows of an embedding table."""
    return module.weight.shape[0]


def device_of(module: Any) -> torch.device:
    """Where a module with a weight computes: between calls, accelerate keeps offloaded weights on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    one: Any
    for one in getattr(hook, "hooks", (hook,)):
        if module.weight.is_meta and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return module.weight.device


def is_cheap_to_mirror(config: PretrainedConfig) -> bool:
    """Whether one block of this architecture is a plain dense attention block (no experts, no recurrence)."""
    has_experts = any((getattr(config, n, None) or 0) > 1 for n in EXPERT_COUNTS)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not has_experts and layer_types <= ATTENTION_TYPES


def composite_config(base_config: PretrainedConfig, shadows: dict[int, PretrainedConfig]) -> PretrainedConfig:
    """The base's configuration with more layers, so that a cache built from it holds the shadows' keys too.

    Args:
        shadows: the configuration of each shadow by its first layer in the cache, L or more.
    """
    config = copy.deepcopy(base_config)
    text = config.get_text_config(decoder=True)
    types = layer_types(text)
    for first, shadow in sorted(shadows.items()):
        types += ["full_attention"] * (first - len(types)) + layer_types(shadow)
    windows = [w for w in map(_window, (text, *shadows.values())) if w is not None]
    text.num_hidden_layers = len(types)
    if any(t != types[0] for t in types) or getattr(text, "layer_types", None) is not None:
        text.layer_types = types
    if windows:
        text.sliding_window = max(windows)  # of the cache's layers; the masks of either model narrow it to its own
    return config


def lay_out(config: PretrainedConfig, layers: PretrainedConfig) -> None:
    """Give a configuration the layers of another one, and leave the rest of it alone."""
    target, source = config.get_text_config(decoder=True), layers.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "layer_types", "sliding_window"):
        if name in source.__dict__ or name in source.attribute_map:
            setattr(target, name, getattr(source, name))


def shares_masks(base: PreTrainedModel, shadow: PreTrainedModel) -> bool:
    """Whether an attention mask that was prepared for the base's layers also fits the shadow's."""
    return type(base) is type(shadow) and _window(base.config) == _window(shadow.config)


def _window(config: PretrainedConfig) -> int | None:
    return getattr(config, "sliding_window", None)


def layer_types(config: PretrainedConfig) -> list[str]:
    """The attention type of each layer, as the caches of transformers name them."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return list(given)
    return ["sliding_attention" if _window(config) is not None else "full_attention"] * config.num_hidden_layers


def mirror_config(base: PretrainedConfig, sizes: dict[str, int]) -> PretrainedConfig:
    """The configuration of a smaller model of the base's architecture.

    Args:
        sizes: num_hidden_layers, and any of hidden_size, intermediate_size, num_attention_heads,
            num_key_value_heads, head_dim.

    Raises:
        ConfigError: a size that this architecture does not have, or sizes that do not fit together.
    """
    config = copy.deepcopy(base)
    for name, value in sizes.items():
        names = INTERMEDIATE_NAMES if name == "intermediate_size" else (name,)
        target = next((n for n in names if n in config.attribute_map or hasattr(config, n)), None)
        if target is None:
            raise ConfigError(f"shadow_{name}={value}: {config.model_type} has no {name}; leave it out.")
        if target == "num_hidden_layers":
            _set_depth(config, value)
        else:
            setattr(config, target, value)
    # With a layer index shifted behind the base's, this GPT-2 option would scale the shadow by the wrong depth.
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        config.scale_attn_by_inverse_layer_idx = False
    _check_heads(config)
    config.use_cache = True
    return config


def _set_depth(config: PretrainedConfig, depth: int) -> None:
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [*types, *[types[-1]] * depth][:depth]
    config.num_hidden_layers = depth
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, depth)


def dense_config(base: Any, sizes: dict[str, int]) -> PretrainedConfig:
    """A Llama configuration of the base's sizes, for bases whose block is not one to mirror."""
    from transformers import LlamaConfig

    hidden = sizes.get("hidden_size") or base.hidden_size
    heads: int = sizes.get("num_attention_heads", getattr(base, "num_attention_heads", None) or max(1, hidden // 64))
    rope = getattr(base, "rope_parameters", None)
    config = LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=hidden,
        intermediate_size=sizes.get("intermediate_size", getattr(base, "intermediate_size", None) or 4 * hidden),
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=sizes.get("num_key_value_heads", getattr(base, "num_key_value_heads", None) or heads),
        head_dim=sizes.get("head_dim", getattr(base, "head_dim", None)),
        max_position_embeddings=base.max_position_embeddings,
        rms_norm_eps=getattr(base, "rms_norm_eps", 1e-6),
        rope_parameters=copy.deepcopy(rope) if rope and rope.get("rope_type") == "default" else None,
        pad_token_id=base.pad_token_id,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        tie_word_embeddings=False,
    )
    config._attn_implementation = base._attn_implementation
    _check_heads(config)
    return config


def _check_heads(config: PretrainedConfig) -> None:
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise ConfigError(
            f"shadow_num_attention_heads={heads} is no multiple of shadow_num_key_value_heads={kv_heads}."
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ConfigError(
            f"shadow_hidden_size={config.hidden_size} is no multiple of shadow_num_attention_heads={heads}."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None)
    if rope and head_dim % 2 and rope.get("partial_rotary_factor", 1) == 1:
        raise ConfigError(f"shadow_head_dim={head_dim} is odd: rotary positions turn pairs of values.")


def shift_layer_indices(backbone: nn.Module, offset: int) -> None:
    """Give the shadow's attention layers the cache slots behind the base's."""
    module: Any
    for module in backbone.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx += offset


def remove_embeddings(backbone: PreTrainedModel) -> None:
    """Take the input embeddings out of a backbone that is fed ``inputs_embeds``, whatever they are called."""
    table = backbone.get_input_embeddings()
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, None)


def copy_blocks(source: Anatomy, backbone: PreTrainedModel) -> None:
    """Start the shadow from the base's first blocks and its final norm.

    Raises:
        ConfigError: the shadow's shapes differ from the base's.
    """
    target = {k: v for k, v in backbone.state_dict().items() if v.is_floating_point()}
    origin = source.decoder.state_dict()
    for key, value in target.items():
        if key not in origin or origin[key].shape != value.shape:
            raise ConfigError(
                f"init='base' copies blocks of the base, but {key} does not fit: the shadow has {tuple(value.shape)}, the "
                f"base {tuple(origin[key].shape) if key in origin else 'no such tensor'}. Leave the shadow's sizes alone."
            )
        value.copy_(origin[key])


def embedding_scale(table: nn.Module) -> float:
    """What an embedding module multiplies its rows by (Gemma's √D), 1 for nearly all."""
    scale = getattr(table, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


def cache_layers(cache: Any) -> int | None:
    """How many layers a cache was built for; None where it grows on demand."""
    return None if getattr(cache, "layer_class_to_replicate", None) is not None else len(cache.layers)


def problem_type(config: PretrainedConfig, labels: Any) -> str:
    """Which classification loss applies, by the rule of transformers where the configuration is silent."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def pad_token_id(config: PretrainedConfig) -> int | None:
    """The padding token of a (text) configuration."""
    return config.get_text_config().pad_token_id


def caps_logits(config: PretrainedConfig) -> bool:
    """Whether a language-model head is followed by soft-capping or scaling that only its own class applies."""
    text = config.get_text_config(decoder=True)
    capped = getattr(text, "final_logit_softcapping", None) is not None
    return capped or any(getattr(text, n, 1.0) != 1.0 for n in ("logit_scale", "logits_scaling"))


def exempt_from_checkpointing(blocks: Iterable[Any]) -> None:
    """Switch gradient checkpointing off for these blocks."""
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing = False
