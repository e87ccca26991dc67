"""Which methods are compared with each other, and the paired differences between them."""

from typing import NamedTuple

from umbra.lab.study.methods import ATTACHED
from umbra.lab.study.results import Results, Variant
from umbra.lab.study.statistics import Estimate


class Comparison(NamedTuple):
    """The difference of two methods, trained on one task and tested on it or on another."""

    ours: Variant
    baseline: Variant
    trained: str
    tested: str
    difference: Estimate

    @property
    def task(self) -> str:
        """The trained task, and the tested one if it is another."""
        return self.trained if self.trained == self.tested else f"{self.trained} → {self.tested}"


def pairs(results: Results) -> list[tuple[Variant, Variant]]:
    """Return the pairs to compare: attached with trained baselines, detached with shadows trained alone, both with the base."""
    compared = [(a, b) for a in results.ours if a.mode == ATTACHED for b in results.baselines if b.is_trained]
    compared += [(a, b) for a in results.ours if a.mode != ATTACHED for b in results.alone]
    return compared + [(a, b) for a in results.ours for b in results.variants if not b.is_trained]


def comparisons(results: Results) -> list[Comparison]:
    """Return the comparisons of all pairs on all tested tasks that have a verdict."""
    judged = []
    for ours, baseline in pairs(results):
        for trained in results.trained:
            for tested in results.study["tested"][trained]:
                difference = results.difference(ours, baseline, trained, tested)
                if difference is not None and difference.verdict:
                    judged.append(Comparison(ours, baseline, trained, tested, difference))
    return judged
