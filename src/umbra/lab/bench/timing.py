"""Timing side by side: all methods in turn within a round, in another order in each, only those that agree with the base."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from umbra.lab.bench.base import Base
from umbra.lab.bench.cases import Case, Disagreement, Run, check_logits
from umbra.lab.bench.machine import Device
from umbra.lab.bench.methods import REFERENCES, Method

Row = dict[str, Any]
# {"seconds": [one of each round], "beside": {reference: [its own in the same rounds]}}, or one of {"absent": why},
# {"refused": how it disagreed with the base}, {"failed": the error of a method that cannot do it}.


def measure(
    case: Case, methods: Sequence[Method], models: dict[str, Any], base: Base, device: Device, *, rounds: int,
    seed: int = 0, tick: Callable[[str], Any] = lambda name: None,
) -> dict[str, Row]:  # fmt: skip
    """A row of each method.

    Args:
        models: of each method, by name.
        tick: told the method's name after each of its ``rounds`` + 1 runs, of which the first warms up.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for method in methods:
        found = prepare(case, method, models[method.name], base)
        if isinstance(found, dict):
            rows[method.name] = found
        else:
            runs[method.name] = found
        tick(method.name)
    seconds = interleave(runs, device, rounds, seed, tick)
    for name, times in seconds.items():
        rows[name] = {"seconds": times, "beside": {r: seconds[r] for r in REFERENCES if r in seconds}}
    return rows


def prepare(case: Case, method: Method, model: Any, base: Base) -> Run | Row:
    """What is to be timed, warmed up; or the row that says why nothing is."""
    try:
        check_logits(model, base)
        return case.ready(method, model, base)
    except Disagreement as error:
        return {"refused": str(error)}
    except Exception as error:  # a method that cannot do this, in whatever way it says so
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split()):.160}"}


def interleave(
    runs: dict[str, Run], device: Device, rounds: int, seed: int = 0, tick: Callable[[str], Any] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order is shuffled for every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    dice, order = random.Random(seed), list(runs)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            seconds[name].append(device.seconds(runs[name]))
            tick(name)
    return seconds
