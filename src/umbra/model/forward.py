"""One forward of base and shadows: who takes part, what each of them sees, and the cache that they share."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from umbra.base import architectures
from umbra.errors import ConfigError, StateError, unknown_key
from umbra.generation import caches
from umbra.generation.decoding import SHADOW_MASK
from umbra.method import kernels
from umbra.method.adapter_state import AdapterState
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import Attachment, ForwardContext
from umbra.model.adapter_set import group_rows, pick_rows
from umbra.shadow.network import BATCH_ARGUMENTS, Shadow

Route = list[tuple[Shadow, Tensor | None]]  # each shadow that takes part, with its rows (N,); None for all


class Forward:
    """Mixed into `ShadowModel`."""

    base: PreTrainedModel
    config: PretrainedConfig
    shadow: Shadow
    training: bool
    adapter: Any
    adapters: list[str]
    _attachment: Attachment
    _merges_embeddings: bool
    _cache_argument: str
    _arguments: frozenset[str]  # that a forward takes, this model's and its base's

    def _further_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """A call's further arguments, and the outputs that this model's configuration asks for.

        Raises:
            ConfigError: one that neither this model nor its base has.
        """
        for name in given:
            if name not in self._arguments and name != SHADOW_MASK:
                raise unknown_key(name, self._arguments, f"the arguments of {type(self).__name__}")
        return {**given, **architectures.requested_outputs(self.config, self.base.config, given)}

    def _run_bare(self, batch: dict[str, Any], **options: Any) -> Any:
        """The bare base's own output."""
        self._settle_use_cache(batch)
        caches.check_bare(batch["past_key_values"], self.base.config)
        with self._undivided(batch):
            return self._call_base(batch, **options)

    def _route(self, batch: dict[str, Any], names: Sequence[str | None] | None) -> Route:
        """Each shadow that takes part in a forward, with its rows (N,); None for all."""
        if names is None:
            return [(self.shadow, None)]
        if self.training:
            raise ConfigError("adapter_names is for inference: train the active adapter, one at a time.")
        x = batch["input_ids"] if batch["inputs_embeds"] is None else batch["inputs_embeds"]
        groups = group_rows(names, len(x), x.device)
        return [(self.adapter(name), None if len(rows) == len(x) else rows) for name, rows in groups.items()]

    def _lane(self, batch: dict[str, Any], given: dict[str, Any], shadow: Shadow, rows: Tensor | None) -> AdapterState:
        seen = self._seen_by(shadow, batch, given)
        cache = seen["past_key_values"]
        if len(self.adapters) > 1:
            seen["past_key_values"] = architectures.hide_others(
                cache, len(self._attachment.blocks), shadow.cache_layers
            )
        if rows is None:
            return AdapterState(shadow.couplings, self._initial_state(seen, shadow))
        if cache is None and not given:
            return AdapterState(shadow.couplings, self._initial_state(pick_rows(seen, rows), shadow), rows)
        # A layer of the cache has a row for each of the batch: the shadow runs on all, and its own are picked after.
        return AdapterState(shadow.couplings, self._initial_state(seen, shadow)[rows], rows)

    def _seen_by(self, shadow: Shadow, batch: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """The batch, where the decoder was given other things (embeddings with images in them), those; padding as (B, T)
        for a shadow that cannot read the base's masks."""
        seen = {**batch, **given, **({"input_ids": None} if given else {})}
        if not shadow.shares_masks:
            seen["attention_mask"] = batch.get(SHADOW_MASK, batch.get("attention_mask"))
            positions = seen.get("position_ids")
            if positions is not None and positions.ndim == 3:
                seen["position_ids"] = positions[0]  # of the axes that images have, the one that counts along the text
        return seen

    def _initial_state(self, batch: dict[str, Any], shadow: Shadow | None = None) -> Tensor:
        self._attachment.settle()  # before the embeddings are read, which may be others than before
        shadow = self.shadow if shadow is None else shadow
        batch = caches.for_shadow(batch, shadow.backbone.config, shadow.dtype)
        told = {k: batch[k] for k in BATCH_ARGUMENTS if batch.get(k) is not None}
        return shadow(batch["input_ids"], batch["inputs_embeds"], self.base.get_input_embeddings(), **told)

    def _frame(
        self,
        batch: dict[str, Any],
        route: Route,
        head: HeadInputs | None = None,
        use_state: Callable[[Tensor], Any] | None = None,
    ) -> ForwardContext:
        """The frame of a forward.

        Args:
            use_state: told s⁰ (B, T, D) of the active shadow, before the head runs. It is computed before the base
                runs, or as soon as its decoder is given embeddings with those of images among them.
        """

        def start(given: dict[str, Any]) -> list[AdapterState]:
            lanes = [self._lane(batch, given, shadow, rows) for shadow, rows in route]
            if use_state is not None:
                use_state(lanes[0].slots[self.shadow.couplings.layers[0]])
            return lanes

        return ForwardContext(self._attachment, start if self._merges_embeddings else start({}), head)

    def _run_base(
        self,
        batch: dict[str, Any],
        route: Route,
        head: HeadInputs,
        use_state: Callable[[Tensor], Any] | None = None,
    ) -> dict[str, Any]:
        """The base's output by name; see `_frame`."""
        recompute = kernels.recompute_activations() if kernels.in_use() else nullcontext()
        with self._undivided(batch), self._frame(batch, route, head, use_state), recompute:
            return dict(self._call_base(batch, return_dict=True))

    def _undivided(self, batch: dict[str, Any]) -> Any:
        """A context for what writes to the batch's cache: see `caches.undivided`."""
        cache = batch["past_key_values"]
        return nullcontext() if cache is None or torch.compiler.is_compiling() else caches.undivided(cache)

    def _call_base(self, batch: dict[str, Any], part: Any = None, **options: Any) -> Any:
        """The base, or ``part`` of it, with the batch as it names things; its cache comes back under the usual name."""
        batch = caches.for_path(batch, self.base.config)
        given = {k: v for k, v in batch.items() if v is not None and k != SHADOW_MASK}
        architectures.forget(self.base, batch.get("past_key_values"))
        if "past_key_values" in given:
            given[self._cache_argument] = given.pop("past_key_values")
        given |= {k: v for k, v in options.items() if v is not None}
        out = (self.base if part is None else part)(**given)
        if isinstance(out, tuple):
            return out
        cache = out.get(self._cache_argument, batch.get("past_key_values"))
        if cache is not None:
            out["past_key_values"] = cache  # which some return under another name, and RecurrentGemma not at all
        return out

    def _settle_use_cache(self, batch: dict[str, Any]) -> None:
        """No cache where this model's config says so, as Trainer has it: with one, packed rows would see each other."""
        if batch["use_cache"] is None and getattr(self.config, "use_cache", None) is False:
            batch["use_cache"] = False

    def _prepare_cache(self, batch: dict[str, Any], route: Route) -> None:
        """One cache of L + S layers for both paths; none in training, where nothing reads it."""
        if not architectures.takes_cache(self.base):
            batch["use_cache"] = batch["past_key_values"] = None
            return
        self._settle_use_cache(batch)
        if batch["use_cache"] is None:
            batch["use_cache"] = bool(self.base.config.get_text_config(decoder=True).use_cache) and not self.training
        cache = batch["past_key_values"]
        if cache is None and batch["use_cache"]:
            batch["past_key_values"] = architectures.own_cache(self.base, self.config) or DynamicCache(
                config=self.config
            )
        elif cache is not None:
            caches.check_shared(cache, self.base.config, [shadow.cache_layers for shadow, _ in route])
            if SHADOW_MASK not in batch and architectures.is_measured_by_shadow(cache, len(self._attachment.blocks)):
                raise StateError(
                    f"A static cache cannot serve {type(self.base).__name__} beside a shadow here: its layers of attention "
                    "and recurrence in one are taken for recurrent ones. Call generate(), or use a DynamicCache."
                )
