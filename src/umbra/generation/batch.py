"""The texts of one speculative decoding, and the acceptance rule (Leviathan et al., 2023, arXiv 2211.17192).

p is the target model's next-token distribution, q the draft model's, both after the logits processors.

    accept   a draft token d with probability min(1, p(d) / q(d)), otherwise draw from norm(max(p − q, 0)): either way the
             token is distributed as p. Greedy: d is accepted where it is argmax p, and argmax p is taken anyway.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from umbra.base.private_transformers import pad_token
from umbra.generation.scheduler import DraftScheduler


class Streamer(Protocol):
    """A streamer of transformers."""

    def put(self, value: Tensor) -> None:
        """Receive new tokens."""
        ...

    def end(self) -> None:
        """Receive the end of the text."""
        ...


@dataclass
class DraftTokens:
    """One draft token of each row.

    Args:
        tokens: (B,).
        q: (B, V), the distribution that they were drawn from; None in greedy decoding.
        confidence: for each unfinished row, the probability of the draft model's most likely token; 1 where it is not needed.
    """

    tokens: Tensor
    q: Tensor | None
    confidence: list[float]


def accept(p: Tensor, draft: DraftTokens) -> tuple[Tensor, Tensor]:
    """Return tokens (B,) distributed as p (B, V), and whether each is its draft token (B,)."""
    tokens, q = draft.tokens, draft.q
    assert q is not None
    column = tokens[:, None]
    accepted = (torch.rand_like(p[:, :1]) * q.gather(1, column) < p.gather(1, column)).squeeze(1)
    if bool(accepted.all()):
        return tokens, accepted
    residual = (p - q).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)  # p = q up to rounding: nothing is left
    return torch.where(accepted, tokens, torch.multinomial(residual, 1).squeeze(1)), accepted


class DecodingBatch:
    """A batch of texts that grow together, one token per row at a time.

    Processors, criteria and streamer are called as in decoding without drafts, token for token: none of them sees a token
    that is not in the text. Rows advance in lockstep. A cycle ends for all rows where the draft of one is rejected, which is
    lossless: a row's token is distributed as p whether it was drafted or drawn in place of a draft, and whether the row
    continues never depends on its next token.

    Args:
        ids: (B, T), the prompts.
        processors: the logits processors.
        criteria: the stopping criteria.
        config: of this generation.
        streamer: receives the tokens, or None.
        scheduler: receives the outcome of each verified draft token.
    """

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Streamer | None,
        scheduler: DraftScheduler,
    ):
        self.ids, self.processors, self.criteria = ids, processors, criteria
        self.streamer, self.scheduler = streamer, scheduler
        self.samples = bool(config.do_sample)
        returns_dict = config.return_dict_in_generate
        self.scores: tuple[Any, ...] | None = () if returns_dict and config.output_scores else None
        self.logits: tuple[Any, ...] | None = () if returns_dict and config.output_logits else None
        # As in transformers: without an end-of-text token, rows that have finished continue until all have.
        self.pad = pad_token(config, ids.device) if _has_end_of_text(criteria) else None
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.unfinished_rows = list(range(len(ids)))
        self.finished = False
        self.num_accepted = 0  # draft tokens in the text

    @property
    def length(self) -> int:
        """The number of tokens of each row, prompt included."""
        return self.ids.shape[1]

    def pad_finished(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B,) with padding in rows that have finished."""
        if self.pad is None or len(self.unfinished_rows) == len(tokens):
            return tokens
        return torch.where(self.unfinished, tokens, self.pad)

    def append(self, logits: Tensor, draft: DraftTokens | None = None) -> bool:
        """Append the next token of each row.

        Args:
            logits: (B, V) of the target model.
            draft: the draft tokens of this position, or None.

        Returns:
            Whether the draft tokens that follow still apply.
        """
        tokens, accepted = self._choose(logits, draft)
        tokens = self.pad_finished(tokens)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        ended = self.unfinished & self.criteria(self.ids, self.scores)  # type: ignore[arg-type]
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        continues = False
        if accepted is not None and draft is not None:
            by_row = accepted.tolist()
            counted = [by_row[row] for row in self.unfinished_rows]
            self.scheduler.record_token(draft.confidence, counted)
            continues = all(counted)
            self.num_accepted += continues
        if not bool(ended.any()):
            return continues
        self.unfinished = self.unfinished & ~ended
        self.finished = not bool(self.unfinished.any())
        if self.pad is not None:
            self.unfinished_rows = self.unfinished.nonzero().squeeze(1).tolist()
        return False  # rows that have finished are padded from here on

    def _choose(self, logits: Tensor, draft: DraftTokens | None) -> tuple[Tensor, Tensor | None]:
        """Return the next tokens (B,), and whether each is its draft token (B,), None without draft tokens."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processors(self.ids, logits)  # type: ignore[arg-type]
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if not self.samples:
            tokens = scores.argmax(-1)
            return tokens, None if draft is None else tokens == draft.tokens
        if draft is None:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1), None
        return accept(scores.softmax(-1), draft)


def _has_end_of_text(criteria: Iterable[object]) -> bool:
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)
