"""Configurations: of a new shadow for a base, and of the cache that both share."""

import copy
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.configuration_utils import get_head_shapes

from umbra.base.architectures.families import (
    ATTENTION_TYPES,
    COMPUTED,
    EMBEDDING_WIDTH,
    EXPERT_COUNTS,
    FIXED_ROPES,
    INTERMEDIATE_NAMES,
    OTHER_INPUTS,
    PER_LAYER,
    TEXT_TWINS,
)
from umbra.base.architectures.heads import soft_cap
from umbra.base.architectures.parts import Architecture
from umbra.base.private_transformers import use_attention_of
from umbra.errors import ConfigError


def is_cheap_to_mirror(config: PretrainedConfig) -> bool:
    """Return whether a block of this architecture is a plain dense attention block.

    Blocks with experts, recurrence, per-layer inputs or the cross-attention of an encoder-decoder are not.
    """
    parts = (config, getattr(config, "ffn_config", None))
    has_experts = any((getattr(part, n, None) or 0) > 1 for part in parts for n in EXPERT_COUNTS)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    reads_more = getattr(config, "hidden_size_per_layer_input", None) or any(hasattr(config, n) for n in OTHER_INPUTS)
    is_plain = not (has_experts and getattr(config, "is_moe", True)) and not config.is_heterogeneous
    return is_plain and not reads_more and layer_types <= ATTENTION_TYPES


def composite_config(base_config: PretrainedConfig, shadows: dict[int, PretrainedConfig]) -> PretrainedConfig:
    """Return the base's configuration with the shadows' layers added, so that a cache built from it holds their keys too.

    Args:
        base_config: of the base.
        shadows: the configuration of each shadow by its first layer in the cache, L or more.
    """
    config = _with_plain_layers(unquantised(base_config))
    text = config.get_text_config(decoder=True)
    types, sharing = layer_types(text), getattr(text, "kv_sharing_modes", None)
    for first, shadow in sorted(shadows.items()):
        types += ["full_attention"] * (first - len(types)) + layer_types(shadow)
    if sharing is not None:
        text.kv_sharing_modes = [*sharing, *[None] * (len(types) - len(sharing))]
    windows = [w for w in map(window, (text, *shadows.values())) if w is not None]
    text.num_hidden_layers = len(types)
    if windows or any(t != types[0] for t in types) or getattr(text, "layer_types", None) is not None:
        text.layer_types = types
    if windows:
        text.sliding_window = max(windows)  # of the cache's layers; the masks of either model narrow it to its own
    return config


def _with_plain_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration with a text part whose layers can be set, where its class computes them from other fields."""
    text = config.get_text_config(decoder=True)
    if not any(isinstance(getattr(type(text), name, None), property) for name in COMPUTED):
        return config
    plain = PretrainedConfig()
    plain.__dict__.update(text.__dict__)
    vars(plain)["model_type"] = text.model_type
    for name in (*COMPUTED, *text.attribute_map):
        if hasattr(text, name):
            setattr(plain, name, copy.deepcopy(getattr(text, name)))
    if text is config:
        return plain
    name = next(name for name, value in config.__dict__.items() if value is text)
    setattr(config, name, plain)
    return config


def copy_layers(config: PretrainedConfig, layers: PretrainedConfig) -> None:
    """Copy the layers of a configuration to another, and leave its other fields unchanged.

    Args:
        config: changed in place.
        layers: the configuration with those layers.
    """
    target, source = config.get_text_config(decoder=True), layers.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "layer_types", "sliding_window", "kv_sharing_modes"):
        if name in source.__dict__ or name in source.attribute_map:
            setattr(target, name, getattr(source, name))


def unquantised(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy without a quantization configuration."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        for mark in ("quantization_config", "_is_quantized"):
            part.__dict__.pop(mark, None)
    return config


def shares_masks(base: PreTrainedModel, shadow: PreTrainedModel) -> bool:
    """Return whether attention masks prepared for the base's layers also fit the shadow's."""
    return type(base) is type(shadow) and window(base.config) == window(shadow.config)


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return the attention type of each layer, in the vocabulary of transformers' caches."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    depth = getattr(config, "decoder_layers", config.num_hidden_layers)
    return ["sliding_attention" if window(config) is not None else "full_attention"] * depth


def positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that a model supports; None where its configuration has no such field."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return int(most) if most > 0 else None


def image_token_id(config: PretrainedConfig) -> int | None:
    """Return the token that a vision-language model replaces by an image; None for a language model."""
    tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in tokens if isinstance(token, int)), None)


def rotary_limits(config: PretrainedConfig) -> list[tuple[int, bool]] | None:
    """Return the text lengths beyond which the rotary position embeddings of all tokens change, earlier ones included.

    Returns:
        Each length with whether the embeddings are the same for all longer texts (True) or change with every token
        (False); None for an unknown kind of embedding.
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    limits = []
    for rope in [v for v in parameters.values() if isinstance(v, dict)] or [parameters]:
        kind = rope.get("rope_type", rope.get("type")) or "default"
        if kind == "longrope":
            place = rope if "original_max_position_embeddings" in rope else vars(text)
            limits.append((place.get("original_max_position_embeddings") or text.max_position_embeddings, True))
        elif "dynamic" in kind:
            limits.append((text.max_position_embeddings, False))
        elif kind not in FIXED_ROPES:
            return None
    return limits


def cache_depth(base: Architecture) -> int:
    """Return the number of layers of the base's cache, which is the index of a shadow's first layer."""
    return len(layer_types(base.config))


def mirror_config(
    base: PretrainedConfig, sizes: dict[str, int], layers: tuple[int, ...] | None = None
) -> PretrainedConfig:
    """Return the configuration of a smaller model of the base's architecture.

    Args:
        base: the decoder's configuration.
        sizes: num_hidden_layers, and any of hidden_size, intermediate_size, num_attention_heads,
            num_key_value_heads, head_dim.
        layers: the base's layers with the settings of the model's; the first ones by default.

    Raises:
        ConfigError: a size that this architecture does not have, or sizes that do not fit together.
    """
    config = copy.deepcopy(base.per_layer_config[0])
    for name, value in sizes.items():
        names = INTERMEDIATE_NAMES if name == "intermediate_size" else (name,)
        target = next((n for n in names if n in config.attribute_map or hasattr(config, n)), None)
        if target is None:
            raise ConfigError(f"shadow_{name}={value}: {config.model_type} has no {name}; leave it out.")
        if target == "num_hidden_layers":
            _set_depth(config, value, layers)
        else:
            setattr(config, target, value)
    # With a layer index shifted behind the base's, this GPT-2 option would scale the shadow by the wrong depth.
    if scales_by_depth(config):
        config.scale_attn_by_inverse_layer_idx = False
    if hasattr(config, EMBEDDING_WIDTH):
        setattr(config, EMBEDDING_WIDTH, config.hidden_size)
    _check_heads(config)
    config.use_cache = True
    return config


def scales_by_depth(config: PretrainedConfig) -> bool:
    """Return whether attention scores are divided by the layer number (an option of GPT-2)."""
    return bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))


def _set_depth(config: PretrainedConfig, depth: int, layers: tuple[int, ...] | None) -> None:
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            chosen = range(depth) if layers is None else layers
            setattr(config, name, [values[min(l, len(values) - 1)] for l in chosen])
    if hasattr(config, "attention_types"):  # GPT-Neo's attention_layers in short
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = depth
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, depth)


def dense_config(base: PretrainedConfig, sizes: dict[str, int]) -> PretrainedConfig:
    """Return a Llama configuration of the base's sizes, for bases whose blocks cannot be mirrored.

    It is a Gemma 3 configuration where the base soft-caps its logits, which Llama cannot.

    Args:
        base: the decoder's configuration.
        sizes: as for `mirror_config`.
    """
    from transformers import Gemma3TextConfig, LlamaConfig

    base = base.per_layer_config[0]
    hidden = sizes.get("hidden_size") or base.hidden_size
    heads: int = sizes.get("num_attention_heads", getattr(base, "num_attention_heads", None) or max(1, hidden // 64))
    cap, depth = soft_cap(base), sizes["num_hidden_layers"]
    head_dim = sizes.get("head_dim", getattr(base, "head_dim", None))
    inner = getattr(base, "intermediate_size", None) or 4 * hidden
    shared: dict[str, Any] = {
        "vocab_size": base.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": sizes.get("intermediate_size", inner[0] if isinstance(inner, list) else inner),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.get("num_key_value_heads", getattr(base, "num_key_value_heads", None) or heads),
        "head_dim": head_dim or hidden // heads,
        "max_position_embeddings": getattr(base, "max_position_embeddings", 2048),
        "rms_norm_eps": getattr(base, "rms_norm_eps", None) or 1e-6,
        "pad_token_id": base.pad_token_id,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
        "tie_word_embeddings": False,
    }
    if cap is None:
        config = LlamaConfig(**shared, rope_parameters=_plain_rope(base))
    else:
        config = Gemma3TextConfig(
            **shared,
            final_logit_softcapping=cap,
            layer_types=["full_attention"] * depth,
            sliding_window=window(base) or getattr(base, "max_position_embeddings", 2048),
            query_pre_attn_scalar=head_dim or hidden // heads,
            rope_parameters=None,
        )
    use_attention_of(config, base)
    _check_heads(config)
    return config


def _plain_rope(base: PretrainedConfig) -> dict[str, Any] | None:
    """Return the base's θ where its rotary positions are the default ones (on text, three-axis ones are); else None."""
    rope = getattr(base, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        return None
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}


def text_twin(config: PretrainedConfig) -> PretrainedConfig:
    """Return a text tower's configuration as that of a language model of an equivalent architecture."""
    from transformers import AutoConfig

    if config.model_type not in TEXT_TWINS:
        return config
    values = config.to_dict()
    del values["model_type"]
    values["rope_parameters"] = {k: v for k, v in config.rope_parameters.items() if not k.startswith("mrope")}
    return AutoConfig.for_model(TEXT_TWINS[config.model_type], **values)


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


def head_shape(config: PretrainedConfig) -> Any:
    """Return number and width of the key-value heads; lists where layers differ."""
    return get_head_shapes(config.get_text_config(decoder=True))


def window(config: PretrainedConfig) -> int | None:
    """Return the width of the sliding windows, if there are any."""
    return getattr(config.get_text_config(decoder=True), "sliding_window", None)


def states_width(config: PretrainedConfig) -> int:
    """Return the width of a decoder's output."""
    return getattr(config, EMBEDDING_WIDTH, config.hidden_size)
