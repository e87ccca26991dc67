"""Results: the records of a study, arranged for its report."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from umbra.errors import CheckpointError
from umbra.lab.study import records
from umbra.lab.study.archive import Record, read_description
from umbra.lab.study.methods import ATTACHED, BY_LIKELIHOOD, KINDS
from umbra.lab.study.metrics import DISPLAY_NAMES, LOSS
from umbra.lab.study.statistics import Estimate, difference, estimate

REQUIRED = {"study", "parameters", "command", "trials", "runs", "methods", "rates"}  # of study.json
Items = dict[int, list[float]]  # by seed: the value of every item
COSTS: dict[str, Callable[[Record], float]] = {  # of a run, from its record
    "parameters": lambda r: r["train_info"]["num_trainable_params"],
    "seconds": lambda r: r["umbra"]["seconds_per_step"],
    "peak": lambda r: r["train_info"]["accelerator_memory_max"],
    "rise": lambda r: r["train_info"]["accelerator_memory_max"] - r["umbra"]["memory_before"],
    "bytes": lambda r: r["train_info"]["file_size"],
}


@dataclass(frozen=True)
class Variant:
    """A method in one mode: attached to its base (or merged with it), or the shadow alone."""

    method: str
    mode: str
    kind: str

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        if self.mode == BY_LIKELIHOOD:
            return f"{self.method}, by likelihood"
        return f"{self.method}, detached" if self.mode != ATTACHED and self.kind == "umbra" else self.method

    @property
    def is_trained(self) -> bool:
        """Whether anything was trained."""
        return self.kind != "base"


class Results:
    """The runs of a study.

    Args:
        out: The folder of the study.

    Raises:
        CheckpointError: the folder holds no study.
    """

    def __init__(self, out: Path):
        self.description = read_description(out)
        if missing := REQUIRED - self.description.keys():
            raise CheckpointError(f"{out} holds no study that umbra study has run: no {', '.join(sorted(missing))}")
        self.study: dict[str, Any] = self.description["study"]
        by_key = records.read_all(out)
        self.runs, self.trials = (
            [by_key[k] for k in dict.fromkeys(self.description[part]) if records.succeeded(by_key.get(k))]
            for part in ("runs", "trials")
        )
        expected = dict.fromkeys([*self.description["trials"], *self.description["runs"]])
        self.failed = [by_key[k] for k in expected if k in by_key and not records.succeeded(by_key[k])]
        self.unscored = [(r, test, error) for r in self.runs for test, error in r["umbra"].get("unscored", {}).items()]
        self.missing = [k for k in expected if k not in by_key]
        self.trained: list[str] = self.study["trained"]
        self.tasks: list[str] = list(self.study["tasks"])
        self.scales = {name: self._scale(name) for name in self.tasks}
        self.variants = [
            Variant(name, mode, method["kind"])
            for name, method in self.study["methods"].items()
            for mode in self._scored_modes(name, method)
        ]
        chosen = self.study["ours"] or [n for n, m in self.study["methods"].items() if m["kind"] == "umbra"]
        self.ours = [v for v in self.variants if v.method in chosen]
        self.baselines = [v for v in self.variants if v.mode == ATTACHED and v.method not in chosen]
        self.alone = [v for v in self.variants if v.kind == "alone" and v.method not in chosen]

    def _scored_modes(self, name: str, method: dict[str, Any]) -> list[str]:
        """Return the modes of a method; the bare base's also by likelihood, where a trained task has it."""
        measured = method["kind"] == "base" and any(
            BY_LIKELIHOOD in modes
            for record in self.runs
            if name in self.names_of(record)
            for task, modes in record["umbra"]["scores"].items()
            if task in self.trained
        )
        return [*method["modes"], *([BY_LIKELIHOOD] if measured else [])]

    def names_of(self, record: Record) -> list[str]:
        """Return the methods of a record by the names in this study; methods with equal configurations share a record."""
        return self.description["methods"][record["umbra"]["key"]]

    def of(self, variant: Variant, trained: str | None = None) -> Iterator[Record]:
        """Yield the records of a variant, on one trained task or on all; the bare base has no trained task."""
        for record in self.runs:
            if variant.method in self.names_of(record) and (
                trained is None or not variant.is_trained or record["umbra"]["request"]["task"] == trained
            ):
                yield record

    def items(self, variant: Variant, trained: str, tested: str) -> Items:
        """Return the value of every item of a tested task by seed; the bare base has the same values for all seeds."""
        by_seed: Items = {}
        for record in self.of(variant, trained):
            score = record["umbra"]["scores"].get(tested, {}).get(variant.mode)
            if score is not None:
                values = [i / self.scales[tested] for i in score["items"] or [score["value"]]]
                if all(map(math.isfinite, values)):
                    by_seed[record["umbra"]["request"]["seed"]] = values
        if not variant.is_trained and by_seed:
            return dict.fromkeys(self.study["seeds"], next(iter(by_seed.values())))
        return by_seed

    def metric(self, tested: str) -> str:
        """Return the name of a task's main metric."""
        return next((DISPLAY_NAMES.get(s["metric"]) or str(s["metric"]) for s in self._scores(tested)), "score")

    def is_loss(self, tested: str) -> bool:
        """Return whether lower is better; such a metric is no share either."""
        return any(s["metric"] == LOSS or s.get("less_is_better") for s in self._scores(tested))

    def unit(self, tested: str) -> str:
        """Return " %" for shares, nothing for losses."""
        return "" if self.is_loss(tested) else " %"

    def _scale(self, tested: str) -> float:
        """Return 100 if any score on a task exceeds 1, so that all of them are percents, else 1."""
        exceeds = not self.is_loss(tested) and any(abs(s["value"]) > 1 for s in self._scores(tested))
        return 100.0 if exceeds else 1.0

    def _scores(self, tested: str) -> Iterator[dict[str, Any]]:
        for record in self.runs:
            yield from record["umbra"]["scores"].get(tested, {}).values()

    def score(self, variant: Variant, trained: str, tested: str) -> Estimate | None:
        """Return the mean over seeds and items with its interval; None without results."""
        by_seed = self.items(variant, trained, tested)
        if not by_seed or len({len(i) for i in by_seed.values()}) != 1:
            return None
        if not variant.is_trained:
            return estimate(np.array([next(iter(by_seed.values()))], float))
        return replace(estimate(np.array(list(by_seed.values()), float)), planned_seeds=len(self.study["seeds"]))

    def difference(self, ours: Variant, baseline: Variant, trained: str, tested: str) -> Estimate | None:
        """Return by how much ours is better: a higher score or a lower loss; None if they cannot be paired."""
        result = difference(self.items(ours, trained, tested), self.items(baseline, trained, tested))
        if result is None:
            return None
        if self.is_loss(tested):
            result = replace(result, mean=-result.mean, low=-result.high, high=-result.low)
        if not all(s["items"] for s in self._scores(tested)):
            result = replace(result, items=0)
        return replace(result, planned_seeds=len(self.study["seeds"]))

    def mean_score(self, variant: Variant) -> Estimate | None:
        """Return the mean over the trained tasks, each tested on itself; None unless all of them have a score."""
        estimates = [self.score(variant, t, t) for t in self.trained if not self.is_loss(t)]
        scores = [e for e in estimates if e is not None]
        if not scores or len(scores) < len(estimates):
            return None
        mean = sum(s.mean for s in scores) / len(scores)
        half_width = sum(s.half_width**2 for s in scores) ** 0.5 / len(scores)
        seeds, items = min(s.seeds for s in scores), sum(s.items for s in scores)
        return Estimate(
            mean, mean - half_width, mean + half_width, seeds, items, max(s.planned_seeds for s in scores)
        )  # fmt: skip

    def cost(self, variant: Variant) -> dict[str, float]:
        """Return the medians of `COSTS` over the runs of a method; nothing for the bare base."""
        runs = [r for r in self.of(variant) if r["train_info"]["train_time"]]
        return {name: median(cost(r) for r in runs) for name, cost in COSTS.items()} if runs else {}

    def cost_ratio(self, variant: Variant, other: Variant, cost: str) -> Estimate | None:
        """Return a cost relative to another method's, run by run: the mean over tasks that both have at every seed."""
        a, b = (self._costs(v, cost) for v in (variant, other))
        seeds = self.study["seeds"]
        tasks = [t for t in self.trained if all((t, s) in a and (t, s) in b for s in seeds)]
        if not tasks or any(b[t, s] <= 0 for t in tasks for s in seeds):
            return None
        return estimate(np.array([[a[t, s] / b[t, s] for t in tasks] for s in seeds]), span=0)

    def _costs(self, variant: Variant, cost: str) -> dict[tuple[str, int], float]:
        runs = [(r["umbra"]["request"], r) for r in self.of(variant) if r["train_info"]["train_time"]]
        return {(request["task"], request["seed"]): COSTS[cost](record) for request, record in runs}

    def describe_kind(self, variant: Variant) -> str:
        """Return what the kind of a variant's method is."""
        return KINDS[variant.kind].about
