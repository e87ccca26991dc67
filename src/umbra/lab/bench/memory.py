"""The peak memory of a training step, of one method in a process of its own.

Nothing is loaded: the base is made in place, with random weights, since memory does not depend on their values. A small
step runs first, so that allocator, thread pools and lazy imports are there; then free memory is given back, and the
peak starts anew. ``peak`` is all that the process holds at its highest (on a GPU: all allocated tensors), Python, torch
and the base's weights included; ``before`` is what it held when the step began.

glibc decides by what was freed before whether a tensor gets pages of its own or lies in a heap that falls to pieces: the same
step of LoRA peaked at 4.8 GB and at 7.0 GB. Here every tensor of `OWN_PAGES` bytes or more has pages of its own.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from umbra.lab.bench.base import Base
from umbra.lab.bench.cases import Memory, Step
from umbra.lab.bench.machine import Device
from umbra.lab.bench.methods import METHODS, Method, build
from umbra.lab.bench.timing import Row, prepare

OWN_PAGES = 2**18
# Umbra may be imported from where only this process looks.
CHILD = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; main()"
LONGEST = 1800  # seconds until a process that weighs is given up


def weigh(
    cases: Sequence[Memory], method: Method, base: Base, device: Device, *, rank: int, width: int, seed: int
) -> dict[str, Row]:  # fmt: skip
    """A row {"peak": bytes, "before": bytes} of each case, or one that says why not (see timing.py)."""
    with tempfile.TemporaryDirectory() as folder:
        base.model.config.save_pretrained(folder)
        task = {
            "config": folder, "dtype": str(base.dtype).removeprefix("torch."), "device": str(device.torch),
            "threads": torch.get_num_threads(), "method": method.name, "rank": rank, "width": width, "seed": seed,
            "cases": [[c.name, c.rows, c.length, c.labelled] for c in cases],
        }  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", CHILD, str(Path(__file__).parents[2])],
                input=json.dumps(task),
                cwd=folder,
                env={"MALLOC_MMAP_THRESHOLD_": str(OWN_PAGES), **os.environ},
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            return {case.name: {"failed": f"no answer within {LONGEST} s"} for case in cases}
    if done.returncode:
        said = "".join(done.stderr.strip().splitlines()[-1:])
        return {case.name: {"failed": f"ended with {done.returncode}: {said:.160}"} for case in cases}
    return json.loads(done.stdout.splitlines()[-1])


def _weigh_here(task: dict[str, Any]) -> dict[str, Row]:
    device = Device(task["device"], task["threads"])
    config = AutoConfig.from_pretrained(task["config"])
    base = Base.random(config, getattr(torch, task["dtype"]), device.torch, task["seed"])
    method = next(m for m in METHODS if m.name == task["method"])
    models = build(base, [method], task["rank"], {method.name: task["width"]}, task["seed"])
    rows: dict[str, Row] = {}
    for name, many, length, labelled in task["cases"]:
        small = prepare(Step("", "", 1, 16, labelled=labelled), method, models[method.name], base)
        if isinstance(small, dict):
            rows[name] = small
            continue
        step = Step("", "", many, length, labelled=labelled).unchecked(method, models[method.name], base)
        gc.collect()
        device.settle_memory()
        before = device.memory()
        step()
        device.synchronize()
        rows[name] = {"peak": device.peak_memory(), "before": before}
    return rows


def main() -> None:
    """Weigh the task on standard input; the rows are the last line of standard output."""
    print(json.dumps(_weigh_here(json.loads(sys.stdin.read()))))
