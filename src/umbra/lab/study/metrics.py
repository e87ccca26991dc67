"""How one answer is scored: a reply and the answers that are right become numbers between 0 and 1, the chief one first."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from umbra.evaluation.scoring import answer_of

UNANSWERABLE, UNKNOWN = NO_ANSWER = ("unanswerable", "unknown")  # what is said where a text holds no answer
Metric = Callable[[str, Sequence[str], str | None], dict[str, float]]


def exact(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Whether the answers are the same text; a reply in which the pattern finds none is wrong."""
    said = answer_of(reply, pattern)
    return {"exact": float((bool(said) or pattern is None) and any(said == answer_of(r, pattern) for r in right))}


def number(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Whether the answers are the same number: 1,200 and 1200.0 are."""
    said = _decimal(answer_of(reply, pattern))
    return {"exact": float(said is not None and any(said == _decimal(answer_of(r, pattern)) for r in right))}


def _decimal(text: str) -> Decimal | None:
    try:
        found = Decimal(text.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def squad(reply: str, right: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """SQuAD's: F1 over the words of the answers, and whether they are the same; case, punctuation and articles do not count.

    That there is no answer is right or wrong as a whole.
    """
    text = answer_of(reply, pattern)
    if pattern is not None and not text:
        return {"f1": 0.0, "exact": 0.0}
    said, answers = _words(text), [_words(answer_of(r, pattern)) for r in right]
    same = float(any(said == a for a in answers))
    if any([word] in (said, *answers) for word in NO_ANSWER):
        return {"f1": same, "exact": same}
    return {"f1": max(_f1(said, a) for a in answers), "exact": same}


def has_answer(metric: str, right: str, pattern: str | None) -> bool:
    """Whether a right answer is one that replies can be held to."""
    found = answer_of(right, pattern)
    return _decimal(found) is not None if metric == "number" else pattern is None or bool(found)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], right: list[str]) -> float:
    shared = sum((Counter(said) & Counter(right)).values())
    if not said or not right or not shared:
        return float(said == right)
    return 2 * shared / (len(said) + len(right))


def puzzle(reply: str, row: dict[str, Any], pattern: str | None = None) -> dict[str, float]:
    """Whether reasoning-gym holds the answer to this row of its own for fully right: there may be several that are."""
    judge = _judge(row["metadata"]["source_dataset"])
    try:
        return {"exact": float(judge(answer_of(reply, pattern), row) >= 1)}
    except Exception:  # some judges read numbers without looking, and raise at words
        judge(row["answer"], row)  # but not at the right answer: then the judge is at fault, and says so
        return {"exact": 0.0}


@cache
def _judge(generator: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(generator)  # type: ignore[return-value]


METRICS: dict[str, Metric] = {"exact": exact, "number": number, "squad": squad}
PUZZLE = "puzzle"  # judged by what generated it
LOSS = "loss"  # nats a token, of which less is better
CHIEF = {
    "exact": "accuracy",
    "number": "accuracy",
    "puzzle": "accuracy",
    "squad": "F1",
}  # what the chief number is called
