"""What a study has found: the records of its runs, put in order for the report."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.lab.study import record
from umbra.lab.study.methods import ATTACHED, KINDS
from umbra.lab.study.metrics import CHIEF, LOSS
from umbra.lab.study.statistics import Estimate, difference, estimate

NOTED = {"study", "parameters", "command", "trials", "runs", "methods", "rates"}  # in a study's file
Items = dict[int, list[float]]  # by seed: what every item got
COSTS: dict[str, Callable[[dict[str, Any]], float]] = {  # of a run, by its record
    "parameters": lambda r: r["train_info"]["num_trainable_params"],
    "seconds": lambda r: r["umbra"]["seconds_per_step"],
    "peak": lambda r: r["train_info"]["accelerator_memory_max"],
    "rise": lambda r: r["train_info"]["accelerator_memory_max"] - r["umbra"]["memory_before"],
    "bytes": lambda r: r["train_info"]["file_size"],
}


@dataclass(frozen=True)
class Variant:
    """A method as it is scored: attached (or merged with its base), or the shadow alone."""

    method: str
    mode: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.method}, detached" if self.mode != ATTACHED and self.kind == "umbra" else self.method

    @property
    def is_trained(self) -> bool:
        return self.kind != "base"


class Results:
    """The runs of a study that have succeeded, and those that failed.

    Raises:
        CheckpointError: the folder holds no study.
    """

    def __init__(self, out: Path, study_file: str):
        try:
            self.about: dict[str, Any] = json.loads(folder.read_text(folder.find(out, study_file)))
            self.study: dict[str, Any] = self.about["study"]
            if lacking := NOTED - self.about.keys():
                raise KeyError(", ".join(sorted(lacking)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{out} holds no study that umbra study has run: {error}") from error
        kept = record.read_all(out)
        self.runs, self.trials = (
            [kept[k] for k in dict.fromkeys(self.about[part]) if record.succeeded(kept.get(k))]
            for part in ("runs", "trials")
        )
        asked = dict.fromkeys([*self.about["trials"], *self.about["runs"]])
        self.failed = [kept[k] for k in asked if k in kept and not record.succeeded(kept[k])]
        self.unscored = [(r, test, error) for r in self.runs for test, error in r["umbra"].get("unscored", {}).items()]
        self.missing = [k for k in asked if k not in kept]
        self.trained: list[str] = self.study["trained"]
        self.tasks: list[str] = list(self.study["tasks"])
        self.wholes = {name: self._whole(name) for name in self.tasks}
        self.variants = [
            Variant(name, mode, method["kind"])
            for name, method in self.study["methods"].items()
            for mode in method["modes"]
        ]
        chosen = self.study["ours"] or [n for n, m in self.study["methods"].items() if m["kind"] == "umbra"]
        self.ours = [v for v in self.variants if v.method in chosen]
        self.rivals = [v for v in self.variants if v.mode == ATTACHED and v.method not in chosen]
        self.alone = [v for v in self.variants if v.kind == "alone" and v.method not in chosen]

    def names_of(self, kept: dict[str, Any]) -> list[str]:
        """A record's methods, as this study calls them: several of one configuration share it."""
        return self.about["methods"][kept["umbra"]["key"]]

    def of(self, variant: Variant, trained: str | None = None) -> Iterator[dict[str, Any]]:
        """The records of a variant, of one trained task or of all; the bare base has learned none."""
        for kept in self.runs:
            asked = kept["umbra"]["request"]
            if variant.method in self.names_of(kept) and (
                trained is None or not variant.is_trained or asked["task"] == trained
            ):
                yield kept

    def items(self, variant: Variant, trained: str, tested: str) -> Items:
        """What every item of a tested task got, by seed; the bare base says the same at every seed."""
        found: Items = {}
        for kept in self.of(variant, trained):
            score = kept["umbra"]["scores"].get(tested, {}).get(variant.mode)
            if score is not None:
                each = [i / self.wholes[tested] for i in score["items"] or [score["value"]]]
                if all(map(math.isfinite, each)):
                    found[kept["umbra"]["request"]["seed"]] = each
        if not variant.is_trained and found:
            return dict.fromkeys(self.study["seeds"], next(iter(found.values())))
        return found

    def metric(self, tested: str) -> str:
        """What the chief number of a task is called."""
        return next((CHIEF.get(s["metric"]) or str(s["metric"]) for s in self._scores(tested)), "score")

    def is_loss(self, tested: str) -> bool:
        """Whether less of it is better, and it is no share."""
        return any(s["metric"] == LOSS or s.get("less_is_better") for s in self._scores(tested))

    def _whole(self, tested: str) -> float:
        """100 where any score on a task is beyond 1, and so all are percents, else 1."""
        beyond = not self.is_loss(tested) and any(abs(s["value"]) > 1 for s in self._scores(tested))
        return 100.0 if beyond else 1.0

    def _scores(self, tested: str) -> Iterator[dict[str, Any]]:
        for kept in self.runs:
            yield from kept["umbra"]["scores"].get(tested, {}).values()

    def score(self, variant: Variant, trained: str, tested: str) -> Estimate | None:
        """Mean over seeds and items, with its interval."""
        found = self.items(variant, trained, tested)
        if not found or len({len(i) for i in found.values()}) != 1:
            return None
        if not variant.is_trained:
            return estimate(np.array([next(iter(found.values()))], float))
        return replace(estimate(np.array(list(found.values()), float)), asked=len(self.study["seeds"]))

    def apart(self, ours: Variant, theirs: Variant, trained: str, tested: str) -> Estimate | None:
        """How much better ours is: more of a score, less of a loss."""
        found = difference(self.items(ours, trained, tested), self.items(theirs, trained, tested))
        if found is None:
            return None
        if self.is_loss(tested):
            found = replace(found, mean=-found.mean, low=-found.high, high=-found.low)
        if not all(s["items"] for s in self._scores(tested)):
            found = replace(found, items=0)
        return replace(found, asked=len(self.study["seeds"]))

    def mean_score(self, variant: Variant) -> Estimate | None:
        """The mean over the trained tasks, each tested on itself; None unless all are there."""
        found = [self.score(variant, t, t) for t in self.trained if not self.is_loss(t)]
        if not found or any(f is None for f in found):
            return None
        scores = [f for f in found if f is not None]
        mean, half = sum(s.mean for s in scores) / len(scores), sum(s.half**2 for s in scores) ** 0.5 / len(scores)
        seeds, items = min(s.seeds for s in scores), sum(s.items for s in scores)
        return Estimate(mean, mean - half, mean + half, seeds, items, max(s.asked for s in scores))

    def cost(self, variant: Variant) -> dict[str, float]:
        """Medians over a method's runs: parameters, seconds a step, peak memory, bytes of the adapter; nothing of the base."""
        runs = [r for r in self.of(variant) if r["train_info"]["train_time"]]
        if not runs:
            return {}
        return {name: median(cost(r) for r in runs) for name, cost in COSTS.items()}

    def beside(self, variant: Variant, other: Variant, cost: str) -> Estimate | None:
        """A cost as a multiple of another method's, run by run: the mean over the tasks that both have at every seed."""
        ours, theirs = (self._costs(v, cost) for v in (variant, other))
        tasks = [t for t in self.trained if all((t, s) in ours and (t, s) in theirs for s in self.study["seeds"])]
        if not tasks or any(theirs[t, s] <= 0 for t in tasks for s in self.study["seeds"]):
            return None
        return estimate(np.array([[ours[t, s] / theirs[t, s] for t in tasks] for s in self.study["seeds"]]), span=0)

    def _costs(self, variant: Variant, cost: str) -> dict[tuple[str, int], float]:
        asked = [(r["umbra"]["request"], r) for r in self.of(variant) if r["train_info"]["train_time"]]
        return {(q["task"], q["seed"]): COSTS[cost](r) for q, r in asked}

    def about_kind(self, variant: Variant) -> str:
        return KINDS[variant.kind].about
