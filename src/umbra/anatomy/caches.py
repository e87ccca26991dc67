"""What a base does with a cache, and what a cache tells of itself."""

import copy
import inspect
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, StaticLayer

from .configs import layer_types


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


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model can decode with a cache."""
    return hasattr(model.config.get_text_config(decoder=True), "use_cache")
