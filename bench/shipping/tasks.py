"""Tasks: shadows initialized at random, with copied blocks or pretrained; and the same architecture trained without the base.

The pair, the detached shadow and the models trained without the base are scored on the test file.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from umbra.deploy.export import export
from umbra.evaluation.scoring import score_adapter
from umbra.lab.bench.machine import Device
from umbra.options import EvalOptions, ExportOptions
from umbra.training.train import train

from .text import TASKS, write_task

SCORES = "scores.json"
SIZE: dict[str, Any] = {"shadow_num_hidden_layers": 2}
COMMON: dict[str, Any] = {
    "dialect": "paper", "dtype": "bfloat16", "first_layer": 0.5, "alpha": 1.0, "auxiliary_loss_weight": 1.0, "dropout": 0.0,
    "max_length": 320, "bf16": True, "save_strategy": "no", "logging_steps": 10,
}  # fmt: skip
COPIED = {**SIZE, "init": "base"}
# Better than 2 for the detached shadow on held-out records of intents, two seeds (85.9, 83.0 %).
DISTILLED = {"distillation_weight": 0.5}
ALONE = {"detached_only": True}
LONGER = FIRST, RIVAL = "pretrained, alone for longer", "random, alone for longer"
# The settings of each row; "pretrained" stands for the folder of the pretrained shadow, "alone" for the result of the row `FIRST`.
ROWS: dict[str, dict[str, Any]] = {
    "random": SIZE,
    "copied": COPIED,
    "pretrained": {"shadow": "pretrained"},
    "pretrained, distilled": {"shadow": "pretrained", **DISTILLED},
    "pretrained, alone first, distilled": {"shadow": "alone", **DISTILLED},
    "random, alone": {**SIZE, **ALONE},
    "pretrained, alone": {"shadow": "pretrained", **ALONE},
    RIVAL: {**SIZE, **ALONE},
    FIRST: {"shadow": "pretrained", **ALONE},
}


def run(
    data: Path, out: Path, pretrained: Path, tasks: list[str], rows: list[str], seeds: list[int]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the scores of each task, row and seed as soon as they are measured."""
    for seed, task, row in itertools.product(seeds, tasks, rows):
        yield [{"task": task, "row": row, "seed": seed, **s} for s in _one(data, out, pretrained, task, row, seed)]


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return the identity of a score."""
    return run["task"], run["row"], run["seed"], run["mode"]


def _one(data: Path, out: Path, pretrained: Path, task: str, row: str, seed: int) -> list[dict[str, Any]]:
    files, given = write_task(data, task, out / "tasks"), TASKS[task]
    folder = _folder(out, task, row, seed)
    fields = dict(ROWS[row])
    if fields.get("shadow") == "pretrained":
        fields["shadow"] = str(pretrained)
    elif fields.get("shadow") == "alone":
        fields["shadow"] = _alone(data, out, pretrained, task, seed)
    steps, rate = (given.alone, given.alone_rate) if row in LONGER else (given.steps, given.rate)
    train({
        **COMMON, **fields, "train_data": files["train"], "output_dir": str(folder), "seed": seed,
        "max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": given.batch,
    })  # fmt: skip
    scores = folder / SCORES
    if not scores.exists():
        modes = "detached" if "detached_only" in fields else "attached,detached"
        options = EvalOptions(
            str(folder), files["test"], dtype="bfloat16", modes=modes, batch_size=32, max_new_tokens=given.answer,
            answer_pattern=given.pattern, output=str(folder / "replies.jsonl"),
        )  # fmt: skip
        results = score_adapter(options)
        where = Device("cuda" if torch.cuda.is_available() else "cpu").describe()
        scores.write_text(json.dumps([{**asdict(s), "machine": where} for s in results]) + "\n", encoding="utf-8")
    return json.loads(scores.read_text(encoding="utf-8"))


def _alone(data: Path, out: Path, pretrained: Path, task: str, seed: int) -> str:
    """Return the folder of a plain transformers model that was trained on the task without the base."""
    folder = out / "alone" / f"{task} {seed}".replace(" ", "_")
    if not folder.exists():
        _one(data, out, pretrained, task, FIRST, seed)
        export(ExportOptions(str(_folder(out, task, FIRST, seed)), to="hf", out=str(folder)))
    return str(folder)


def _folder(out: Path, task: str, row: str, seed: int) -> Path:
    return out / "adapters" / f"{task} {row} {seed}".replace(" ", "_").replace(",", "")
