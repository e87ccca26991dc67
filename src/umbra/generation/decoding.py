"""Generating as in transformers, with the base's own preparation of each step and one cache for base and shadow."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from umbra.base import architectures
from umbra.errors import BaseModelError, ConfigError, StateError
from umbra.generation.caches import check_pages, check_undivided, take_back_last, undivided
from umbra.method.adapter_state import packed

# Arguments of generate() itself, which some bases' own preparation passes on to the forward.
OF_GENERATE = ("tokenizer", "assistant_tokenizer", "next_sequence_length", "is_first_iteration")
SHADOW_MASK = "shadow_attention_mask"  # (B, T) or None: the padding, where the base was given masks of its own kind


class Decoding(GenerationMixin):
    """Generating as in transformers, for a ``base`` and shadows whose keys and values lie in one cache."""

    base: Any
    shadow: Any
    adapters: list[str]
    adapter: Any
    _named: Any
    config: PretrainedConfig
    forward: Any
    _attachment: Any
    _cache_argument: str
    _is_disabled: bool

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, *args: Any, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's own preparation, so that its peculiarities hold."""
        if "past_key_values" in kwargs:
            kwargs[self._cache_argument] = kwargs.pop("past_key_values")
        prepared = self.base.prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        prepared["past_key_values"] = prepared.pop(self._cache_argument, None)
        for name in OF_GENERATE:
            prepared.pop(name, None)
        if not self._is_disabled and not all(shadow.shares_masks for shadow in self._shadows()):
            # The base may prepare its masks ahead (for a static cache), or leave them out: a shadow of another kind
            # cannot read them, and is told the padding beside them.
            prepared[SHADOW_MASK] = attention_mask
        return prepared

    @torch.no_grad()
    def generate(self, *args: Any, **options: Any) -> Any:
        """As in transformers, with one cache for base and shadow."""
        with packed(shadow.couplings for shadow in self._shadows()):
            return super().generate(*args, **options)  # type: ignore[misc]

    def generate_batch(self, *args: Any, adapter_names: Any = None, **options: Any) -> Any:
        """As in transformers, with the active adapter for all requests.

        Raises:
            ConfigError: adapter_names or draft were given, which transformers would drop without a word.
        """
        if adapter_names is not None:
            raise ConfigError("generate_batch() runs one adapter: set_adapter(…) it, or generate(adapter_names=…).")
        if options.get("draft") is not None:
            raise ConfigError("generate_batch() does not draft: generate(draft=…), or leave draft out.")
        return super().generate_batch(*args, **options)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """As in transformers, for `generate_batch` and servers, with the active adapter; base and shadow share the pages.

        Raises:
            BaseModelError: a shadow whose heads of keys and values, or whose window, have another size than the base's.
            StateError: the adapter is disabled, which holds for this thread and not for the batching's own.
        """
        if self._is_disabled:  # type: ignore[attr-defined]
            raise StateError("disable_adapter() holds for one thread, continuous batching runs in another: unload().")
        for shadow in self._shadows():
            check_pages(self.base.config, shadow.backbone.config)
        return super().init_continuous_batching(*args, **options)  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """The base knows its own arguments, images among them."""
        own = inspect.signature(self.forward).parameters
        self.base._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in own})

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        return self.base._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.base._maybe_prepare_encoder_kwargs_for_generation(*args, **options)

    def _update_model_kwargs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.base._update_model_kwargs_for_generation(*args, **options)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        if model_kwargs.get("adapter_names") is not None and generation_config.guidance_scale not in (None, 1):
            raise ConfigError(
                "guidance_scale would be given the active adapter for every row: set_adapter(…) it, and leave adapter_names out."
            )
        own = architectures.own_cache(self.base, self.config)
        if own is not None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise StateError(
                    f"{type(self.base).__name__} has a cache class of its own: leave "
                    f"cache_implementation={generation_config.cache_implementation!r} out."
                )
            model_kwargs.setdefault("past_key_values", own)
        is_new = model_kwargs.get("past_key_values") is None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)  # type: ignore[misc]
        if is_new:
            active = [] if self._is_disabled else self._named(model_kwargs.get("adapter_names"))
            layers = [layer for shadow in active for layer in shadow.cache_layers]
            architectures.leave_out_others(model_kwargs.get("past_key_values"), len(self._attachment.blocks), layers)

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> Any:
        """As in transformers, which asks the first layer of attention how much a cache holds: that may be another adapter's."""
        cache, names = model_kwargs.get("past_key_values"), model_kwargs.get("adapter_names")
        if cache is not None:
            self._check_length(cache, input_ids, generation_config, model_kwargs)
        active = [] if self._is_disabled or len(self.adapters) == 1 else self._named(names)
        if cache is None or not active:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **options)  # type: ignore[misc]
        layers = [layer for shadow in active for layer in shadow.cache_layers]
        view = architectures.hide_others(cache, len(self._attachment.blocks), layers)
        told = {**model_kwargs, "past_key_values": view}
        with undivided(cache):
            out = super()._prefill(input_ids, generation_config, told, *args, **options)  # type: ignore[misc]
        if out.get("past_key_values") is view:
            out["past_key_values"] = cache
        return out

    def _check_length(self, cache: Any, ids: Tensor, config: GenerationConfig, told: dict[str, Any]) -> None:
        """Leave at least one token of a text that is given whole to the forward."""
        check_undivided(cache)
        mask, embeds = told.get("attention_mask"), told.get("inputs_embeds")
        length = ids.shape[1] if embeds is None else embeds.shape[1]
        masked = vars(config).get("_mask_length") if mask is None else mask.shape[1]
        if masked == length and not self._is_disabled:
            take_back_last(self.base, cache, length)

    def _assisted_decoding(self, *args: Any, **options: Any) -> Any:
        """As in transformers, which takes rejected tokens out of the cache only after it has shown those that it accepts."""
        with undivided(options.get("past_key_values")):
            return super()._assisted_decoding(*args, **options)  # type: ignore[misc]

    def _beam_search(self, *args: Any, **options: Any) -> Any:
        """As in transformers, which reorders the cache only after it has chosen the beams."""
        with undivided(options.get("past_key_values")):
            return super()._beam_search(*args, **options)  # type: ignore[misc]

    def _get_static_cache_init_shape(self) -> Any:
        # Layers that are made ahead have one shape and dtype; None lets each be made when it is first used.
        shapes = {
            str(architectures.head_shape(part.config)) for part in (self.base, *(s.backbone for s in self._shadows()))
        }
        alike = len(shapes) == 1 and self.shadow.dtype == self.dtype  # type: ignore[attr-defined]
        return super()._get_static_cache_init_shape() if alike else None  # type: ignore[misc]

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **options: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise BaseModelError(
                "assistant_early_exit would leave the base before blocks that the shadow corrects: let the shadow draft, "
                "by assistant_model=model.detached()."
            )
        return super()._get_candidate_generator(generation_config, *args, **options)  # type: ignore[misc]

    def _shadows(self) -> list[Any]:
        return [self.adapter(name) for name in self.adapters]
