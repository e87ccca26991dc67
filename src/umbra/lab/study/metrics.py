"""Metrics: score one reply against the right answers with numbers between 0 and 1, the main one first."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, cast

from umbra.evaluation.scoring import answer_of

UNANSWERABLE, UNKNOWN = NO_ANSWER = ("unanswerable", "unknown")  # answers that mean "the text has no answer"
Metric = Callable[[str, Sequence[str], str | None], dict[str, float]]
# What judges of reasoning-gym raise for replies that they cannot parse.
UNPARSABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    AssertionError,
    RecursionError,
)


def exact(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Compare texts; a reply without a match of the pattern is wrong."""
    answer = answer_of(reply, pattern)
    return {"exact": float((bool(answer) or pattern is None) and any(answer == answer_of(r, pattern) for r in right))}


def number(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Compare numbers: 1,200 equals 1200.0."""
    answer = _decimal(answer_of(reply, pattern))
    return {"exact": float(answer is not None and any(answer == _decimal(answer_of(r, pattern)) for r in right))}


def _decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def squad(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Return SQuAD's F1 over words and exact match, without case, punctuation and articles.

    If the reply or a right answer says that there is no answer, F1 is the exact match. Written here because the metric of
    evaluate downloads its script from the hub.
    """
    text = answer_of(reply, pattern)
    if pattern is not None and not text:
        return {"f1": 0.0, "exact": 0.0}
    words, answers = _words(text), [_words(answer_of(r, pattern)) for r in right]
    same = float(any(words == a for a in answers))
    if any([word] in (words, *answers) for word in NO_ANSWER):
        return {"f1": same, "exact": same}
    return {"f1": max(_f1(words, a) for a in answers), "exact": same}


def has_answer(metric: str, right: str, pattern: str | None) -> bool:
    """Return whether replies can be compared with a right answer."""
    answer = answer_of(right, pattern)
    return _decimal(answer) is not None if metric == "number" else pattern is None or bool(answer)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(words: list[str], right: list[str]) -> float:
    shared = sum((Counter(words) & Counter(right)).values())
    if not words or not right or not shared:
        return float(words == right)
    return 2 * shared / (len(words) + len(right))


def puzzle(reply: str, row: dict[str, Any], pattern: str | None = None) -> dict[str, float]:
    """Score a reply with reasoning-gym's judge, which may accept several answers.

    Args:
        reply: The text of the model.
        row: The row that the generator has made.
        pattern: A regular expression whose last match is the answer.
    """
    judge = _judge(row["metadata"]["source_dataset"])
    try:
        return {"exact": float(judge(answer_of(reply, pattern), row) >= 1)}
    except UNPARSABLE:
        judge(row["answer"], row)  # raises if the judge itself is at fault, and not the reply
        return {"exact": 0.0}


@cache
def _judge(generator: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return cast(Callable[[str, dict[str, Any]], float], reasoning_gym.get_score_answer_fn(generator))


METRICS: dict[str, Metric] = {"exact": exact, "number": number, "squad": squad}
PUZZLE = "puzzle"  # scored by the judge of the generator
LOSS = "loss"  # nats/token, lower is better
DISPLAY_NAMES = {"exact": "accuracy", "number": "accuracy", "puzzle": "accuracy", "squad": "F1"}
