"""Adapt transformers' generation to a base and shadows that share one key-value cache.

`ShadowForCausalLM` overrides methods of transformers' `GenerationMixin`; each override delegates to a function of this
module. Every decoding step uses the base's own input preparation, so that the peculiarities of its architecture hold.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from umbra.base import architectures, private_transformers
from umbra.errors import BaseModelError, ConfigError, StateError
from umbra.generation.caches import check_not_interrupted, invalidate_on_error, remove_last_token
from umbra.generation.paging import check_pages
from umbra.shadow.network import Shadow

# Arguments of generate() that some architectures pass on to the forward.
GENERATE_ARGUMENTS = ("tokenizer", "assistant_tokenizer", "next_sequence_length", "is_first_iteration")
SHADOW_MASK = "shadow_attention_mask"  # (B, T) or None: the padding, where the base receives masks of its own form


def prepare_inputs(
    base: PreTrainedModel, cache_argument: str, pass_padding: bool, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments of one decoding step, prepared by the base's own method.

    Args:
        base: the base model.
        cache_argument: the base's name for ``past_key_values``.
        pass_padding: whether to add the padding as `SHADOW_MASK`. The base may prepare masks ahead of the forward (for a
            static cache) or drop them; a shadow of another architecture cannot read those.
        args: positional arguments of ``prepare_inputs_for_generation``.
        kwargs: its keyword arguments.
    """
    padding = kwargs.get("attention_mask")
    if "past_key_values" in kwargs:
        kwargs[cache_argument] = kwargs.pop("past_key_values")
    prepared = cast(Any, base).prepare_inputs_for_generation(*args, **kwargs)
    prepared["past_key_values"] = prepared.pop(cache_argument, None)
    for name in GENERATE_ARGUMENTS:
        prepared.pop(name, None)
    if pass_padding:
        prepared[SHADOW_MASK] = padding
    return prepared


def arguments_of_base(forward: Callable[..., object], model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the ``model_kwargs`` that ``forward`` does not name, which the base has to validate (images among them)."""
    names = inspect.signature(forward).parameters
    return {k: v for k, v in model_kwargs.items() if k not in names}


def check_batch_options(adapter_names: object, options: dict[str, Any]) -> None:
    """Reject options of ``generate_batch`` that transformers would drop silently.

    Raises:
        ConfigError: ``adapter_names`` or ``draft`` were given.
    """
    if adapter_names is not None:
        raise ConfigError("generate_batch() runs one adapter: set_adapter(…) it, or generate(adapter_names=…).")
    if options.get("draft") is not None:
        raise ConfigError("generate_batch() does not draft: generate(draft=…), or leave draft out.")


def check_continuous_batching(base: PreTrainedModel, shadows: Iterable[Shadow], is_disabled: bool) -> None:
    """Check that base and shadows can share the pages of continuous batching.

    Raises:
        BaseModelError: a shadow's key-value heads or its window differ in size from the base's.
        StateError: the adapter is disabled, which holds for this thread but not for the batching thread.
    """
    if is_disabled:
        raise StateError("disable_adapter() holds for one thread, continuous batching runs in another: unload().")
    for shadow in shadows:
        check_pages(base.config, shadow.backbone.config)


def check_guidance(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise a ConfigError for classifier-free guidance together with ``adapter_names``."""
    if model_kwargs.get("adapter_names") is not None and config.guidance_scale not in (None, 1):
        raise ConfigError(
            "guidance_scale would apply the active adapter to every row: set_adapter(…) it, and leave adapter_names out."
        )


def use_own_cache_class(
    base: PreTrainedModel, composite: PretrainedConfig, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Put an empty cache into ``model_kwargs`` for a base that defines its own cache class.

    Args:
        base: the base model.
        composite: the configuration of base and shadows, with a layer for each of theirs.
        config: of this call.
        model_kwargs: changed in place; a cache that is in it already stays.

    Raises:
        StateError: another cache implementation was requested.
    """
    cache = architectures.own_cache(base, composite)
    if cache is None or config.use_cache is False:
        return
    if config.cache_implementation not in (None, "dynamic"):
        raise StateError(
            f"{type(base).__name__} has a cache class of its own: leave "
            f"cache_implementation={config.cache_implementation!r} out."
        )
    model_kwargs.setdefault("past_key_values", cache)


def prepare_past(
    base: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    is_disabled: bool,
) -> None:
    """Leave at least one token for the prefill where the cache holds the whole prompt.

    Args:
        base: the base model.
        cache: that the caller passed, or a new one.
        input_ids: (B, T).
        config: of this call.
        model_kwargs: of this call.
        is_disabled: whether the bare base runs.

    Raises:
        StateError: the cache cannot be used for this prompt.
    """
    check_not_interrupted(cache)
    mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
    length = input_ids.shape[1] if embeds is None else embeds.shape[1]
    masked = private_transformers.mask_length(config) if mask is None else mask.shape[1]
    if masked == length and not is_disabled:
        remove_last_token(base, cache, length)


@contextmanager
def cache_of(shadows: Sequence[Shadow], cache: Any, blocks: int) -> Iterator[Any]:
    """A context with a view of the cache that holds the layers of the base and of these shadows only.

    transformers reads the number of cached tokens from the first attention layer, which may be another adapter's.

    Args:
        shadows: that take part in this generation.
        cache: the shared cache; it cannot be used again where the work within fails.
        blocks: L.
    """
    layers = [layer for shadow in shadows for layer in shadow.cache_layers]
    with invalidate_on_error(cache):
        yield architectures.view_without_others(cache, blocks, layers)


def has_uniform_layers(base: PreTrainedModel, shadows: Iterable[Shadow], dtypes_agree: bool) -> bool:
    """Return whether all layers of a shared cache have one shape and dtype, so that they can be allocated ahead."""
    configs = [base.config, *(shadow.backbone.config for shadow in shadows)]
    return len({str(architectures.head_shape(config)) for config in configs}) == 1 and dtypes_agree


def check_no_early_exit(config: GenerationConfig) -> None:
    """Raise a BaseModelError for ``assistant_early_exit``, which skips blocks that the shadow corrects."""
    if config.assistant_early_exit is not None:
        raise BaseModelError(
            "assistant_early_exit would leave the base before blocks that the shadow corrects: let the shadow draft, "
            "by assistant_model=model.detached()."
        )
