"""Interleaved timing: every method has one turn per round, in shuffled order, if its results agree with the base's."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from umbra.lab.bench.base import Base
from umbra.lab.bench.cases import Case, Disagreement, Run, check_logits
from umbra.lab.bench.machine import Device
from umbra.lab.bench.methods import REFERENCES, Method

Row = dict[str, Any]
# {"seconds": [one per round], "beside": {reference: [its seconds in the same rounds]}}, or one of {"absent": reason},
# {"refused": the disagreement with the base}, {"failed": the exception of a method}.


def measure(
    case: Case, methods: Sequence[Method], models: dict[str, nn.Module], base: Base, device: Device, *, rounds: int,
    seed: int = 0, tick: Callable[[str], object] = lambda name: None,
) -> dict[str, Row]:  # fmt: skip
    """Return a row for each method.

    Args:
        case: What is timed.
        methods: The methods.
        models: The models by name of their method.
        base: The base, for the expected results.
        device: The device to measure on.
        rounds: The number of timed rounds.
        seed: The seed of the order within rounds.
        tick: Called with a method's name after each of its ``rounds`` + 1 runs, the first of which is a warm-up.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for method in methods:
        prepared = prepare(case, method, models[method.name], base)
        if isinstance(prepared, dict):
            rows[method.name] = prepared
        else:
            runs[method.name] = prepared
        tick(method.name)
    seconds = interleave(runs, device, rounds, seed, tick)
    for name, times in seconds.items():
        rows[name] = {"seconds": times, "beside": {r: seconds[r] for r in REFERENCES if r in seconds}}
    return rows


def prepare(case: Case, method: Method, model: nn.Module, base: Base) -> Run | Row:
    """Return a warmed-up run to be timed, or the row with the reason why there is none."""
    try:
        check_logits(model, base)
        return case.ready(method, model, base)
    except Disagreement as error:
        return {"refused": str(error)}
    except Exception as error:  # peers raise anything for what they do not support
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split()):.160}"}


def interleave(
    runs: dict[str, Run], device: Device, rounds: int, seed: int = 0, tick: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; the order is shuffled for every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rng, order = random.Random(seed), list(runs)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            seconds[name].append(device.seconds(runs[name]))
            tick(name)
    return seconds
