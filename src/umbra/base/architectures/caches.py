"""Caches of transformers: which one a base uses, what its layers hold, and how to remove tokens."""

import copy
import inspect
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
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

# Layers that hold every token, and layers that hold what a window or a convolution needs, or more while they record.
PLAIN_LAYERS = (DynamicLayer, DynamicIndexedLayer, StaticLayer, DummyLayer)
RECORDING_LAYERS = (DynamicSlidingWindowLayer, LinearAttentionLayer)

Layers = Sequence[Any]  # of a cache: transformers' mixins have no common type with all methods that are used here


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the cache among the arguments and outputs of the model's forward."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def own_cache(model: PreTrainedModel, composite: PretrainedConfig) -> Cache | None:
    """Return an empty cache for a model that has its own cache class; None for most models.

    Args:
        model: the base.
        composite: the configuration of base and shadows; the cache has a place for each layer.
    """
    if model.config.model_type != "minimax":
        return None
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class ReorderedCache(MiniMaxCache):
        """MiniMaxCache with linear states that follow the beams; in transformers (5.23) they stay where they were."""

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            states = vars(self)["linear_cache"]
            vars(self)["linear_cache"] = [
                s if s is None or isinstance(s, list) else s[beam_idx.to(s.device)] for s in states
            ]

    cache = ReorderedCache()
    vars(cache)["linear_cache"] = [None if kind == "linear_attention" else [] for kind in layer_types(composite)]
    return cache


def cache_layers(cache: object) -> int | None:
    """Return the number of layers that a cache was built for; None where it grows on demand."""
    return None if getattr(cache, "layer_class_to_replicate", None) is not None else len(getattr(cache, "layers", ()))


def cached_tokens(layers: Layers) -> int | Tensor | None:
    """Return the number of tokens that these layers of a cache hold.

    Returns:
        None where no layer counts them; a tensor where reading it may wait for the device.
    """
    return next((layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")), None)


def is_cache_in_use(layers: Layers) -> bool:
    """Return whether these layers of a cache have been filled, also in an earlier use."""
    return any(layer.is_initialized for layer in layers if hasattr(layer, "get_seq_length"))


def has_recurrent_state(layers: Layers) -> bool | None:
    """Return whether these layers of a cache hold a recurrent state; None where none of them can."""
    states = [any(layer.has_previous_state.values()) for layer in layers if isinstance(layer, LinearAttentionLayer)]
    return any(states) if states else None


def reset_recurrent_state(model: PreTrainedModel, cache: Cache | None) -> None:
    """Delete recurrent states that an earlier sequence left on the model's modules.

    RecurrentGemma stores them, with their autograd graph, on its modules instead of in the cache (transformers 5.23): a
    second training step would backpropagate through the first.

    Args:
        model: the base.
        cache: of the new sequence; states stay where it already holds tokens.
    """
    if model.config.model_type != "recurrent_gemma" or (cache is not None and cache.get_seq_length() > 0):
        return
    for module in model.modules():
        if hasattr(module, "recurrent_states"):
            setattr(module, "recurrent_states", None)  # noqa: B010


def view_without_others(cache: Cache | None, blocks: int, layers: Container[int]) -> Any:
    """Return a view of a cache without other shadows' layers, from which transformers could read the number of tokens.

    Args:
        cache: the shared cache.
        blocks: L, the number of the base's layers.
        layers: of the shadows that the view is for.
    """
    if cache is None or cache_layers(cache) is None:
        return cache
    view = copy.copy(cache)
    view.layers = [layer if l < blocks or l in layers else DummyLayer() for l, layer in enumerate(cache.layers)]
    return view


def drop_inactive_windows(cache: Cache | None, blocks: int, layers: Container[int]) -> None:
    """Remove inactive shadows' window layers from a new cache: assisted decoding crops all, and cannot crop empty ones.

    Args:
        cache: changed in place.
        blocks: L, the number of the base's layers.
        layers: of the active shadows.
    """
    if type(cache) is DynamicCache and cache_layers(cache) is not None:
        for l, layer in enumerate(cache.layers):
            if l >= blocks and l not in layers and isinstance(layer, DynamicSlidingWindowLayer):
                cache.layers[l] = DummyLayer()


def ahead(cache: Cache, layers: range) -> Cache:
    """Return a view of a cache for a shadow that runs ahead of the base: only its layers count the tokens.

    Args:
        cache: the shared cache.
        layers: of the shadow.
    """
    view = copy.copy(cache)
    view.layers = [cache.layers[l if l in layers else layers.start] for l in range(layers.stop)]
    return view


def rollback_obstacle(model: PreTrainedModel, cache: Cache) -> str | None:
    """Return why the last tokens cannot be removed from this cache of the model; None where `roll_back` can."""
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


def removal_obstacle(model: PreTrainedModel, cache: Cache) -> str | None:
    """Return why the last token cannot be removed from a cache that did not record its past; None where `roll_back` can."""
    forgotten = any(
        isinstance(layer, LinearAttentionLayer)
        or (isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window)
        for layer in cache.layers
    )
    return "its windows forget what the last token pushed out" if forgotten else rollback_obstacle(model, cache)


def is_empty(cache: Cache) -> bool:
    """Return whether no layer of a cache holds anything."""
    has_tokens = any(bool(cached_tokens([layer])) for layer in cache.layers)
    return not has_tokens and not has_recurrent_state(cache.layers)


def record_past(layers: Layers, on: bool) -> None:
    """Let these layers of a cache retain the tokens that leave their windows, until `roll_back`, or stop that."""
    for layer in layers:
        if isinstance(layer, RECORDING_LAYERS):
            layer.record_past = on


def roll_back(layers: Layers, tokens: int) -> None:
    """Remove the last ``tokens`` from these layers of a cache, and the tokens that they retain beyond their windows."""
    for layer in layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(tokens)
        elif isinstance(layer, LinearAttentionLayer) or layer.is_initialized:
            layer.crop(-tokens)


def is_measured_by_shadow(cache: Cache, blocks: int) -> bool:
    """Return whether transformers would read the length of the base's past from the shadow's layers.

    It reads the first layer of full attention, and does not count static layers that also hold a recurrent state as such
    (transformers 5.23). The shadow has then processed the step's tokens already, the base has not.

    Args:
        cache: the shared cache.
        blocks: L, the number of the base's layers.
    """
    full = [not any(kinds) for kinds in zip(cache.is_sliding, cache.is_linear, cache.is_dummy, strict=True)]
    hidden = [
        isinstance(layer, StaticLayer) and linear for layer, linear in zip(cache.layers, cache.is_linear, strict=True)
    ]
    return any(hidden[:blocks]) and not any(full[:blocks])


def logits_to_keep(config: PretrainedConfig, number: int | Tensor, length: int) -> int | Tensor:
    """Return ``logits_to_keep`` in a form with which the blocks still process every token.

    Gemma 4 drops the other rows before its last blocks where it is a number, but not where it is a tensor of positions.

    Args:
        config: of the base.
        number: of the last logits, or positions (N,).
        length: of the input.
    """
    if isinstance(number, int) and number and getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        return torch.arange(max(length - number, 0), length)
    return number


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether the model can decode with a cache."""
    return hasattr(model.config.get_text_config(decoder=True), "use_cache")
