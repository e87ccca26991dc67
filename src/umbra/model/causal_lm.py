"""`ShadowForCausalLM`: a language model and its shadow; `forward` dispatches to one of four ways to run them."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from umbra.base import architectures
from umbra.config import ShadowConfig
from umbra.errors import StateError
from umbra.generation.drafting import Drafting
from umbra.method.head_inputs import HeadInputs
from umbra.method.hooks import Attachment
from umbra.method.losses import IGNORED, token_loss
from umbra.model.checks import check_one_adapter, detached_copy
from umbra.model.forward import Batch, input_of
from umbra.model.labels import LabelArguments, Labels
from umbra.model.losses import LanguageModelLosses
from umbra.model.outputs import ShadowCausalLMOutput
from umbra.model.shadow_model import ShadowModel
from umbra.shadow.network import Shadow

Items = Tensor | int | None


class ShadowForCausalLM(ShadowModel, Drafting):
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
        self.runner.settle_use_cache(batch)
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

    # -- TEMPORARY: names that generation/drafting.py and decoding.py read -----------------------------------------

    @property
    def _is_disabled(self) -> bool:
        return self.attachment.is_disabled

    @property
    def _only(self) -> str | None:
        return self.attachment.only

    @property
    def _attachment(self) -> Attachment:
        return self.attachment

    @property
    def _cache_argument(self) -> str:
        return self.runner.cache_argument

    def _named(self, names: Sequence[str | None] | None) -> list[Shadow]:
        return self.adapter_set.select(names)

    def _call_base(self, batch: Batch, **options: Any) -> Any:
        return self.runner.call_base(batch, **options)

    def _initial_state(self, batch: Batch, shadow: Shadow) -> Tensor:
        return self.runner.initial_state(batch, shadow)

    def _seen_by(self, shadow: Shadow, batch: Batch, given: dict[str, Any]) -> Batch:
        return self.runner.inputs_of(shadow, batch, given)


def _columns(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the columns of x (B, T, …) that ``logits_to_keep`` selects; 0 for all."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, logits_to_keep]
