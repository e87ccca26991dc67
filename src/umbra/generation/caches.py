"""What base and shadow need of a cache.

They share one cache of transformers: its first L layers are the base's, then each shadow has its own. Continuous
batching has pages in place of a cache, all of one shape and dtype, and says by arguments of the forward where they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from umbra.base import architectures
from umbra.errors import BaseModelError, StateError

INTERRUPTED = "A forward that wrote to this cache was interrupted: some of its layers hold tokens that others lack."
_interrupted: "WeakSet[Any]" = WeakSet()


@contextmanager
def undivided(cache: Any) -> Iterator[None]:
    """A context whose work on a cache is done as a whole: where an exception ends it, the next use is refused."""
    try:
        yield
    except BaseException:
        if cache is not None:
            _interrupted.add(cache)
        raise


def is_interrupted(cache: Any) -> bool:
    """Whether work on this cache was broken off, and it was not emptied since."""
    if cache not in _interrupted:
        return False
    if architectures.is_empty(cache):
        _interrupted.discard(cache)
    return cache in _interrupted


def check_undivided(cache: Any) -> None:
    """Refuse a cache on which work was broken off.

    Raises:
        StateError: see `undivided`.
    """
    if is_interrupted(cache):
        raise StateError(f"{INTERRUPTED} Start with a fresh cache, or reset() it.")


def take_back_last(model: Any, cache: Any, length: int) -> None:
    """Let a cache that holds a whole text of ``length`` tokens forget the last, from which a generation goes on.

    A generation that a logits processor ended leaves such a cache. One that holds fewer tokens stays as it is.

    Raises:
        StateError: it holds more tokens, or cannot forget one.
    """
    held = int(architectures.cached_tokens(cache.layers) or 0)
    if held < length or not length:
        return
    reason = f"the input has {length}" if held > length else architectures.cannot_take_back(model, cache)
    if reason is not None:
        raise StateError(
            f"The cache holds {held} tokens, and a generation goes on from the last that it does not hold, but {reason}. Pass "
            "the text that it holds and at least one token more, or start with a fresh cache."
        )
    with undivided(cache):
        architectures.roll_back(
            [layer for layer in cache.layers if int(architectures.cached_tokens([layer]) or 0) == held], 1
        )


def check_shared(cache: Any, base: PretrainedConfig, shadows: Sequence[range]) -> None:
    """Refuse a cache that base and shadows cannot go on from together.

    Args:
        shadows: the layers of each shadow that takes part; none for the bare base.

    Raises:
        StateError: too few layers, a shadow's layers hold other tokens than the base's, or a forward was interrupted.
    """
    L, built = _depth(base), architectures.cache_layers(cache)
    needed = max([L, *[layers.stop for layers in shadows]])  # torch.compile knows no default=
    if built is not None and built < needed:
        raise StateError(
            f"The cache ({type(cache).__name__}) has {built} layers, base and shadow need {needed}: build it from this "
            "model's config, not from the base's."
        )
    if torch.compiler.is_compiling():
        return
    check_undivided(cache)
    if not shadows:
        _check_bare(cache, L)
    held, in_use = architectures.cached_tokens(cache.layers[:L]), architectures.is_cache_in_use(cache.layers[:L])
    for layers in shadows:
        mine = cache.layers[layers.start : layers.stop]
        own = architectures.cached_tokens(mine)
        waits = _is_elsewhere(held) or _is_elsewhere(own)  # for the device, at every token
        if held is not None:
            apart = architectures.is_cache_in_use(mine) != in_use if waits else (own or 0) != held
        else:  # a recurrent base counts no tokens
            started = None if waits else architectures.has_recurrent_state(cache.layers[:L])
            apart = started is not None and started != bool(
                architectures.has_recurrent_state(mine) if own is None else own
            )
        if apart:
            raise StateError(
                "The cache holds other tokens for the base than for the shadow: it was filled by the bare base or with "
                "another adapter, or a forward was interrupted. Start with a fresh cache."
            )


def _is_elsewhere(tokens: Any) -> bool:
    return isinstance(tokens, Tensor) and tokens.device.type != "cpu"


def check_bare(cache: Any, base: PretrainedConfig) -> None:
    """Refuse to let the bare base go on from a cache that a shadow has filled too.

    Raises:
        StateError: a shadow's layers are in use, or a forward was interrupted.
    """
    if cache is not None and architectures.cache_layers(cache) != 0:
        check_undivided(cache)
        _check_bare(cache, _depth(base))


def _check_bare(cache: Any, L: int) -> None:
    held = [architectures.cached_tokens([layer]) for layer in cache.layers[L:]]
    if any(bool(tokens) for tokens in held):
        raise StateError(
            "The cache was filled with the adapter enabled; the bare base would go on without the shadow's layers, and "
            "leave them behind. Use another cache for the bare base."
        )


def _depth(config: PretrainedConfig) -> int:
    return len(architectures.layer_types(config.get_text_config(decoder=True)))


# -- continuous batching -------------------------------------------------------------------------------------------


def check_pages(base: PretrainedConfig, shadow: PretrainedConfig) -> None:
    """Raise a BaseModelError where a shadow's keys and values do not fit the pages that continuous batching makes."""
    for what, size in (
        ("key and value heads (number, width)", architectures.head_shape),
        ("window", architectures.window),
    ):
        ours, theirs = size(shadow), size(base)
        if ours != theirs and None not in (ours, theirs):
            raise BaseModelError(
                f"Continuous batching gives every layer the base's {what}: {theirs}; the shadow has {ours}. Use "
                "generate(), or a shadow with the base's attention sizes."
            )


def for_path(batch: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Of a continuous batch's masks, those of one path's layer types; any other batch as it is.

    Args:
        batch: arguments of a forward.
        config: of the base, or of a shadow's backbone.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, dict) or not isinstance(batch.get("cache"), PagedAttentionCache):
        return batch
    types = set(architectures.layer_types(config.get_text_config(decoder=True)))
    return {**batch, "attention_mask": mask[types.pop()] if len(types) == 1 else mask}


def for_shadow(batch: dict[str, Any], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """As `for_path`, for a shadow of another dtype than the base's, which pages and masks have."""
    pages, batch = batch.get("cache"), for_path(batch, config)
    if not isinstance(pages, PagedAttentionCache):
        return batch
    mask = batch["attention_mask"]
    mask = (
        {k: m.to(dtype) for k, m in mask.items()}
        if isinstance(mask, dict)
        else mask
        if mask is None
        else mask.to(dtype)
    )
    return {**batch, "attention_mask": mask, "cache": CastPages(pages)}


class CastPages(PagedAttentionCache):
    """The pages, for keys and values of any dtype; they are kept in the pages' own.

    Args:
        pages: made by transformers for the base's dtype.
    """

    def __init__(self, pages: PagedAttentionCache):
        self.pages: Any = pages

    @torch.compiler.disable  # type: ignore[misc]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """As its parent; returns the dtypes it is given."""
        dtype = self.pages.dtype
        keys, values = self.pages.update(key_states.to(dtype), value_states.to(dtype), layer_idx, kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)
