"""The peak memory of a training step, measured for each method in a separate process.

The base has random weights, because memory does not depend on their values. A small step runs first, so that allocator, thread
pools and lazy imports are in place; then free memory is released and the peak is reset. ``peak`` is the maximum memory of the
process during the step (on a GPU: of its tensors), Python, torch and the base's weights included; ``before`` is the memory in use
before the step.

Whether glibc allocates a tensor in separate pages or in a fragmented heap depends on earlier deallocations: the same step of LoRA
peaked at 4.8 GB and at 7.0 GB. Therefore every tensor of `SEPARATE_PAGES` bytes or more gets separate pages.
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

SEPARATE_PAGES = 2**18
# The child imports Umbra from the same place as this process.
CHILD = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import main; main()"
TIMEOUT = 1800  # seconds


def peak_memory(
    cases: Sequence[Memory], method: Method, base: Base, device: Device, *, rank: int, width: int, seed: int
) -> dict[str, Row]:  # fmt: skip
    """Return a row {"peak": bytes, "before": bytes} for each case, or one with the reason why there is none (see timing.py)."""
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
                env={"MALLOC_MMAP_THRESHOLD_": str(SEPARATE_PAGES), **os.environ},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return {case.name: {"failed": f"timed out after {TIMEOUT} s"} for case in cases}
    if done.returncode:
        message = "".join(done.stderr.strip().splitlines()[-1:])
        return {case.name: {"failed": f"ended with {done.returncode}: {message:.160}"} for case in cases}
    return json.loads(done.stdout.splitlines()[-1])


def _measure_in_process(task: dict[str, Any]) -> dict[str, Row]:
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
        device.reset_peak_memory()
        before = device.memory()
        step()
        device.synchronize()
        rows[name] = {"peak": device.peak_memory(), "before": before}
    return rows


def main() -> None:
    """Measure the task on standard input and print its rows as the last line of standard output."""
    print(json.dumps(_measure_in_process(json.loads(sys.stdin.read()))))
