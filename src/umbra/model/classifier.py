"""`ShadowForSequenceClassification`: a classifier and its shadow; `forward` dispatches to one of three ways to run them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from umbra.base import architectures
from umbra.errors import ConfigError
from umbra.method.head_inputs import HeadInputs
from umbra.method.losses import as_classes, classification_loss
from umbra.model.checks import check_one_adapter, detached_copy
from umbra.model.forward import Batch
from umbra.model.losses import Losses
from umbra.model.outputs import ShadowSequenceClassifierOutput
from umbra.model.shadow_model import ShadowModel

Items = Tensor | int | None


class ShadowForSequenceClassification(ShadowModel):
    """A classifier and its shadow: single-label, multi-label or regression, as the base's configuration says."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, num_items_in_batch: Items = None, skip_logits: bool | None = None,
        return_dict: bool | None = None, adapter_names: Sequence[str | None] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run base and shadow.

        Args:
            input_ids: (B, T).
            attention_mask: as in transformers, like ``position_ids``, ``past_key_values`` and ``use_cache``.
            position_ids: (B, T).
            past_key_values: the cache that base and shadow share.
            inputs_embeds: (B, T, D), in place of ``input_ids``.
            labels: (B,) classes, (B,) or (B, C) values for regression, (B, C) of 0 and 1 for multi-label.
            use_cache: whether to return a cache.
            num_items_in_batch: the number of labels in the whole accumulated batch, by which both losses are divided.
            skip_logits: has no effect: class logits are cheap.
            return_dict: False for a tuple, in the order of the base's own; by default as the configuration says.
            adapter_names: the adapter of each of the B rows, None for the bare base; by default the active one for all.
            kwargs: further arguments of the base.

        Returns:
            ShadowSequenceClassifierOutput with ``logits`` (B, C); losses as in `ShadowForCausalLM`.

        Raises:
            ConfigError: an argument that neither this model nor its base has; labels that are not classes.
        """
        batch = self._batch(kwargs, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        labels, problem_type = self._read_labels(labels)
        if self.attachment.is_disabled:
            return self.runner.run_bare(batch, labels=labels, return_dict=return_dict)
        if self.attachment.only == "shadow":
            check_one_adapter(adapter_names)
            values = self._forward_shadow(batch, labels, problem_type, num_items_in_batch)
        else:
            if labels is None:
                self.guard.warn_without_labels(self.training)
            values = self._forward_attached(batch, labels, problem_type, num_items_in_batch, adapter_names)
        return self._output(ShadowSequenceClassifierOutput, values, batch, return_dict)

    def _read_labels(self, labels: Tensor | None) -> tuple[Tensor | None, str]:
        """Return the labels and the kind of problem that they pose, "" without labels; check classes."""
        architectures.pad_alike(self.config, self.base.config)
        if labels is None:
            return None, ""
        kind = architectures.problem_type(self.base.config, labels)
        for config in cast(list[Any], [self.base.config, self.config]):
            config.problem_type = kind  # as in transformers' classifiers: pipelines read it there
        if kind == "single_label_classification":
            labels = as_classes(labels, architectures.head_width(self.base_head))
        return labels, kind

    def _forward_shadow(self, batch: Batch, labels: Tensor | None, problem_type: str, items: Items) -> dict[str, Any]:
        """Return the output by name of the shadow without its base."""
        logits = self._shadow_logits(batch, self.runner.initial_state_alone(batch))
        loss = None if labels is None else classification_loss(logits, labels, problem_type, items)
        return {"loss": loss, "logits": logits, "shadow_loss": detached_copy(loss)}

    def _forward_attached(
        self, batch: Batch, labels: Tensor | None, problem_type: str, items: Items,
        adapter_names: Sequence[str | None] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the output by name of the attached path, with the losses of both paths."""
        route = self.runner.route(batch, adapter_names, self.training)
        self.runner.prepare_cache(batch, route, self.training)
        heads, states = HeadInputs([(rows, shadow.heads) for shadow, rows in route]), []
        values = self.runner.run(batch, route, heads, states.append if adapter_names is None else None)
        if labels is not None:
            shadow_loss = None
            if states and self.guard.shadow_weight() > 0:
                shadow_loss = classification_loss(self._shadow_logits(batch, states[0]), labels, problem_type, items)
            task = classification_loss(values["logits"], labels, problem_type, items)
            values |= {"loss": self._total(Losses(task, shadow_loss)), "shadow_loss": shadow_loss}
        return values

    def _shadow_logits(self, batch: Batch, s0: Tensor) -> Tensor:
        """Return (B, C), from the last token's row of s⁰ (B, T, D)."""
        shadow = self.adapter_set.active
        pooled = s0[torch.arange(len(s0), device=s0.device), self._last_token(batch, s0)]
        head = shadow.heads["shadow"] if shadow.heads else self.base_head
        dtype = shadow.dtype if shadow.heads else self.base.dtype
        return head(architectures.head_input(self.base, pooled).to(dtype))

    def _last_token(self, batch: Batch, s0: Tensor) -> Tensor:
        """Return (B,), the rightmost token that is not padding, by the rule of transformers' classifiers.

        Raises:
            ConfigError: there are several rows, and no padding token that shows where each of them ends.
        """
        pad, input_ids = architectures.pad_token_id(self.base.config), batch["input_ids"]
        if pad is None and len(s0) != 1:
            raise ConfigError(
                f"A batch of {len(s0)} rows needs a padding token to tell where each ends: set model.config.pad_token_id, or "
                "pass one row at a time."
            )
        if input_ids is None or pad is None:
            return torch.full((len(s0),), s0.shape[1] - 1, device=s0.device)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((input_ids != pad) * positions).argmax(-1).to(s0.device)
