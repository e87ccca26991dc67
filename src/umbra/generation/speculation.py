"""Speculative decoding as such, whoever drafts (Leviathan et al., 2023, arXiv 2211.17192).

p is the verifier's next-token distribution, q the drafter's, both after the logits processors.

    accept   a drafted token d with probability min(1, p(d) / q(d)), otherwise draw from norm(max(p − q, 0)):
             either way the token is distributed as p. Greedy: d is accepted where it is argmax p, which is taken anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

FADE = 0.9  # what a cycle's figures still weigh one cycle later


@dataclass
class Drafted:
    """One drafted token of each row.

    Args:
        tokens: (B,).
        q: (B, V), the distribution that they were drawn from; None in greedy decoding.
        sure: of each row that counts, the drafter's probability of its likeliest token; 1 where nobody asked.
    """

    tokens: Tensor
    q: Tensor | None
    sure: list[float]


def accept(p: Tensor, drafted: Drafted) -> tuple[Tensor, Tensor]:
    """Tokens (B,) distributed as p (B, V), and which of them are the drafted ones (B,)."""
    tokens, q = drafted.tokens, drafted.q
    assert q is not None
    at = tokens[:, None]
    accepted = (torch.rand_like(p[:, :1]) * q.gather(1, at) < p.gather(1, at)).squeeze(1)
    if bool(accepted.all()):
        return tokens, accepted
    rest = (p - q).clamp_(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: nothing is left
    return torch.where(accepted, tokens, torch.multinomial(rest, 1).squeeze(1)), accepted


class Pace:
    """How far to draft: as long as one more token is likely to save more than it costs.

    Costs are in forwards of the verifier over one token. One more draft token costs ``draft``, and ``extra`` in the
    verification. If it and all before it are accepted it saves what a token costs at present, spent / gained. So draft on
    while

        Π min(1, c · sure) · spent / gained > draft + extra

    with c the share of tested tokens that were accepted, over the mean of their ``sure``: how far the drafter's confidence
    is to be trusted. Figures fade; where nothing is drafted c rises again, so that it is tried again.

    Args:
        draft, extra: the costs; ``draft`` is a first guess where ``timed``.
        threshold: draft on while the drafter is at least as sure as this, instead.
        timed: take ``draft`` from the times that `cycle` is told.
    """

    def __init__(self, draft: float, extra: float, threshold: float | None = None, timed: bool = False):
        self.draft, self.extra, self.threshold, self.timed = draft, extra, threshold, timed
        self.accepted, self.expected = 3.0, 4.0
        self.spent, self.gained = 2.0, 3.0
        self.times = [0.0] * 4  # seconds and number of draft tokens, seconds and cost of verifications
        self.odds = 1.0
        self.cycles = self.drafted = self.written = 0

    @property
    def is_blind(self) -> bool:
        """Whether nobody asks how sure the drafter is."""
        return self.threshold is not None and self.threshold <= 0

    def goes_on(self, sure: Sequence[float]) -> bool:
        """Whether to draft the token that the drafter is so sure of in each row.

        Asked before the token is drawn: not to verify one because of what it is would change the distribution.
        """
        if self.threshold is not None:
            return all(one >= self.threshold for one in sure)
        self.odds = self._odds(sure)
        return self._pays(self.odds)

    def may_go_on(self, rows: int) -> bool:
        """Whether it could be worth to ask the drafter, if it were wholly sure in so many rows."""
        return self.threshold is not None or self._pays(self._odds([1.0] * rows))

    def _odds(self, sure: Sequence[float]) -> float:
        return self.odds * prod(min(1.0, self.accepted / self.expected * one) for one in sure)

    def _pays(self, odds: float) -> bool:
        return odds * self.spent / self.gained > self.draft + self.extra

    def learn(self, sure: Sequence[float], accepted: Sequence[bool]) -> None:
        """What became of one drafted token in each row."""
        self.accepted = FADE * self.accepted + sum(accepted)
        self.expected = FADE * self.expected + sum(sure)

    def cycle(self, drafted: int, written: int, drafting: float, verifying: float) -> None:
        """Account for a cycle: tokens drafted and written, and the seconds of both parts."""
        self.cycles, self.drafted, self.written = self.cycles + 1, self.drafted + drafted, self.written + written
        self.odds = 1.0
        if not drafted:
            self.expected *= FADE**0.5
        verification = 1 + self.extra * drafted
        if self.timed:
            now = (drafting, drafted + 1, verifying, verification)
            self.times = [FADE * before + new for before, new in zip(self.times, now, strict=True)]
            self.draft = self.times[0] / self.times[1] / (self.times[2] / self.times[3])
        self.spent = FADE * self.spent + verification + self.draft * (drafted + 1)
        self.gained = FADE * self.gained + written


class Text:
    """A batch of texts that grow together, a token a row at a time.

    Processors, criteria and streamer are called as in decoding without drafts, token for token: none of them sees a token
    that is not in the text. Rows go in lockstep. A cycle ends for all where the draft of one is rejected, which is
    lossless: a row's token is distributed as p whether it was drafted or drawn in place of a draft, and whether the row
    goes on never depends on what it would have said next.

    Args:
        ids: (B, T), the prompts.
    """

    def __init__(
        self, ids: Tensor, processors: Any, criteria: StoppingCriteriaList, config: GenerationConfig, streamer: Any,
        pace: Pace,
    ):  # fmt: skip
        self.ids, self.processors, self.criteria, self.streamer, self.pace = ids, processors, criteria, streamer, pace
        self.samples = bool(config.do_sample)
        self.scores: Any = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: Any = () if config.return_dict_in_generate and config.output_logits else None
        pad: Any = config._pad_token_tensor
        # As in transformers: without an end-of-text token, rows that have finished go on until all have.
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad = pad.to(ids.device) if ends else None
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.rows = list(range(len(ids)))  # those whose drafts count
        self.finished = False
        self.accepted = 0  # drafted tokens that stand in the text

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def pad_finished(self, tokens: Tensor) -> Tensor:
        """(B,) tokens, padding in rows that have finished."""
        if self.pad is None or len(self.rows) == len(tokens):
            return tokens
        return torch.where(self.unfinished, tokens, self.pad)

    def add(self, logits: Tensor, drafted: Drafted | None = None) -> bool:
        """Choose the next token of each row from the verifier's logits (B, V); whether what was drafted after it holds."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processors(self.ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        accepted = None
        if not self.samples:
            tokens = scores.argmax(-1)
            accepted = None if drafted is None else tokens == drafted.tokens
        elif drafted is None:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens, accepted = accept(scores.softmax(-1), drafted)
        tokens = self.pad_finished(tokens)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        ended = self.unfinished & self.criteria(self.ids, self.scores)  # type: ignore[arg-type]
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        goes_on = False
        if accepted is not None and drafted is not None:
            every = accepted.tolist()
            counting = [every[row] for row in self.rows]
            self.pace.learn(drafted.sure, counting)
            goes_on = all(counting)
            self.accepted += goes_on
        if not bool(ended.any()):
            return goes_on
        self.unfinished = self.unfinished & ~ended
        self.finished = not bool(self.unfinished.any())
        if self.pad is not None:
            self.rows = self.unfinished.nonzero().squeeze(1).tolist()
        return False  # rows that have finished are to be padded from here on
