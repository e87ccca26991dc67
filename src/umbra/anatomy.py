"""Where things are in other people's models: the only room that knows foreign attribute names.

A change that wants ``if model_type == …`` is data for this file.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, StaticLayer
from transformers.configuration_utils import get_head_shapes
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from . import dense
from .errors import BaseModelError, ConfigError
from .families import (
    ATTENTION_TYPES,
    BEFORE_HEAD,
    BLOCK_COUNTS,
    CLASSIFIER_NAMES,
    COMPUTED,
    DIVIDED_STATES,
    EMBEDDING_WIDTH,
    ENCODER,
    EXPERT_COUNTS,
    INTERMEDIATE_NAMES,
    LAYER_INDICES,
    LOGIT_DIVISORS,
    LOGIT_FACTORS,
    MULTIPLYING_DIVISORS,
    OTHER_INPUTS,
    PER_LAYER,
    SCALING_TOWERS,
    SOFT_CAPS,
    TEXT_TWINS,
    UNFIT,
)


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


def is_causal(config: PretrainedConfig) -> bool:
    """Whether no position sees what follows it: neither an encoder nor an encoder-decoder."""
    return refusal(config.model_type) != ENCODER and not config.is_encoder_decoder


def refusal(model_type: str) -> str | None:
    """Why no model of this type can carry a shadow; None where it can."""
    return UNFIT.get(model_type)


def _num_blocks(config: PretrainedConfig) -> int:
    return next(getattr(config, name) for name in BLOCK_COUNTS if hasattr(config, name))


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


def device_of(module: Any) -> torch.device:
    """Where a module with a weight computes: between calls, accelerate keeps offloaded weights on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    one: Any
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if module.weight.is_meta and device is not None:
            return torch.device(device)
    return module.weight.device


def is_cheap_to_mirror(config: PretrainedConfig) -> bool:
    """Whether one block of this architecture is a plain dense attention block.

    Not with experts, recurrence, inputs of its own per layer, or the cross-attention of an encoder-decoder's half.
    """
    parts = (config, getattr(config, "ffn_config", None))
    has_experts = any((getattr(part, n, None) or 0) > 1 for part in parts for n in EXPERT_COUNTS)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    reads_more = getattr(config, "hidden_size_per_layer_input", None) or any(hasattr(config, n) for n in OTHER_INPUTS)
    is_plain = not (has_experts and getattr(config, "is_moe", True)) and not config.is_heterogeneous
    return is_plain and not reads_more and layer_types <= ATTENTION_TYPES


def composite_config(base_config: PretrainedConfig, shadows: dict[int, PretrainedConfig]) -> PretrainedConfig:
    """The base's configuration with more layers, so that a cache built from it holds the shadows' keys too.

    Args:
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
    """The configuration with a text part whose layers can be set, where its class computes them from other fields."""
    text = config.get_text_config(decoder=True)
    if not any(isinstance(getattr(type(text), name, None), property) for name in COMPUTED):
        return config
    plain = PretrainedConfig()
    plain.__dict__.update(text.__dict__)
    plain.model_type = text.model_type  # type: ignore[misc]
    for name in (*COMPUTED, *text.attribute_map):
        if hasattr(text, name):
            setattr(plain, name, copy.deepcopy(getattr(text, name)))
    if text is config:
        return plain
    name = next(name for name, value in config.__dict__.items() if value is text)
    setattr(config, name, plain)
    return config


def lay_out(config: PretrainedConfig, layers: PretrainedConfig) -> None:
    """Give a configuration the layers of another one, and leave the rest of it alone."""
    target, source = config.get_text_config(decoder=True), layers.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "layer_types", "sliding_window", "kv_sharing_modes"):
        if name in source.__dict__ or name in source.attribute_map:
            setattr(target, name, getattr(source, name))


def unquantised(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that does not say that its model is quantised."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        for mark in ("quantization_config", "_is_quantized"):
            part.__dict__.pop(mark, None)
    return config


def shares_masks(base: PreTrainedModel, shadow: PreTrainedModel) -> bool:
    """Whether an attention mask that was prepared for the base's layers also fits the shadow's."""
    return type(base) is type(shadow) and window(base.config) == window(shadow.config)


def layer_types(config: PretrainedConfig) -> list[str]:
    """The attention type of each layer, as the caches of transformers name them."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return list(given)
    depth = getattr(config, "decoder_layers", config.num_hidden_layers)
    return ["sliding_attention" if window(config) is not None else "full_attention"] * depth


def cache_depth(base: Anatomy) -> int:
    """How many layers a cache of the base has, and so the first that is free for a shadow."""
    return len(layer_types(base.config))


def mirror_config(base: PretrainedConfig, sizes: dict[str, int]) -> PretrainedConfig:
    """The configuration of a smaller model of the base's architecture.

    Args:
        sizes: num_hidden_layers, and any of hidden_size, intermediate_size, num_attention_heads,
            num_key_value_heads, head_dim.

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
            _set_depth(config, value)
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
    """Whether attention is divided by the number of its layer (an option of GPT-2)."""
    return bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))


def _set_depth(config: PretrainedConfig, depth: int) -> None:
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [*values, *[values[-1]] * depth][:depth])
    if hasattr(config, "attention_types"):  # GPT-Neo's attention_layers in short
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = depth
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, depth)


def dense_config(base: Any, sizes: dict[str, int]) -> PretrainedConfig:
    """A Llama configuration of the base's sizes, for bases whose block is not one to mirror.

    Gemma 3's where the base soft-caps its logits, since a detached Llama could not.
    """
    from transformers import Gemma3TextConfig, LlamaConfig

    base = base.per_layer_config[0]
    hidden = sizes.get("hidden_size") or base.hidden_size
    heads: int = sizes.get("num_attention_heads", getattr(base, "num_attention_heads", None) or max(1, hidden // 64))
    cap, depth = soft_cap(base), sizes["num_hidden_layers"]
    head_dim = sizes.get("head_dim", getattr(base, "head_dim", None))
    capped: dict[str, Any] = {
        "final_logit_softcapping": cap,
        "layer_types": ["full_attention"] * depth,
        "sliding_window": window(base) or getattr(base, "max_position_embeddings", 2048),
        "query_pre_attn_scalar": head_dim or hidden // heads,
        "rope_parameters": None,
    }
    inner = getattr(base, "intermediate_size", None) or 4 * hidden
    kind: Any = LlamaConfig if cap is None else Gemma3TextConfig
    config = kind(
        vocab_size=base.vocab_size,
        hidden_size=hidden,
        intermediate_size=sizes.get("intermediate_size", inner[0] if isinstance(inner, list) else inner),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=sizes.get("num_key_value_heads", getattr(base, "num_key_value_heads", None) or heads),
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=getattr(base, "max_position_embeddings", 2048),
        rms_norm_eps=getattr(base, "rms_norm_eps", None) or 1e-6,
        pad_token_id=base.pad_token_id,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        tie_word_embeddings=False,
        **({"rope_parameters": _plain_rope(base)} if cap is None else capped),
    )
    config._attn_implementation = base._attn_implementation
    _check_heads(config)
    return config


def _plain_rope(base: PretrainedConfig) -> dict[str, Any] | None:
    """θ of the base where its rotary positions are the plain ones (on text, those of three axes are); else None."""
    rope = getattr(base, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        return None
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}


def text_twin(config: PretrainedConfig) -> PretrainedConfig:
    """A text tower's configuration as that of a language model: of its own family, or of the one that it is on text alone."""
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


def copy_blocks(source: Anatomy, backbone: PreTrainedModel) -> None:
    """Start the shadow from the base's first blocks and its final norm.

    Raises:
        ConfigError: the shadow's shapes differ from the base's.
    """
    modules, origin = dict(source.decoder.named_modules()), source.decoder.state_dict()
    for key, value in backbone.state_dict().items():
        if not value.is_floating_point():
            continue
        found, (owner, _, name) = origin.get(key), key.rpartition(".")
        module = modules.get(owner)
        if name == "weight" and dense.is_packed_linear(module):
            found = dense.linear_weight(module, source.model.dtype)
            found = found if isinstance(backbone.get_submodule(owner), nn.Linear) else found.T  # GPT-2's Conv1D
        elif name == "weight" and isinstance(module, nn.Embedding):
            found = embedding_rows(module)
        if found is None or found.shape != value.shape:
            raise ConfigError(
                f"init='base' copies blocks of the base, but {key} does not fit: the shadow has {tuple(value.shape)}, the "
                f"base {'no such tensor' if found is None else tuple(found.shape)}. Leave the shadow's sizes alone."
            )
        value.copy_(found)


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
    if looks_up and not dense.is_packed(table):
        return table.weight.detach() if tokens is None else table.weight[tokens.to(table.weight.device)]
    tokens = torch.arange(vocabulary_size(table)) if tokens is None else tokens
    return table(tokens.to(table.weight.device)) / embedding_scale(table)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the model's forward takes and returns its cache."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def own_cache(model: PreTrainedModel, composite: PretrainedConfig) -> Any:
    """An empty cache of the model's own class with a place for every layer of ``composite``; None for nearly all models."""
    if model.config.model_type != "minimax":
        return None
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class ReorderedCache(MiniMaxCache):
        """With its linear states following the beams, which transformers leaves where they were (until 5.23 at least)."""

        def reorder_cache(self, beam_idx: Any) -> None:
            super().reorder_cache(beam_idx)
            states: Any = self.linear_cache
            self.linear_cache: Any = [
                s if s is None or isinstance(s, list) else s[beam_idx.to(s.device)] for s in states
            ]

    cache: Any = ReorderedCache()
    cache.linear_cache = [None if kind == "linear_attention" else [] for kind in layer_types(composite)]
    return cache


def cache_layers(cache: Any) -> int | None:
    """How many layers a cache was built for; None where it grows on demand."""
    return None if getattr(cache, "layer_class_to_replicate", None) is not None else len(getattr(cache, "layers", ()))


def cached_tokens(layers: list[Any]) -> Any:
    """How many tokens these layers of a cache hold; None where nothing tells, a tensor where one would have to wait."""
    return next((layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")), None)


def is_cache_in_use(layers: list[Any]) -> bool:
    """Whether these layers of a cache have been filled, if only in an earlier use."""
    return any(layer.is_initialized for layer in layers if hasattr(layer, "get_seq_length"))


def head_shape(config: PretrainedConfig) -> Any:
    """Number and width of the heads of keys and values; lists where layers differ."""
    return get_head_shapes(config.get_text_config(decoder=True))


def window(config: PretrainedConfig) -> int | None:
    """The width of the sliding windows, if there are any."""
    return getattr(config.get_text_config(decoder=True), "sliding_window", None)


def forget(model: PreTrainedModel, cache: Any) -> None:
    """Start a sequence without what an earlier one left behind.

    RecurrentGemma keeps the state of its recurrence on its modules, with its graph, instead of in the cache (until 5.23 at
    least): a second training step would go back through the first.
    """
    if model.config.model_type != "recurrent_gemma" or (cache is not None and cache.get_seq_length() > 0):
        return
    for module in model.modules():
        if hasattr(module, "recurrent_states"):
            module.recurrent_states = None  # type: ignore[assignment]


def hide_others(cache: Any, blocks: int, mine: range) -> Any:
    """The same cache for one of several shadows, which is not to measure the past by layers that another has filled."""
    if cache is None or cache_layers(cache) is None:
        return cache
    view = copy.copy(cache)
    view.layers = [layer if l < blocks or l in mine else DummyLayer() for l, layer in enumerate(cache.layers)]
    return view


def is_measured_by_shadow(cache: Any, blocks: int) -> bool:
    """Whether transformers would read from the shadow's layers how long the past of the base's own attention is.

    It takes the first layer of full attention for that, and static layers that also hold a recurrent state for none
    (until 5.23 at least); the shadow has then read the step's tokens already, the base not yet.
    """
    full = [not any(kinds) for kinds in zip(cache.is_sliding, cache.is_linear, cache.is_dummy, strict=True)]
    hidden = [
        isinstance(layer, StaticLayer) and linear for layer, linear in zip(cache.layers, cache.is_linear, strict=True)
    ]
    return any(hidden[:blocks]) and not any(full[:blocks])


def logits_to_keep(config: PretrainedConfig, kept: Any, length: int) -> Any:
    """How a forward over ``length`` tokens is told which logits to compute, so that its blocks still see every token.

    Gemma 4 drops the other rows before its last blocks where ``kept`` is a number, not where it is a tensor of places.
    """
    if isinstance(kept, int) and kept and getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        return torch.arange(max(length - kept, 0), length)
    return kept


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


def soft_cap(config: PretrainedConfig) -> float | None:
    """c where a language-model head is followed by c · tanh(logits / c)."""
    text = config.get_text_config(decoder=True)
    if text is not config and config.model_type not in SCALING_TOWERS:
        return None
    return next((c for n in SOFT_CAPS if (c := getattr(text, n, None)) is not None), None)


def set_soft_cap(config: PretrainedConfig, cap: float | None) -> None:
    """Let a language model cap its logits at ``cap``, where its class can."""
    for name in SOFT_CAPS:
        if hasattr(config, name):
            setattr(config, name, cap)


def logit_factor(config: PretrainedConfig) -> float:
    """What a language-model head's logits are multiplied by after it, 1 for nearly all."""
    text, factor = config.get_text_config(decoder=True), 1.0
    if text is not config and config.model_type not in SCALING_TOWERS:
        return factor
    for name in LOGIT_FACTORS:
        factor *= getattr(text, name, None) or 1.0
    for name in LOGIT_DIVISORS:
        value = getattr(text, name, 1.0)
        factor *= value if text.model_type in MULTIPLYING_DIVISORS else 1 / value
    return factor


def before_head(model: Any) -> nn.Module | None:
    """What stands between the decoder's states and the head; None for nearly all."""
    for path in BEFORE_HEAD.get(model.config.model_type, ()):
        module = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            return module
    return None


def head_input(model: PreTrainedModel, states: Tensor) -> Tensor:
    """(…, D) as the decoder's blocks have it → what the head reads, (…, D) for nearly all."""
    between: Any = before_head(model)
    if between is not None:
        return between(states.to(next(between.parameters()).dtype))
    divides = model.config.model_type in DIVIDED_STATES and model.can_generate()
    return states * logit_factor(model.config) if divides else states


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model can decode with a cache."""
    return hasattr(model.config.get_text_config(decoder=True), "use_cache")


def states_width(config: PretrainedConfig) -> int:
    """The width of the states that a decoder gives."""
    return getattr(config, EMBEDDING_WIDTH, config.hidden_size)


def announce(causal_lm: type, classifier: type) -> None:
    """Enter our classes where transformers looks a class up by name: Trainer before it shifts labels for label
    smoothing (of an unknown class it would not, and train every token to predict itself), pipelines before they warn.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["umbra"] = causal_lm.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["umbra"] = classifier.__name__


def exempt_from_checkpointing(blocks: Iterable[Any]) -> None:
    """Switch gradient checkpointing off for these blocks."""
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing = False
