"""Decide how many tokens to draft in each cycle of speculative decoding."""

from collections.abc import Sequence
from math import prod

DECAY = 0.9  # weight of a cycle's statistics one cycle later


class DraftScheduler:
    """Draft for as long as one more token is likely to save more than it costs.

    Costs are in forwards of the target model over one token. One more draft token costs ``draft_cost``, and ``verify_cost``
    in the verification. If it and all before it are accepted it saves what a token costs at present, spent / gained. So
    draft on while

        Π min(1, c · confidence) · spent / gained > draft_cost + verify_cost

    with c the share of verified tokens that were accepted, divided by their mean confidence: it calibrates the draft
    model's confidence. Statistics decay; where nothing is drafted c rises again, so that drafting is tried again.

    Args:
        draft_cost: cost of one draft token; a first estimate where ``timed``.
        verify_cost: cost of one more token in a verification.
        threshold: draft on while the draft model's confidence is at least this, instead of weighing costs.
        timed: estimate ``draft_cost`` from the durations that `record_cycle` receives.
    """

    def __init__(self, draft_cost: float, verify_cost: float, threshold: float | None = None, timed: bool = False):
        self.draft_cost, self.verify_cost, self.threshold, self.timed = draft_cost, verify_cost, threshold, timed
        self.accepted, self.expected = 3.0, 4.0
        self.spent, self.gained = 2.0, 3.0
        self.times = [0.0] * 4  # seconds and number of draft tokens, seconds and cost of verifications
        self.odds = 1.0
        self.cycles = self.drafted = self.written = 0

    @property
    def ignores_confidence(self) -> bool:
        """Whether every token is drafted, whatever the draft model's confidence."""
        return self.threshold is not None and self.threshold <= 0

    def should_draft(self, confidence: Sequence[float]) -> bool:
        """Return whether to draft a token in which the draft model has this confidence, by row.

        It is called before the token is drawn: a decision that depended on the token would change the distribution.
        """
        if self.threshold is not None:
            return all(one >= self.threshold for one in confidence)
        self.odds = self._odds(confidence)
        return self._pays(self.odds)

    def could_draft(self, rows: int) -> bool:
        """Return whether a draft token would pay if the draft model had full confidence in so many rows."""
        return self.threshold is not None or self._pays(self._odds([1.0] * rows))

    def _odds(self, confidence: Sequence[float]) -> float:
        return self.odds * prod(min(1.0, self.accepted / self.expected * one) for one in confidence)

    def _pays(self, odds: float) -> bool:
        return odds * self.spent / self.gained > self.draft_cost + self.verify_cost

    def record_token(self, confidence: Sequence[float], accepted: Sequence[bool]) -> None:
        """Update the calibration by the verification of one draft token in each row."""
        self.accepted = DECAY * self.accepted + sum(accepted)
        self.expected = DECAY * self.expected + sum(confidence)

    def record_cycle(self, drafted: int, written: int, draft_seconds: float, verify_seconds: float) -> None:
        """Update the costs by one cycle.

        Args:
            drafted: tokens drafted and verified.
            written: tokens added to the text.
            draft_seconds: duration of drafting.
            verify_seconds: duration of the verification.
        """
        self.cycles, self.drafted, self.written = self.cycles + 1, self.drafted + drafted, self.written + written
        self.odds = 1.0
        if not drafted:
            self.expected *= DECAY**0.5
        verification = 1 + self.verify_cost * drafted
        if self.timed:
            now = (draft_seconds, drafted + 1, verify_seconds, verification)
            self.times = [DECAY * before + new for before, new in zip(self.times, now, strict=True)]
            self.draft_cost = self.times[0] / self.times[1] / (self.times[2] / self.times[3])
        self.spent = DECAY * self.spent + verification + self.draft_cost * (drafted + 1)
        self.gained = DECAY * self.gained + written
