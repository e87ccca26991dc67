"""Tiny studies of every kind of method on every kind of task."""

import json
from pathlib import Path

import yaml

from umbra.lab.options import StudyOptions
from umbra.lab.study import sweep
from umbra.lab.study.results import Results

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(7) for b in range(7)]
SIGNS = [{"prompt": f"{a}>{b}?", "completion": "yes" if a > b else "no"} for a in range(7) for b in range(7)]
CLASSES = [{"text": r["prompt"], "label": r["completion"]} for r in SIGNS]
TEXTS = [{"text": r["prompt"] + r["completion"]} for r in SUMS]
METHODS = {
    "base": {"kind": "base"},
    "LoRA": {"kind": "lora"},
    "DoRA": {"kind": "dora"},
    "Lily": {"kind": "lily", "stride_A": 2, "num_B": 2},
    "IA3": {"kind": "peft", "peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PEFT Shadow": {"kind": "peft_shadow", "shadow_dropout": 0.0},
    "Umbra": {"kind": "umbra", "alpha": 1.0, "rank": 4, "gate_rank": 4, "dropout": 0.0},
    "Alone": {"kind": "alone", "rank": 4, "gate_rank": 4},
}  # fmt: skip
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def study_of(folder: Path, base: str, **changes) -> dict:
    """Return a study of all methods on all heads, with two seeds."""
    tasks = {}
    for name, rows, more in (
        ("sum", SUMS, {"max_new_tokens": 3}),
        ("sign", SIGNS, {"max_new_tokens": 3}),
        ("class", CLASSES, {"head": "classify"}),
        ("text", TEXTS, {"head": "text"}),
    ):
        files = {
            "train": lines(folder / f"{name}.train.jsonl", rows[::2]),
            "test": lines(folder / f"{name}.test.jsonl", rows[1::2]),
        }
        tasks[name] = {**files, "validation": 6, **more}
    given = {
        "title": "Tiny", "base": base, "dtype": "float32", "seeds": [0, 1], "match": 20000, "tasks": tasks, "methods": METHODS,
        "training": TRAINING, "transfer": {"sum": ["sign"]}, "forgetting": ["text"], "keep_adapters": True,
        "search": {"learning_rate": [1e-4, 1e-2], "tasks": ["sum"], "max_steps": 4},
    }  # fmt: skip
    return {**given, **changes}


def run_study(folder: Path, given: dict, out: str = "out", **options) -> dict:
    (folder / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return sweep.run_study(StudyOptions(str(folder / "study.yaml"), out=str(folder / out), **options))


def results_of(folder: Path, out: str = "out") -> Results:
    return Results(folder / out)


def variant(results: Results, name: str):
    return next(v for v in results.variants if v.name == name)


def the_record(folder: Path, task: str, method: str, seed: int) -> dict:
    return json.loads(next((folder / "out" / "runs").glob(f"{task}--{method}--seed-{seed}--*.json")).read_text())
