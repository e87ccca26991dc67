"""Confidence intervals and paired differences that account for two sources of noise: the seed of a run and the test items.

Scores are arrays (S, N): S seeds, N items that are the same for all seeds. A difference is paired, seed by seed and item by
item. In the model d[s, n] = μ + seed[s] + item[n] + residual[s, n] the variance of the mean is estimated by

    V = var_s(mean_n d) / S + var_n(mean_s d) / N

which counts the residual in both terms. The interval is Student's, with Satterthwaite's degrees of freedom. Three seeds say
little about their variance: a bootstrap over them would hide that, Student's t with two degrees of freedom does not. In
simulations of three seeds and a hundred items the intervals cover the true mean in 92 to 99 % of cases
(tests/lab/test_statistics.py); without the residual in one of the terms, in 90 to 98 %. Neither scipy nor statsmodels has this
estimator; quantiles and exact tests are scipy's.

If all N values are equal, no variance can be estimated. Up to a share q = 1 − 0.025^(1/N) of the items may then differ
(Clopper and Pearson), each by the range of a value: the mean is uncertain by q times that range.

If answers are right or wrong and few of them differ, Student's t overstates the evidence: it calls four of 200 items, all in
favour of one side, a win. Therefore the exact sign test over the items' sums over seeds must agree (for one seed it is McNemar's
test): otherwise the interval is widened until it touches zero, which is a tie. Six differing items in favour of one side are a
win, five a tie, however many others do not differ.
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
    """A mean with its confidence interval at `LEVEL`.

    Args:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Number of seeds.
        items: Number of items; 0 if only the score as a whole is known: the interval then covers seeds alone.
        planned_seeds: Number of seeds of the study, of which some may be missing.
    """

    mean: float
    low: float
    high: float
    seeds: int
    items: int
    planned_seeds: int = 0

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> str:
        """For a difference: win, loss, or tie if the interval contains 0; empty without items."""
        if not self.items:
            return ""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def estimate(scores: np.ndarray, span: float = 1.0) -> Estimate:
    """Estimate the mean of scores, or of paired differences of scores.

    Args:
        scores: Values (S, N).
        span: The range of a value, used if all values are equal: 2 for a difference of shares, 0 for values without a range.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    seeds, items = scores.shape
    mean = float(scores.mean())
    variance_seeds, variance_items = _variance(scores.mean(1)) / seeds, _variance(scores.mean(0)) / items
    variance = variance_seeds + variance_items
    if variance == 0:
        equal = items if items > 1 else seeds
        half_width = span * (1 - _exact_lower_bound(equal)) if equal > 1 else math.inf
        return Estimate(mean, mean - half_width, mean + half_width, seeds, items)
    parts = [(v, n - 1) for v, n in ((variance_seeds, seeds), (variance_items, items)) if v > 0]
    degrees = sum(v for v, _ in parts) ** 2 / sum(v**2 / n for v, n in parts)
    half_width = float(student.ppf(0.5 + LEVEL / 2, degrees)) * math.sqrt(variance)
    return Estimate(mean, mean - half_width, mean + half_width, seeds, items)


def _exact_lower_bound(count: int) -> float:
    """Return the Clopper–Pearson lower bound of a proportion after ``count`` successes of ``count``."""
    return float(binomtest(count, count).proportion_ci(LEVEL, method="exact").low)


def _variance(values: np.ndarray) -> float:
    """Return the sample variance; 0 for one value and for values that differ by rounding alone."""
    is_constant = np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max()))
    return 0.0 if is_constant else float(values.var(ddof=1))


def mean_of_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one value per seed, and half the width of its interval (Student's t); NaN for one seed."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    result = estimate(np.asarray(values, float)[:, None], span=0)
    return result.mean, result.half_width


def difference(ours: dict[int, list[float]], baseline: dict[int, list[float]]) -> Estimate | None:
    """Estimate the paired difference of two methods.

    Args:
        ours: By seed, the value of every item.
        baseline: The same of the method to subtract.

    Returns:
        The difference over their common seeds; None without any, or if the numbers of items differ.
    """
    shared = sorted(ours.keys() & baseline.keys())
    if not shared or len({len(side[s]) for side in (ours, baseline) for s in shared}) != 1:
        return None
    a, b = (np.array([side[s] for s in shared], float) for side in (ours, baseline))
    result = estimate(a - b, span=2)
    if np.isin([a, b], (0, 1)).all() and result.verdict != "tie" and mcnemar(a.sum(0), b.sum(0)) >= 1 - LEVEL:
        border = 2 * result.mean
        result = replace(result, low=min(0.0, border), high=max(0.0, border))
    return result


def mcnemar(ours: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> float:
    """Return McNemar's exact p-value for two runs that are right (1) or wrong (0) on the same items.

    For sums over several runs it is the p-value of the sign test. statsmodels has the same test, but would be a dependency for
    this line alone.
    """
    better = sum(a > b for a, b in zip(ours, baseline, strict=True))
    worse = sum(a < b for a, b in zip(ours, baseline, strict=True))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
