"""Intervals and differences that know both sources of noise: how a run began, and which items were asked.

Scores are arrays (S, N): S seeds, N items that all of them were asked. A difference is paired, seed by seed and item by item. In
the model d[s, n] = μ + seed[s] + item[n] + rest[s, n] the variance of the mean is estimated by

    V = var_s(mean_n d) / S + var_n(mean_s d) / N

which counts the rest in both terms. The interval is Student's, with Satterthwaite's degrees of freedom. Three seeds tell little of
their own variance: a bootstrap over them would hide that, Student's t with two degrees of freedom does not. In simulations of
three seeds and a hundred items the intervals hold the truth in 92 to 99 % (tests/test_evaluate_data.py); with the rest taken out
of one term they hold it in 90 to 98 %.

Where all N values are alike no variance can be estimated. Up to a share q = 1 − 0.025^(1/N) may then differ (Clopper and Pearson),
each by the range of a value: the mean is uncertain by q times that.

Where answers are right or wrong and few differ, Student's t makes too much of these: four of 200 items, all for one side, it calls
a win. So the exact sign test is asked, too, over the items' means over seeds, those at zero left out (of one seed it is McNemar's
test): where it does not tell the sides apart, an interval without zero is widened until zero is its border, which is a tie. Six
items that all speak for one side are a win, five a tie, however many others do not differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval at `LEVEL`, and how many seeds and items it rests on; ``asked`` seeds, where some are missing.

    Without items, of which a score was given as a whole, the interval is of the seeds alone, and no verdict rests on it.
    """

    mean: float
    low: float
    high: float
    seeds: int
    items: int
    asked: int = 0

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> str:
        """Of a difference: win, loss, or tie where the interval holds 0; nothing without items."""
        if not self.items:
            return ""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def estimate(scores: np.ndarray, span: float = 1.0) -> Estimate:
    """Of scores (S, N), or of paired differences of them.

    Args:
        span: range of a value where all are alike; 2 of a difference of shares, 0 of what has none.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    seeds, items = scores.shape
    mean = float(scores.mean())
    of_seeds, of_items = scores.mean(1), scores.mean(0)
    variance_seeds, variance_items = _variance(of_seeds) / seeds, _variance(of_items) / items
    variance = variance_seeds + variance_items
    if variance == 0:
        alike = items if items > 1 else seeds
        half = span * (1 - ((1 - LEVEL) / 2) ** (1 / alike)) if alike > 1 else math.inf
        return Estimate(mean, mean - half, mean + half, seeds, items)
    parts = [(v, n - 1) for v, n in ((variance_seeds, seeds), (variance_items, items)) if v > 0]
    freedom = sum(v for v, _ in parts) ** 2 / sum(v**2 / n for v, n in parts)
    half = float(student.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, seeds, items)


def _variance(values: np.ndarray) -> float:
    """0 of one value, and of what differs by rounding alone."""
    alike = np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max()))
    return 0.0 if alike else float(values.var(ddof=1))


def difference(ours: dict[int, list[float]], theirs: dict[int, list[float]]) -> Estimate | None:
    """Ours less theirs, over the seeds that both have; None where they have none in common or were asked different items."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared or len({len(side[s]) for side in (ours, theirs) for s in shared}) != 1:
        return None
    a, b = (np.array([side[s] for s in shared], float) for side in (ours, theirs))
    found = estimate(a - b, span=2)
    if np.isin([a, b], (0, 1)).all() and found.verdict != "tie" and mcnemar(a.sum(0), b.sum(0)) >= 1 - LEVEL:
        border = 2 * found.mean
        found = replace(found, low=min(0.0, border), high=max(0.0, border))
    return found


def mcnemar(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """McNemar's exact p of two runs that were right or wrong on the same items; of several, summed up, that of the sign test."""
    ahead = sum(a > b for a, b in zip(ours, theirs, strict=True))
    behind = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
