"""The key-value cache that base and shadows share.

It is a cache of transformers with L + S layers: the base's L layers come first, the layers of each shadow follow.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from umbra.base import architectures
from umbra.errors import StateError

INTERRUPTED = "A forward that wrote to this cache was interrupted: some of its layers hold tokens that others lack."
_interrupted: WeakSet[Cache] = WeakSet()


@contextmanager
def invalidate_on_error(cache: Cache | None) -> Iterator[None]:
    """A context for work that updates a cache: where it raises, the cache cannot be used again until it is emptied."""
    with ExitStack() as on_error:
        if cache is not None:
            on_error.callback(_interrupted.add, cache)
        yield
        on_error.pop_all()


def is_interrupted(cache: Cache) -> bool:
    """Return whether an update of this cache failed and the cache has not been emptied since."""
    if cache not in _interrupted:
        return False
    if architectures.is_empty(cache):
        _interrupted.discard(cache)
    return cache in _interrupted


def check_not_interrupted(cache: Cache) -> None:
    """Raise a StateError for a cache whose last update failed."""
    if is_interrupted(cache):
        raise StateError(f"{INTERRUPTED} Start with a fresh cache, or reset() it.")


def remove_last_token(model: PreTrainedModel, cache: Cache, length: int) -> None:
    """Remove the last token from a cache that holds the whole prompt: generation computes at least one token.

    A generation that a logits processor ended leaves such a cache. A cache with fewer tokens stays unchanged.

    Args:
        model: the base.
        cache: the shared cache.
        length: of the prompt, in tokens.

    Raises:
        StateError: the cache holds more tokens than the prompt, or cannot drop one.
    """
    cached = int(architectures.cached_tokens(cache.layers) or 0)
    if cached < length or not length:
        return
    reason = f"the input has {length}" if cached > length else architectures.removal_obstacle(model, cache)
    if reason is not None:
        raise StateError(
            f"The cache holds {cached} tokens, and a generation continues from the last token that it does not hold, but "
            f"{reason}. Pass the text that it holds and at least one token more, or start with a fresh cache."
        )
    with invalidate_on_error(cache):
        architectures.roll_back(
            [layer for layer in cache.layers if int(architectures.cached_tokens([layer]) or 0) == cached], 1
        )


def check_shared(cache: Cache, base: PretrainedConfig, shadows: Sequence[range]) -> None:
    """Check that base and shadows can continue from a cache together.

    Args:
        cache: the shared cache.
        base: the base's configuration.
        shadows: the layers of each participating shadow; empty for the bare base.

    Raises:
        StateError: too few layers, a shadow's layers hold other tokens than the base's, or a forward was interrupted.
    """
    L, built = _depth(base), architectures.cache_layers(cache)
    needed = max([L, *[layers.stop for layers in shadows]])  # torch.compile does not support default=
    if built is not None and built < needed:
        raise StateError(
            f"The cache ({type(cache).__name__}) has {built} layers, base and shadow need {needed}: build it from this "
            "model's config, not from the base's."
        )
    if torch.compiler.is_compiling():
        return
    check_not_interrupted(cache)
    if not shadows:
        _check_bare(cache, L)
    for layers in shadows:
        if _differ(cache.layers[:L], cache.layers[layers.start : layers.stop]):
            raise StateError(
                "The cache holds other tokens for the base than for the shadow: it was filled by the bare base or with "
                "another adapter, or a forward was interrupted. Start with a fresh cache."
            )


def _differ(base: list[Any], shadow: list[Any]) -> bool:
    """Return whether the base's layers and a shadow's hold different numbers of tokens, as far as that can be read."""
    base_tokens, shadow_tokens = architectures.cached_tokens(base), architectures.cached_tokens(shadow)
    synchronizes = _is_on_device(base_tokens) or _is_on_device(shadow_tokens)  # a read would wait at every token
    if base_tokens is not None:
        if synchronizes:
            return architectures.is_cache_in_use(shadow) != architectures.is_cache_in_use(base)
        return bool((shadow_tokens or 0) != base_tokens)
    # A recurrent base counts no tokens.
    started = None if synchronizes else architectures.has_recurrent_state(base)
    if started is None:
        return False
    return started != bool(architectures.has_recurrent_state(shadow) if shadow_tokens is None else shadow_tokens)


def _is_on_device(tokens: object) -> bool:
    return isinstance(tokens, Tensor) and tokens.device.type != "cpu"


def check_bare(cache: Cache | None, base: PretrainedConfig) -> None:
    """Check that the bare base can continue from a cache.

    Raises:
        StateError: a shadow's layers are in use, or a forward was interrupted.
    """
    if cache is not None and architectures.cache_layers(cache) != 0:
        check_not_interrupted(cache)
        _check_bare(cache, _depth(base))


def _check_bare(cache: Cache, L: int) -> None:
    tokens = [architectures.cached_tokens([layer]) for layer in cache.layers[L:]]
    if any(bool(count) for count in tokens):
        raise StateError(
            "The cache was filled with the adapter enabled; the bare base would go on without the shadow's layers, and "
            "leave them behind. Use another cache for the bare base."
        )


def _depth(config: PretrainedConfig) -> int:
    return len(architectures.layer_types(config.get_text_config(decoder=True)))
