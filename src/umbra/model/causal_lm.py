"""`ShadowForCausalLM`: a language model and its shadow; `forward` dispatches to one of four ways to run them."""

# pyright: reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false
# (Hooks of transformers' generation pass on arguments that they do not read; GenerationMixin types self by a protocol that no
# PreTrainedModel satisfies.)

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import MoeModelOutputWithPast

from umbra.base import architectures
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, StateError
from umbra.generation import decoding
from umbra.generation.speculative import SpeculativeDecoder, check_mode
from umbra.method.adapter_state import AdapterState, packed
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import ForwardContext
from umbra.method.losses import IGNORED, token_loss
from umbra.model.checks import check_one_adapter, detached_copy
from umbra.model.forward import Batch, input_of
from umbra.model.labels import LabelArguments, Labels
from umbra.model.losses import LanguageModelLosses
from umbra.model.outputs import ShadowCausalLMOutput
from umbra.model.shadow_model import ShadowModel
from umbra.shadow.draft_vocabulary import as_draft_tokens
from umbra.shadow.network import Shadow

Items = Tensor | int | None


class ShadowForCausalLM(ShadowModel, GenerationMixin):
    """A language model and its shadow.

    Attributes:
        losses: computes the losses of both.
    """

    def __init__(self, base: PreTrainedModel, config: ShadowConfig, *, backbone_config: PretrainedConfig | None = None):
        super().__init__(base, config, backbone_config=backbone_config)
        self.losses = LanguageModelLosses(base, self.adapter_set, self.attachment, self.runner, self.guard)
        self.generation_config = copy.deepcopy(base.generation_config) or GenerationConfig()
        self._is_stateful = base._is_stateful  # transformers then refuses generation that would have to go back
        if not architectures.takes_cache(base):
            self.generation_config.use_cache = False

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        shadow_targets: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Items = None, skip_logits: bool | None = None, return_dict: bool | None = None,
        adapter_names: Sequence[str | None] | None = None, ignore_index: int = IGNORED, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run base and shadow.

        Args:
            input_ids: (B, T).
            attention_mask: as in transformers, like ``position_ids``, ``past_key_values`` and ``use_cache``.
            position_ids: (B, T), or as the base's own.
            past_key_values: the cache that base and shadow share.
            inputs_embeds: (B, T, D), in place of ``input_ids``.
            labels: (B, T) of any integer dtype, aligned with the input, -100 where there is no loss.
            shadow_targets: (B, T), the shadow's own labels, where they differ from ``labels``.
            use_cache: whether to return a cache.
            logits_to_keep: the last positions whose logits are returned, or their indices; 0 for all.
            num_items_in_batch: the number of labels in the whole accumulated batch, by which both losses are divided; by
                default the labels of this batch.
            skip_logits: compute logits only where there is a label, and return none; by default in training with labels.
            return_dict: False for a tuple, in the order of the base's own; by default as the configuration says.
            adapter_names: the adapter of each of the B rows, None for the bare base; by default the active one for all.
            ignore_index: the label of positions without a loss.
            kwargs: further arguments of the base; and ``shift_labels`` (B, T), the labels of the next tokens, in place of
                ``labels``.

        Returns:
            ShadowCausalLMOutput. ``loss`` is the task's plus λ times the shadow's in training, the task's alone in evaluation;
            ``shadow_loss`` is separate. ``logits`` (B, T, V) are the attached path's. The task's loss includes the
            load-balancing loss of a base with routers if ``output_router_logits`` requests it.

        Raises:
            ConfigError: an argument that neither this model nor its base has; labels that are not tokens, or whose shape is
                not the input's.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, Trainer would require it of every data set
        batch = self._batch(kwargs, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        arguments = (
            LabelArguments(labels, shadow_targets, shift_labels).masked(ignore_index).of_path(self.attachment.only)
        )
        places = arguments.read(input_of(batch), architectures.head_width(self.base_head))
        if self.attachment.is_disabled:
            return self._forward_bare(batch, arguments, logits_to_keep, return_dict, num_items_in_batch)
        if places is None:
            self.guard.warn_without_labels(self.training)
        skips = (
            self.training and self.attachment.only is None if skip_logits is None else skip_logits
        ) and places is not None
        if self.attachment.only == "shadow":
            check_one_adapter(adapter_names)
            values = self._forward_shadow(batch, places, num_items_in_batch, skips, logits_to_keep)
        elif places is None or adapter_names is not None:
            values = self._forward_logits(batch, places, num_items_in_batch, logits_to_keep, adapter_names)
        else:
            values = self._forward_labelled(batch, places, num_items_in_batch, skips, logits_to_keep)
        return self._output(ShadowCausalLMOutput, values, batch, return_dict)

    def _forward_bare(
        self, batch: Batch, arguments: LabelArguments, logits_to_keep: int | Tensor, return_dict: bool | None,
        items: Items,
    ) -> Any:  # fmt: skip
        """Return the bare base's own output."""
        labels, shift_labels = arguments.labels, arguments.shift_labels
        return self.runner.run_bare(
            batch,
            labels=None if labels is None else labels.long(),
            shift_labels=None if shift_labels is None else shift_labels.long(),
            logits_to_keep=logits_to_keep,
            return_dict=return_dict,
            num_items_in_batch=items,
        )

    def _forward_shadow(
        self, batch: Batch, labels: Labels | None, items: Items, skip_logits: bool, logits_to_keep: int | Tensor
    ) -> dict[str, Any]:
        """Return the output by name of the shadow without its base."""
        s0 = self.runner.initial_state_alone(batch)
        if labels is not None and skip_logits:
            loss = self.losses.alone(s0, labels, items, self.training)
            return {"loss": loss, "shadow_loss": detached_copy(loss)}
        if labels is None:
            s0 = _columns(s0, logits_to_keep)
        rows, loss = self.losses.logits_alone(s0), None
        if labels is not None:
            loss = token_loss(rows[labels.shadow_positions.to(rows.device)], labels.shadow_targets, items)
        return {"loss": loss, "logits": rows.view(*s0.shape[:2], -1), "shadow_loss": detached_copy(loss)}

    def _forward_logits(
        self, batch: Batch, labels: Labels | None, items: Items, logits_to_keep: int | Tensor,
        adapter_names: Sequence[str | None] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the output by name without the shadow's own loss: there are no labels, or rows of several adapters."""
        route = self.runner.route(batch, adapter_names, self.training)
        self.runner.prepare_cache(batch, route, self.training)
        num_kept = architectures.logits_to_keep(self.base.config, logits_to_keep, input_of(batch).shape[1])
        heads = HeadInputs([(rows, shadow.heads) for shadow, rows in route])
        values = self.runner.run({**batch, "logits_to_keep": num_kept if labels is None else 0}, route, heads)
        if labels is not None:
            at_labels = values["logits"].flatten(0, 1)[labels.positions.to(values["logits"].device)]
            values["loss"] = token_loss(at_labels, labels.targets, items) + self.losses.router_loss(values)
            values["logits"] = _columns(values["logits"], logits_to_keep)
        return values

    def _forward_labelled(
        self, batch: Batch, labels: Labels, items: Items, skip_logits: bool, logits_to_keep: int | Tensor
    ) -> dict[str, Any]:
        """Return the output by name with the losses of both paths."""
        route = self.runner.route(batch, None, self.training)
        self.runner.prepare_cache(batch, route, self.training)
        values, losses = self.losses.run(batch, route, labels, items, skip_logits, self.training)
        losses = losses._replace(task=losses.task + self.losses.router_loss(values))
        values["logits"] = None if skip_logits else _columns(values["logits"], logits_to_keep)
        parts = {"shadow_loss": losses.shadow, "distillation_loss": losses.distillation}
        return values | {"loss": self._total(losses), **parts}

    # -- for trainers that read hidden states, such as TRL's -------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The decoder without its head, to be called like a model of transformers."""
        return self._hidden_states

    def _hidden_states(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Return an output whose ``last_hidden_state`` is (B, T, D) before the head, in the head's dtype.

        Raises:
            StateError: in training, unless the caller computes the shadow's loss.
        """
        arguments = {"inputs_embeds": None, "past_key_values": None, "use_cache": None}
        batch = {**arguments, **self._further_arguments(kwargs), "input_ids": input_ids}
        dtype = cast(nn.Linear, self.get_output_embeddings()).weight.dtype
        self._check_added_tokens()
        if self.attachment.only == "shadow":
            states = architectures.head_input(self.base, self.runner.initial_state_alone(batch))
            return MoeModelOutputWithPast(last_hidden_state=states.to(dtype))
        if problem := self.guard.missing_shadow_loss(self.training):
            raise StateError(f"Hidden states were requested in training: {problem}")
        self.runner.resolve_use_cache(batch)
        route = [] if self.attachment.is_disabled else self.runner.route(batch, None, self.training)
        if route:
            self.runner.prepare_cache(batch, route, self.training)
        with self.runner.guard_cache(batch), self.runner.context(batch, route):
            out = self.runner.call_base(batch, self.base.base_model, return_dict=True)
        embeds = batch["inputs_embeds"]
        out.last_hidden_state = self.guard.with_gradient(out.last_hidden_state.to(dtype), embeds, self.training)
        return out

    def _check_added_tokens(self) -> None:
        added = self.adapter_set.active.added_tokens
        if self.training and torch.is_grad_enabled() and added is not None and added.is_trained:
            raise StateError(
                "Hidden states do not train the rows that added tokens have in the head: use the model's logits or its own "
                "loss, or freeze the rows (model.shadow.added_tokens.requires_grad_(False))."
            )

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head of the path that runs: a trained copy if there is one."""
        heads = self.adapter_set.active.heads
        if heads and not self.attachment.is_disabled:
            return heads["shadow" if self.attachment.only == "shadow" else "attached"]
        return self.base.get_output_embeddings()

    # -- generation: what umbra.generation changes in transformers' -------------------------------------------------

    @torch.no_grad()
    def generate(self, *args: Any, draft: int | str | None = None, **options: Any) -> Any:
        """Generate text as in transformers, with one cache for base and shadow.

        Args:
            args: positional arguments of transformers' ``generate``.
            draft: K: the shadow drafts up to K tokens that one forward of the base verifies, fewer where one more is not worth
                its cost; "auto" for ``num_assistant_tokens`` where it is set, and a K of Umbra's choice otherwise; None for no
                drafts. Greedy decoding returns the same tokens as without, sampling the same distribution. With
                ``assistant_confidence_threshold``, drafting continues until the probability of the shadow's most likely token
                is below it, instead of weighing the cost.
            options: keyword arguments of transformers' ``generate``.

        Returns:
            As in transformers; with ``draft`` and ``return_dict_in_generate`` a `DraftedOutput`.

        Raises:
            ConfigError: an invalid K, or with ``draft`` a search or an output that drafting does not support.
            BaseModelError: the base or the cache cannot drop rejected tokens.
            StateError: ``draft`` while the adapter is disabled.
        """
        if draft is not None:
            decoder = SpeculativeDecoder.from_call(self.shadow, draft, args, options, self.generation_config)
            if self.attachment.is_disabled or self.attachment.only == "shadow":
                raise StateError("draft=… needs the shadow and the base: leave disable_adapter() or shadow_only().")
            options["custom_generate"] = decoder
        with packed(shadow.couplings for shadow in self.adapter_set.shadows):
            return super().generate(*args, **options)

    def generate_batch(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **options: Any) -> Any:
        """Generate with continuous batching as in transformers, with the active adapter for all requests.

        Raises:
            ConfigError: adapter_names or draft were given, which transformers would drop silently.
        """
        decoding.check_batch_options(adapter_names, options)
        return super().generate_batch(*args, **options)

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """Start continuous batching as in transformers, with the active adapter; base and shadow share the pages.

        Raises:
            BaseModelError: a shadow's key-value heads or its window differ in size from the base's.
            StateError: the adapter is disabled, which holds for this thread but not for the batching thread.
        """
        decoding.check_continuous_batching(self.base, self.adapter_set.shadows, self.attachment.is_disabled)
        return super().init_continuous_batching(*args, **options)

    def set_draft_vocabulary(self, token_ids: Iterable[int] | None, adapter_name: str | None = None) -> None:
        """Set the tokens that a shadow drafts: fewer are cheaper. They are saved with the adapter, and change no answer.

        Args:
            token_ids: for example from `frequent_tokens`; None for the whole vocabulary.
            adapter_name: by default the active one.

        Raises:
            ConfigError: empty, or a number that is no token of the base.
        """
        rows = architectures.vocabulary_size(self.base.get_input_embeddings())
        self.adapter(adapter_name).draft_tokens = as_draft_tokens(token_ids, rows)

    def draft_state(self, shadow: Shadow, batch: dict[str, Any]) -> Tensor:
        """Return s⁰ (B, T, D) of a batch, by the shadow alone."""
        return self.runner.initial_state(self.runner.inputs_of(shadow, batch, {}), shadow)

    def verify(self, shadow: Shadow, s0: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the attached logits (B, T, V) of a batch whose s⁰ (B, T, D) is known."""
        state, head = AdapterState(shadow.couplings, s0), HeadInputs([(None, shadow.heads)])
        with ForwardContext(self.attachment, [state], head):
            return self.runner.call_base(batch, return_dict=True).logits

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments of one decoding step, prepared by the base's own method."""
        pass_padding = not self.attachment.is_disabled and not all(
            shadow.shares_masks for shadow in self.adapter_set.shadows
        )
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return decoding.prepare_inputs(self.base, self.runner.cache_argument, pass_padding, input_ids, *args, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate: object, *args: Any) -> dict[str, Any]:
        if not isinstance(custom_generate, SpeculativeDecoder):
            return super()._extract_generation_mode_kwargs(custom_generate, *args)
        # transformers would pass neither streamer nor tokenizer to a callable.
        return {**super()._extract_generation_mode_kwargs(None, *args), "drafter": custom_generate}

    def _validate_generation_mode(self, mode: GenerationMode, config: GenerationConfig, given: dict[str, Any]) -> None:
        super()._validate_generation_mode(mode, config, given)
        if "drafter" in given:
            if not architectures.takes_cache(self.base):
                raise BaseModelError(f"draft=… needs a cache; {type(self.base).__name__} has none. Leave draft out.")
            check_mode(mode, config, given)

    @property
    def _generator(self) -> Any:
        """The base, whose generation hooks its type does not name."""
        return self.base

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self._generator._validate_model_kwargs(decoding.arguments_of_base(self.forward, model_kwargs))

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        return self._generator._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self._generator._maybe_prepare_encoder_kwargs_for_generation(*args, **options)

    def _update_model_kwargs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self._generator._update_model_kwargs_for_generation(*args, **options)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        names = model_kwargs.get("adapter_names")
        decoding.check_guidance(generation_config, model_kwargs)
        decoding.use_own_cache_class(self.base, self.config, generation_config, model_kwargs)
        is_new = model_kwargs.get("past_key_values") is None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)
        if is_new:
            active = [] if self.attachment.is_disabled else self.adapter_set.select(names)
            layers = [layer for shadow in active for layer in shadow.cache_layers]
            architectures.drop_inactive_windows(
                model_kwargs.get("past_key_values"), len(self.attachment.blocks), layers
            )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **options: Any,
    ) -> Any:
        cache, names = model_kwargs.get("past_key_values"), model_kwargs.get("adapter_names")
        if cache is not None:
            decoding.prepare_past(
                self.base, cache, input_ids, generation_config, model_kwargs, self.attachment.is_disabled
            )  # fmt: skip
        active = [] if self.attachment.is_disabled or len(self.adapters) == 1 else self.adapter_set.select(names)
        if cache is None or not active:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **options)
        with decoding.cache_of(active, cache, len(self.attachment.blocks)) as view:
            viewed = {**model_kwargs, "past_key_values": view}
            out = super()._prefill(input_ids, generation_config, viewed, *args, **options)
        if out.get("past_key_values") is view:
            out["past_key_values"] = cache
        return out

    def _assisted_decoding(self, *args: Any, **options: Any) -> Any:
        # transformers takes rejected tokens out of the cache only after it has streamed those that it accepts.
        with decoding.invalidate_on_error(options.get("past_key_values")):
            return super()._assisted_decoding(*args, **options)

    def _beam_search(self, *args: Any, **options: Any) -> Any:
        # transformers reorders the cache only after it has chosen the beams.
        with decoding.invalidate_on_error(options.get("past_key_values")):
            return super()._beam_search(*args, **options)

    def _get_static_cache_init_shape(self) -> Any:
        dtypes_agree = self.shadow.dtype == self.dtype
        uniform = decoding.has_uniform_layers(self.base, self.adapter_set.shadows, dtypes_agree)
        return super()._get_static_cache_init_shape() if uniform else None  # None: each layer allocates itself in use

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **options: Any) -> Any:
        decoding.check_no_early_exit(generation_config)
        return super()._get_candidate_generator(generation_config, *args, **options)


def _columns(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the columns of x (B, T, …) that ``logits_to_keep`` selects; 0 for all."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, logits_to_keep]
