"""Choose the learning rate of every method and task from the trials of the search."""

import math

from umbra.lab.study.archive import Record
from umbra.lab.study.definition import Study
from umbra.lab.study.records import succeeded
from umbra.lab.study.requests import Request, key_of

Rates = dict[tuple[str, str], tuple[float | None, str]]  # by method and task: the rate and where it comes from
Losses = dict[tuple[str, str], dict[float, float]]  # by method and task: held-out loss by rate
NO_LOSS = 1e-9  # the least loss that others are divided by


def choose_rates(study: Study, trials: list[Request], records: dict[str, Record]) -> Rates:
    """Return the learning rate with the lowest held-out loss, for every method and task.

    A task without trials takes the rate that is best over the tasks with trials, each task's losses relative to its lowest one.

    Args:
        study: The study.
        trials: The requests of its search.
        records: All records by key.
    """
    losses = _losses(trials, records)
    rates: Rates = {}
    for name, method in study.methods.items():
        candidates = study.rates(method)
        searched = [task for method_name, task in losses if method_name == name]
        for task in study.trained if method.is_trained else []:
            if len(candidates) == 1:
                rates[name, task] = candidates[0], "given"
                continue
            judges = [losses[name, t] for t in ([task] if task in searched else searched)]
            best = _best_of(candidates, judges)
            if best is not None:
                rates[name, task] = best, "searched" if task in searched else f"searched on {', '.join(searched)}"
            else:
                rates[name, task] = (
                    None,
                    "no trial has succeeded: the training's own" if candidates else "the training's own",
                )
    return rates


def _losses(trials: list[Request], records: dict[str, Record]) -> Losses:
    losses: Losses = {}
    for request in trials:
        record = records.get(key_of(request))
        loss = record["umbra"]["validation_loss"] if record is not None and succeeded(record) else None
        if loss is not None and math.isfinite(loss):
            by_rate = losses.setdefault((request["method"], request["task"]), {})
            by_rate[request["training"]["learning_rate"]] = loss
    return losses


def _best_of(candidates: list[float], judges: list[dict[float, float]]) -> float | None:
    """Return the rate whose relative losses have the lowest sum; None if no rate has a loss on every task."""
    common = [r for r in candidates if judges and all(r in losses for losses in judges)]
    worse = {r: sum(losses[r] / max(min(losses.values()), NO_LOSS) for losses in judges) for r in common}
    return min(worse, key=lambda r: worse[r]) if worse else None
