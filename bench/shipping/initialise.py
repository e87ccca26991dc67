"""Initializations of a shadow with equal budgets: distillation from the frozen base on the same blocks of text."""

import shutil
from pathlib import Path
from typing import Any

from umbra.training.pretrain import TEACHER, pretrain
from umbra.training.runs import RUN_FILE

from .text import write_text

DOCUMENTS = 120  # per data set
BUDGET: dict[str, Any] = {
    "dialect": "paper",
    "dtype": "bfloat16", "stages": "distillation", "teacher_top_k": 64, "teacher_cache": True, "auxiliary_loss_every": 4,
    "max_length": 256, "held_out": 20, "max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "dropout": 0.0,
    "save_strategy": "no", "logging_steps": 20, "bf16": True,
}  # fmt: skip
NARROW = {
    "shadow_num_hidden_layers": 4, "shadow_hidden_size": 384, "shadow_num_attention_heads": 6, "shadow_num_key_value_heads": 2,
    "shadow_intermediate_size": 1024, "shadow_head_dim": 64,
}  # fmt: skip
TWO: dict[str, Any] = {"shadow_num_hidden_layers": 2, "init": "random"}
COPIED = {**TWO, "init": "base"}
VARIANTS: dict[str, dict[str, Any]] = {
    "random": TWO,
    "blocks 0, 1": COPIED,
    "blocks 0, 1, final norm × 1": {**COPIED, "constants": {"init_scale": 1.0}},
    "blocks 0, 1, final norm × 0.1": {**COPIED, "constants": {"init_scale": 0.1}},
    "blocks 0, 15": {**COPIED, "init_layers": [0, 15]},
    "blocks 0, 29": {**COPIED, "init_layers": [0, 29]},
    "narrow, random": {**NARROW, "init": "random"},
    "narrow, blocks 0 – 3 pruned": {**NARROW, "init": "base"},
    "another checkpoint": {"shadow": "another"},
}


def run(data: Path, out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Return the metrics of every run of every variant."""
    files = write_text(data, out / "short text", DOCUMENTS)
    another = _another(files, out)
    results = []
    for name, fields in VARIANTS.items():
        fields = {**fields, "shadow": another} if "shadow" in fields else fields
        results += [{"variant": name, "seed": seed, **_one(files, out, name, fields, seed)} for seed in seeds]
    return results


def _one(files: list[str], out: Path, name: str, fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the metrics of one run before and after distillation."""
    runs = out / "initialise"
    folder, teacher = runs / f"{name} {seed}".replace(" ", "_").replace(",", ""), runs / TEACHER
    if teacher.exists() and not (folder / RUN_FILE).exists():
        shutil.copytree(
            teacher, folder / TEACHER, dirs_exist_ok=True
        )  # the base gives the same probabilities on the same text
    results = pretrain({**BUDGET, **fields, "data": ",".join(files), "output_dir": str(folder), "seed": seed})
    if not teacher.exists():
        shutil.copytree(folder / TEACHER, runs / "copying", dirs_exist_ok=True)
        (runs / "copying").rename(teacher)
    for name in ("stages", TEACHER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    return {**results["1-distillation"], "start": results["start"]["divergence"], "parameters": results["parameters"]}


def _another(files: list[str], out: Path) -> str:
    """Train another small checkpoint, on arithmetic alone and without the base, and return its folder."""
    folder = out / "another"
    arithmetic = next(f for f in files if "gsm" in f)
    given = {**BUDGET, **TWO, "teacher_cache": False, "stages": "next_token", "max_steps": 200, "learning_rate": 2e-3}
    pretrain({**given, "teacher_top_k": None, "data": arithmetic, "output_dir": str(folder)})
    return str(folder)
