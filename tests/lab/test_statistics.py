"""Intervals, paired differences and their verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from umbra.lab.study.statistics import difference, estimate, mcnemar


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1.0])
def test_rounding_error_is_not_variance(value):
    assert difference({s: [value] * 3 for s in range(3)}, {s: [0.0] * 3 for s in range(3)}).verdict == "tie"


def test_one_seed_gives_the_t_interval_over_items():
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, 40)
    result, expected = estimate(d[None]), stats.ttest_1samp(d, 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_one_item_gives_the_t_interval_over_seeds():
    d = np.random.default_rng(1).normal(0.2, 1, 5)
    result, expected = estimate(d[:, None]), stats.ttest_1samp(d, 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("of_seeds", "of_items", "residual"), [(0.3, 0.0, 1.0), (0.0, 0.5, 1.0), (0.2, 0.5, 0.5), (0.05, 0.0, 0.1)]
)
def test_intervals_have_nominal_coverage(of_seeds, of_items, residual):
    """Three seeds and 100 items, drawn a thousand times: about 95 % hold the mean. Leaving either noise out would not do."""
    rng = np.random.default_rng(2)
    held = []
    for _ in range(1000):
        d = rng.normal(0, of_seeds, (3, 1)) + rng.normal(0, of_items, (1, 100)) + rng.normal(0, residual, (3, 100))
        result = estimate(d)
        held.append(result.low <= 0 <= result.high)
    assert 0.91 <= np.mean(held) <= 1.0


def test_differences_are_paired():
    rng = np.random.default_rng(3)
    hard = rng.random(200)
    ours = {s: (hard < 0.75).astype(float).tolist() for s in (0, 1, 2)}
    baseline = {s: (hard < 0.65).astype(float).tolist() for s in (0, 1, 2)}
    apart = difference(ours, baseline)
    assert apart is not None and apart.verdict == "win"
    assert difference(baseline, ours).verdict == "loss"
    assert difference(ours, ours).verdict == "tie"
    unpaired = math.hypot(
        estimate(np.array(list(ours.values()))).half_width, estimate(np.array(list(baseline.values()))).half_width
    )
    assert apart.half_width < unpaired / 1.2
    assert difference(ours, {5: baseline[0]}) is None
    assert difference(ours, {0: baseline[0][:-1]}) is None


@pytest.mark.parametrize(("items", "verdict"), [(1, "tie"), (2, "tie"), (5, "tie"), (6, "win"), (50, "win")])
def test_few_equal_differences_are_no_evidence(items, verdict):
    """All for one side: as McNemar's exact test judges it."""
    apart = difference({0: [1.0] * items}, {0: [0.0] * items})
    assert apart is not None and apart.verdict == verdict
    assert (mcnemar([1.0] * items, [0.0] * items) < 0.05) == (verdict == "win")


@pytest.mark.parametrize(("apart", "verdict"), [(4, "tie"), (5, "tie"), (6, "win")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_sign_test_decides_on_few_differing_items(apart, verdict, seeds):
    right, less = [1.0] * 100 + [0.0] * 100, [1.0] * (100 - apart) + [0.0] * (100 + apart)
    ours, baseline = (dict.fromkeys(range(seeds), side) for side in (right, less))
    result = difference(ours, baseline)
    assert result.verdict == verdict and (mcnemar(right, less) < 0.05) == (verdict == "win")
    assert result.mean == pytest.approx(apart / 200) and result.high - result.mean == pytest.approx(
        result.mean - result.low
    )
    assert (result.low == 0) == (verdict == "tie")
    back = difference(baseline, ours)
    assert (back.low, back.high) == pytest.approx((-result.high, -result.low))


def test_constant_scores_have_interval():
    """Clopper's and Pearson's; over seeds where there is one item; none where nothing is known."""
    low = stats.binomtest(9, 9).proportion_ci(method="exact").low
    assert estimate(np.ones((1, 9))).low == pytest.approx(low)
    assert estimate(np.ones((3, 1))).half_width == pytest.approx(1 - 0.025 ** (1 / 3))
    assert estimate(np.ones((1, 1))).half_width == math.inf and estimate(np.ones((3, 4)), span=0).half_width == 0


def test_mcnemar_is_exact():
    ours, baseline = [1.0] * 8 + [0.0] * 2, [0.0] * 6 + [1.0] * 2 + [0.0] * 2
    assert mcnemar(ours, baseline) == pytest.approx(2 * 0.5**6)
    assert mcnemar(ours, ours) == 1.0
