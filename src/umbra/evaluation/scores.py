"""Scores of one mode, with counts and 95 % intervals, and their table."""

import math
from dataclasses import asdict, dataclass
from typing import Any

CASCADE = "cascade"
LIKELIHOOD = "base, likelihood"  # the base, which chooses among the allowed answers by their likelihood


@dataclass(frozen=True)
class Score:
    """Result of one mode.

    Args:
        mode: one of `MODES`, `LIKELIHOOD`, or `CASCADE`.
        correct: number of correct replies.
        total: number of records.
        accuracy: share of correct replies.
        low: lower bound of its 95 % interval (Wilson).
        high: upper bound of its 95 % interval.
        parameters: number of parameters that run.
        seconds: time of generation; None for the cascade.
        tokens_per_second: speed of generation; None for classifiers.
        escalated: number of escalated records; None if the shadow does not escalate.
        selective_accuracy: accuracy on the records that are not escalated.
        selective_low: lower bound of its 95 % interval.
        selective_high: upper bound of its 95 % interval.
    """

    mode: str
    correct: int
    total: int
    accuracy: float
    low: float
    high: float
    parameters: int
    seconds: float | None
    tokens_per_second: float | None
    escalated: int | None = None
    selective_accuracy: float | None = None
    selective_low: float | None = None
    selective_high: float | None = None

    @classmethod
    def of(
        cls, mode: str, replies: list[dict[str, Any]], parameters: int, seconds: float | None, tokens: int | None = None,
        escalation: str | None = None,
    ) -> "Score":  # fmt: skip
        """Return the score of replies.

        Args:
            mode: the mode.
            replies: see `score_generation` and `score_classes`.
            parameters: number of parameters that run.
            seconds: time of generation.
            tokens: number of generated tokens.
            escalation: text of an answer that escalates, if the shadow has one.
        """
        correct, total = sum(r["correct"] for r in replies), len(replies)
        speed = tokens / seconds if tokens is not None and seconds else None
        selective: dict[str, Any] = {}
        if escalation is not None:
            answered = [r for r in replies if not escalates(r, escalation)]
            selective["escalated"] = total - len(answered)
            if answered:
                right = sum(r["correct"] for r in answered)
                selective["selective_accuracy"] = right / len(answered)
                selective["selective_low"], selective["selective_high"] = wilson(right, len(answered))
        interval = wilson(correct, total)
        return cls(mode, correct, total, correct / total, *interval, parameters, seconds, speed, **selective)


def escalates(reply: dict[str, Any], escalation: str) -> bool:
    """Return whether a reply begins with the escalation text."""
    return str(reply["reply"]).strip().startswith(escalation.strip())


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, 95 % by default. scipy has it too, but is an optional dependency."""
    p, zz = correct / total, z * z / total
    centre, spread = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / total + zz / total / 4) / (1 + zz)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def table(scores: list[Score]) -> str:
    """Return a Markdown table of scores."""
    escalates = any(s.escalated is not None for s in scores)
    more = " escalated | selective accuracy |" if escalates else ""
    rule = "|---|---:|---:|---:|---:|---:|" + ("---:|---:|" if escalates else "")
    head = f"| | accuracy | 95 % interval | correct | parameters | tokens/s |{more}\n{rule}"
    rows = []
    for s in scores:
        speed = "–" if s.tokens_per_second is None else f"{s.tokens_per_second:.0f}"
        rows.append(
            f"| {s.mode} | {100 * s.accuracy:.1f} % | {100 * s.low:.1f} – {100 * s.high:.1f} % "
            f"| {s.correct}/{s.total} | {s.parameters / 1e6:.1f} M | {speed} |" + (_selective(s) if escalates else "")
        )
    return "\n".join([head, *rows])


def _selective(s: Score) -> str:
    """Return the columns of a shadow that escalates."""
    if s.selective_accuracy is None or s.selective_low is None or s.selective_high is None:
        return f" {'–' if s.escalated is None else s.escalated} | – |"
    return f" {s.escalated} | {100 * s.selective_accuracy:.1f} % ({100 * s.selective_low:.1f} – {100 * s.selective_high:.1f}) |"


def as_json(scores: list[Score]) -> list[dict[str, Any]]:
    """Return the scores as plain values for JSON."""
    return [asdict(s) for s in scores]
