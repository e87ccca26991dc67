"""The shadow as draft model: it proposes tokens that the target model has not read yet."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import logits_process

from umbra.base import architectures, private_transformers, quantized
from umbra.generation.batch import DecodingBatch, DraftTokens
from umbra.generation.caches import invalidate_on_error
from umbra.method.kernels import product
from umbra.shadow.network import Shadow

# Processors that change a distribution without knowing which token is which: they can run on a part of the vocabulary.
WARPERS = (
    logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper, logits_process.TypicalLogitsWarper, logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper, logits_process.LogitNormalization, logits_process.InfNanRemoveLogitsProcessor,
)  # fmt: skip
# Processors with a memory of their calls, or with a callback that may have one: they must see each token of the text once,
# and no other.
STATEFUL = (
    logits_process.SynthIDTextWatermarkLogitsProcessor, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
)  # fmt: skip


class TargetModel(Protocol):
    """A language model that verifies the drafts of its shadow."""

    base: PreTrainedModel

    @property
    def base_head(self) -> nn.Module:
        """The base's task head."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        ...

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of one decoding step."""
        ...

    def draft_state(self, shadow: Shadow, batch: dict[str, Any]) -> Tensor:
        """Return s⁰ (B, T, D) of a batch, by the shadow alone."""
        ...

    def verify(self, shadow: Shadow, s0: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the attached logits (B, T, V) of a batch whose s⁰ (B, T, D) is known."""
        ...


@dataclass
class Computed:
    """Tokens that the layers of the base and of the shadow have computed in one cycle."""

    base: int = 0
    shadow: int = 0


class DraftModel:
    """The drafting half of a cycle.

    Args:
        model: the target model.
        shadow: the draft model.
        cache: a view of the shared cache in which the shadow may be ahead of the base.
        batch: the texts.
        num_logits: V, of the attached logits.
    """

    def __init__(self, model: TargetModel, shadow: Shadow, cache: Cache, batch: DecodingBatch, num_logits: int):
        self.model, self.shadow, self.cache, self.batch, self.num_logits = model, shadow, cache, batch, num_logits
        self.head = DraftHead(model, shadow, batch.ids.device)
        # A custom processor may remember its calls, and must not see tokens that may never be in the text.
        builtin = [p for p in batch.processors if type(p).__module__ == logits_process.__name__]
        self.processors = [p for p in builtin if not isinstance(p, STATEFUL)]
        self.only_warpers = all(isinstance(p, WARPERS) for p in self.processors)

    def draft(
        self, limit: int, model_kwargs: dict[str, Any], computed: Computed
    ) -> tuple[list[Tensor], list[DraftTokens]]:
        """Draft tokens until the scheduler stops.

        Args:
            limit: the largest number of draft tokens.
            model_kwargs: of the forward over the whole text.
            computed: updated in place.

        Returns:
            s⁰ (B, 1, D) of the last token of the text and of each draft token, and the draft tokens.
        """
        ids, states, drafts = self.batch.ids, [], []
        padded = torch.cat([ids, ids[:, -1:].expand(-1, limit)], 1)
        prepared, mask = prepare_step(self.model, padded, model_kwargs, limit)
        positions = prepared.get("position_ids")
        while True:
            remaining, count = limit - len(drafts), len(drafts)
            step = {
                "input_ids": ids[:, -1:].to(prepared["input_ids"].device), "inputs_embeds": None,
                "past_key_values": self.cache, "use_cache": True,
                "attention_mask": mask if mask is None else mask[:, : mask.shape[1] - remaining],
                "position_ids": positions if positions is None else positions[..., count : count + 1],
            }  # fmt: skip
            with invalidate_on_error(model_kwargs["past_key_values"]):
                states.append(self.model.draft_state(self.shadow, step))
                computed.shadow += 1
            proposed = self._propose(ids, states[-1][:, -1]) if remaining else None
            if proposed is None:
                return states, drafts
            drafts.append(proposed)
            ids = torch.cat([ids, proposed.tokens[:, None]], 1)

    def _propose(self, ids: Tensor, s0: Tensor) -> DraftTokens | None:
        """Return the tokens after ``ids`` (B, T), from s⁰ (B, D) of the last; None where drafting them does not pay."""
        batch, scheduler = self.batch, self.batch.scheduler
        if not scheduler.could_draft(len(batch.unfinished_rows)):
            return None
        scores = self.head(s0).to(ids.device)
        subset = self.head.tokens
        if subset is not None and self.processors and not self.only_warpers:
            scores, subset = self._scatter(scores, subset, -torch.inf), None
        for processor in self.processors:
            scores = processor(ids, scores)
        confidence = [1.0] * len(batch.unfinished_rows)
        if not batch.samples and scheduler.ignores_confidence:
            tokens = scores.argmax(-1)
            return DraftTokens(batch.pad_finished(tokens if subset is None else subset[tokens]), None, confidence)
        q = scores.softmax(-1).nan_to_num(1 / scores.shape[-1])  # where the processors left no token
        highest, tokens = q.max(-1)
        if not scheduler.ignores_confidence:
            if scheduler.threshold is not None or not batch.samples:
                by_row = highest.tolist()
                confidence = [by_row[row] for row in batch.unfinished_rows]
            if not scheduler.should_draft(confidence):
                return None
        if not batch.samples:
            return DraftTokens(batch.pad_finished(tokens if subset is None else subset[tokens]), None, confidence)
        tokens = torch.multinomial(q, 1).squeeze(1)
        if subset is not None:
            q, tokens = self._scatter(q, subset, 0.0), subset[tokens]
        return DraftTokens(batch.pad_finished(tokens), q, confidence)

    def _scatter(self, values: Tensor, subset: Tensor, fill: float) -> Tensor:
        """Return values (B, N) of the draft vocabulary (N,) as values (B, V) of the whole one."""
        return values.new_full((len(values), self.num_logits), fill).index_copy_(1, subset, values)


class DraftHead:
    """The shadow's head on its draft vocabulary.

    Args:
        model: with the base's head, for a shadow without trained heads.
        shadow: the draft model.
        device: of the text.
    """

    def __init__(self, model: TargetModel, shadow: Shadow, device: torch.device):
        self.base = model.base
        self.head = shadow.heads["shadow"] if shadow.heads else model.base_head
        self.dtype = next(shadow.heads.parameters()).dtype if shadow.heads else model.base.dtype
        self.factor, self.cap = architectures.after_head(model.base.config)
        self.tokens: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if shadow.draft_tokens is not None:
            weight, bias = quantized.linear_weight(self.head, self.dtype), architectures.bias_of(self.head)
            self.tokens = torch.tensor(shadow.draft_tokens, device=device)
            if not weight.is_meta:  # an offloaded head runs as a whole
                rows = self.tokens.to(weight.device)
                self.weight, self.bias = weight[rows], None if bias is None else bias[rows]

    def __call__(self, s0: Tensor) -> Tensor:
        """Return logits (B, N) in float32 for s⁰ (B, D)."""
        x = architectures.head_input(self.base, s0).to(self.dtype)
        if self.weight is not None:
            logits = product(x.to(self.weight.device), self.weight, self.bias)
        else:
            logits = self.head(x) if self.tokens is None else self.head(x)[:, self.tokens.to(x.device)]
        logits = logits.float() * self.factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def prepare_step(
    model: TargetModel, ids: Tensor, model_kwargs: dict[str, Any], num_draft_tokens: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Prepare a forward over the last token of a text and the draft tokens after it.

    Args:
        model: the target model.
        ids: (B, T), the text and its draft tokens.
        model_kwargs: of the text without draft tokens.
        num_draft_tokens: the number of draft tokens in ``ids``.

    Returns:
        The arguments of the forward, and the mask (B, T) of the whole text.
    """
    model_kwargs = private_transformers.update_model_kwargs(
        model, {}, dict(model_kwargs), num_new_tokens=num_draft_tokens
    )
    prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=num_draft_tokens + 1, **model_kwargs)
    return prepared, model_kwargs.get("attention_mask")
