"""What a base does with a cache, and what a cache tells of itself."""

import copy
import inspect
from collections.abc import Container
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
)

from umbra.base.architectures.configs import layer_types

# Layers that hold every token, and those that hold what a window or a convolution needs, or more if they are told to.
PLAIN_LAYERS = (DynamicLayer, DynamicIndexedLayer, StaticLayer, DummyLayer)
RECORDING_LAYERS = (DynamicSlidingWindowLayer, LinearAttentionLayer)


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


def has_recurrent_state(layers: list[Any]) -> bool | None:
    """Whether these layers of a cache hold the state of a recurrence; None where none of them could."""
    states = [any(layer.has_previous_state.values()) for layer in layers if isinstance(layer, LinearAttentionLayer)]
    return any(states) if states else None


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


def hide_others(cache: Any, blocks: int, mine: Container[int]) -> Any:
    """The same cache for one or some of several shadows, which are not to measure the past by layers that another has filled."""
    if cache is None or cache_layers(cache) is None:
        return cache
    view = copy.copy(cache)
    view.layers = [layer if l < blocks or l in mine else DummyLayer() for l, layer in enumerate(cache.layers)]
    return view


def leave_out_others(cache: Any, blocks: int, mine: Container[int]) -> None:
    """Take the window layers of shadows without a part out of a new cache: assisted decoding cuts all, and empty ones cannot be."""
    if type(cache) is DynamicCache and cache_layers(cache) is not None:
        for l, layer in enumerate(cache.layers):
            if l >= blocks and l not in mine and isinstance(layer, DynamicSlidingWindowLayer):
                cache.layers[l] = DummyLayer()  # type: ignore[assignment]


def ahead(cache: Any, mine: range) -> Any:
    """The same cache for a shadow that runs ahead of the base, and is to measure the past by its own layers alone."""
    view = copy.copy(cache)
    view.layers = [cache.layers[l if l in mine else mine.start] for l in range(mine.stop)]
    return view


def cannot_go_back(model: PreTrainedModel, cache: Any) -> str | None:
    """Why the last tokens cannot be taken out of this cache of the model again; None where `roll_back` can."""
    recurrent = set(layer_types(model.config.get_text_config(decoder=True))) - {
        "full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "conv", "dummy",
    }  # fmt: skip
    if model._is_stateful or recurrent or model.config.model_type == "minimax":
        return f"{type(model).__name__} has a recurrent state, from which a rejected token cannot be taken out again"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return f"it cannot take rejected tokens out of {'an offloaded' if cache.offloading else 'this kind of'} cache"
    kinds = {type(layer) for layer in cache.layers} - {*PLAIN_LAYERS, *RECORDING_LAYERS}
    if kinds:
        return f"its cache has layers ({kinds.pop().__name__}) that forget what a rejected token pushes out"
    return None


def cannot_take_back(model: PreTrainedModel, cache: Any) -> str | None:
    """Why the last token cannot be taken out of a cache that did not record its past; None where `roll_back` can."""
    forgotten = any(
        isinstance(layer, LinearAttentionLayer)
        or (isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window)
        for layer in cache.layers
    )
    return "its windows forget what the last token pushed out" if forgotten else cannot_go_back(model, cache)


def is_empty(cache: Any) -> bool:
    """Whether no layer of a cache holds anything."""
    held = any(bool(cached_tokens([layer])) for layer in cache.layers)
    return not held and not has_recurrent_state(cache.layers)


def record_past(layers: list[Any], on: bool) -> None:
    """Let these layers of a cache keep what tokens push out of their windows, until `roll_back`."""
    for layer in layers:
        if isinstance(layer, RECORDING_LAYERS):
            layer.record_past = on


def roll_back(layers: list[Any], tokens: int) -> None:
    """Take the last ``tokens`` out of these layers of a cache, and what they still keep beyond their windows."""
    for layer in layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(tokens)
        elif isinstance(layer, LinearAttentionLayer) or layer.is_initialized:
            layer.crop(-tokens)


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


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model can decode with a cache."""
    return hasattr(model.config.get_text_config(decoder=True), "use_cache")
