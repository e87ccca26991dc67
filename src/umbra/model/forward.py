"""One forward of base and shadows: which adapters take part, what each of them reads, and the cache that they share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from umbra.base import architectures
from umbra.errors import ConfigError, StateError, unknown_key
from umbra.generation import caches, paging
from umbra.generation.decoding import SHADOW_MASK
from umbra.method import kernels
from umbra.method.adapter_state import AdapterState
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import Attachment, ForwardContext
from umbra.model.adapter_set import AdapterSet, group_rows, pick_rows
from umbra.shadow.network import BATCH_ARGUMENTS, Shadow

Batch = dict[str, Any]  # the arguments of a forward, by the names of transformers
Route = list[tuple[Shadow, Tensor | None]]  # each shadow that takes part, with its rows (N,); None for all
UseState = Callable[[Tensor], None]


def input_of(batch: Batch) -> Tensor:
    """Return the input, (B, T) tokens or (B, T, D) embeddings."""
    return batch["input_ids"] if batch["inputs_embeds"] is None else batch["inputs_embeds"]


class ForwardRunner:
    """Run the base with the shadows that are attached to it.

    Args:
        base: the base model.
        config: the composite configuration of base and shadows.
        adapters: the shadows.
        attachment: the hooks on the base.
        arguments: the names that a forward takes, of this model and of its base.
        merges_embeddings: whether the decoder receives embeddings with those of images among them.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PretrainedConfig,
        adapters: AdapterSet,
        attachment: Attachment,
        arguments: frozenset[str],
        merges_embeddings: bool,
    ):
        self.base, self.config, self.adapters, self.attachment = base, config, adapters, attachment
        self.arguments, self.merges_embeddings = arguments, merges_embeddings
        self.cache_argument = architectures.cache_argument(base)

    # -- arguments -------------------------------------------------------------------------------------------------

    def further_arguments(self, given: dict[str, Any], model_name: str) -> dict[str, Any]:
        """Return a call's further arguments, with the outputs that the configuration requests.

        Args:
            given: the keyword arguments that the forward does not name.
            model_name: for the error message.

        Raises:
            ConfigError: an argument that neither this model nor its base has.
        """
        for name in given:
            if name not in self.arguments and name != SHADOW_MASK:
                raise unknown_key(name, self.arguments, f"the arguments of {model_name}")
        return {**given, **architectures.requested_outputs(self.config, self.base.config, given)}

    def route(self, batch: Batch, names: Sequence[str | None] | None, training: bool) -> Route:
        """Return each shadow that takes part in a forward, with its rows (N,); None for all.

        Args:
            batch: the arguments of the forward.
            names: ``adapter_names``; None for the active adapter.
            training: the mode of the model.

        Raises:
            ConfigError: ``adapter_names`` in training, unknown names, or too many or too few.
        """
        if names is None:
            return [(self.adapters.active, None)]
        if training:
            raise ConfigError("adapter_names is for inference: train the active adapter, one at a time.")
        x = input_of(batch)
        groups = group_rows(names, len(x), x.device)
        return [(self.adapters.get(name), None if len(rows) == len(x) else rows) for name, rows in groups.items()]

    # -- the shadow ------------------------------------------------------------------------------------------------

    def initial_state(self, batch: Batch, shadow: Shadow | None = None) -> Tensor:
        """Return s⁰ (B, T, D).

        Args:
            batch: what the shadow reads: see `inputs_of`.
            shadow: by default the active one.
        """
        self.attachment.refresh_hooks()  # the embeddings may have been replaced since the last forward
        shadow = self.adapters.active if shadow is None else shadow
        batch = paging.for_shadow(batch, shadow.backbone.config, shadow.dtype)
        arguments = {k: batch[k] for k in BATCH_ARGUMENTS if batch.get(k) is not None}
        return shadow(batch["input_ids"], batch["inputs_embeds"], self.base.get_input_embeddings(), **arguments)

    def inputs_of(self, shadow: Shadow, batch: Batch, given: dict[str, Any]) -> Batch:
        """Return what a shadow reads of a batch.

        Args:
            shadow: the shadow. One that cannot read the base's masks gets the padding as (B, T).
            batch: the arguments of the forward.
            given: the keyword arguments of the decoder (embeddings with images among them), which take precedence; empty
                if the shadow runs before the base.
        """
        inputs = {**batch, **given, **({"input_ids": None} if given else {})}
        if not shadow.shares_masks:
            inputs["attention_mask"] = batch.get(SHADOW_MASK, batch.get("attention_mask"))
            positions = inputs.get("position_ids")
            if positions is not None and positions.ndim == 3:
                inputs["position_ids"] = positions[0]  # of the axes of images, the one that counts along the text
        return inputs

    def initial_state_alone(self, batch: Batch) -> Tensor:
        """Return s⁰ (B, T, D) of the active shadow where the base does not run.

        Raises:
            StateError: a cache was passed, or images must be merged into the embeddings.
        """
        if batch["past_key_values"] is not None:
            raise StateError(
                "Within shadow_only() nothing is cached; to generate with the shadow alone use detached()."
            )
        if self.merges_embeddings:
            raise StateError(
                "Within shadow_only() nobody merges images into the embeddings: use labels and the model's own loss."
            )
        return self.initial_state(self.inputs_of(self.adapters.active, {**batch, "use_cache": False}, {}))

    def _adapter_state(self, batch: Batch, given: dict[str, Any], shadow: Shadow, rows: Tensor | None) -> AdapterState:
        inputs = self.inputs_of(shadow, batch, given)
        cache = inputs["past_key_values"]
        if len(self.adapters.names) > 1:
            num_blocks = len(self.attachment.blocks)
            inputs["past_key_values"] = architectures.view_without_others(cache, num_blocks, shadow.cache_layers)
        if rows is None:
            return AdapterState(shadow.couplings, self.initial_state(inputs, shadow))
        if cache is None and not given:
            return AdapterState(shadow.couplings, self.initial_state(pick_rows(inputs, rows), shadow), rows)
        # A cache layer has a row for each row of the batch: the shadow runs on all, and its rows are picked afterwards.
        return AdapterState(shadow.couplings, self.initial_state(inputs, shadow)[rows], rows)

    # -- the base --------------------------------------------------------------------------------------------------

    def context(
        self, batch: Batch, route: Route, head: HeadInputs | None = None, use_state: UseState | None = None
    ) -> ForwardContext:
        """Return the context of a forward.

        Args:
            batch: the arguments of the forward.
            route: the shadows that take part.
            head: the input and output of the task head.
            use_state: called with s⁰ (B, T, D) of the active shadow, before the head runs. The shadow runs before the base,
                or as soon as the decoder receives embeddings with those of images among them.
        """

        def start(given: dict[str, Any]) -> list[AdapterState]:
            states = [self._adapter_state(batch, given, shadow, rows) for shadow, rows in route]
            if use_state is not None:
                use_state(states[0].slots[self.adapters.active.couplings.layers[0]])
            return states

        return ForwardContext(self.attachment, start if self.merges_embeddings else start({}), head)

    def run(self, batch: Batch, route: Route, head: HeadInputs, use_state: UseState | None = None) -> dict[str, Any]:
        """Return the base's output by name; see `context` for the arguments."""
        recompute = kernels.recompute_activations() if kernels.in_use() else nullcontext()
        with self.guard_cache(batch), self.context(batch, route, head, use_state), recompute:
            return dict(self.call_base(batch, return_dict=True))

    def run_bare(self, batch: Batch, **options: Any) -> Any:
        """Return the bare base's own output.

        Args:
            batch: the arguments of the forward.
            options: further arguments of the base.
        """
        self.resolve_use_cache(batch)
        caches.check_bare(batch["past_key_values"], self.base.config)
        with self.guard_cache(batch):
            return self.call_base(batch, **options)

    def call_base(self, batch: Batch, part: nn.Module | None = None, **options: Any) -> Any:
        """Call the base, with the batch under the base's own argument names.

        Args:
            batch: the arguments of the forward.
            part: a part of the base to call instead.
            options: further arguments; None leaves one out.

        Returns:
            The output, whose cache has the usual name ``past_key_values``.
        """
        batch = paging.for_path(batch, self.base.config)
        given = {k: v for k, v in batch.items() if v is not None and k != SHADOW_MASK}
        architectures.reset_recurrent_state(self.base, batch.get("past_key_values"))
        if "past_key_values" in given:
            given[self.cache_argument] = given.pop("past_key_values")
        given |= {k: v for k, v in options.items() if v is not None}
        out = (self.base if part is None else part)(**given)
        if isinstance(out, tuple):
            return out
        cache = out.get(self.cache_argument, batch.get("past_key_values"))
        if cache is not None:
            out["past_key_values"] = cache  # some return it under another name, and RecurrentGemma not at all
        return out

    # -- the cache -------------------------------------------------------------------------------------------------

    def guard_cache(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context for work that writes to the batch's cache: see `caches.invalidate_on_error`."""
        cache = batch["past_key_values"]
        return nullcontext() if cache is None or torch.compiler.is_compiling() else caches.invalidate_on_error(cache)

    def resolve_use_cache(self, batch: Batch) -> None:
        """Disable the cache if this model's configuration does, as Trainer sets it: packed rows would see each other."""
        if batch["use_cache"] is None and getattr(self.config, "use_cache", None) is False:
            batch["use_cache"] = False

    def prepare_cache(self, batch: Batch, route: Route, training: bool) -> None:
        """Provide one cache of L + S layers for both paths; none in training, where nothing reads it.

        Args:
            batch: changed in place.
            route: the shadows that take part.
            training: the mode of the model.

        Raises:
            StateError: a cache that base and shadow cannot share.
        """
        if not architectures.takes_cache(self.base):
            batch["use_cache"] = batch["past_key_values"] = None
            return
        self.resolve_use_cache(batch)
        if batch["use_cache"] is None:
            batch["use_cache"] = bool(self.base.config.get_text_config(decoder=True).use_cache) and not training
        cache = batch["past_key_values"]
        if cache is None and batch["use_cache"]:
            batch["past_key_values"] = architectures.own_cache(self.base, self.config) or DynamicCache(
                config=self.config
            )
        elif cache is not None:
            caches.check_shared(cache, self.base.config, [shadow.cache_layers for shadow, _ in route])
            if SHADOW_MASK not in batch and architectures.is_measured_by_shadow(cache, len(self.attachment.blocks)):
                raise StateError(
                    f"A static cache cannot serve {type(self.base).__name__} beside a shadow here: its layers of attention "
                    "and recurrence in one are taken for recurrent ones. Call generate(), or use a DynamicCache."
                )
