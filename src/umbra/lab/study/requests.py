"""Requests: everything that the result of one run depends on, as plain values, and its key.

A record is stored under the key of its request: a run is never repeated, whichever study asks for it, and a changed setting
makes another run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umbra.config import ShadowConfig
from umbra.files.folder import digest_of
from umbra.lab.study.ablations import read_update
from umbra.lab.study.definition import Study
from umbra.lab.study.methods import SHADOWS

SCHEMA = 1  # of requests and records
LATER = {"scored_on": "test"}  # fields of tasks that were added after the first records, at their defaults
# Defaults of the umbra dialect when the first records were written; those of the published dialects never change.
FIRST = {
    "rank": 16, "gate_rank": 10, "alpha": 1.0, "channel_scale": "measured", "dropout": 0.0, "init": "auto",
    "first_layer": 0.25, "norm": True, "activation": "silu", "bias": False, "dropout_position": "rank", "down_init": "scaled",
}  # fmt: skip
Request = dict[str, Any]
Sizes = dict[str, dict[str, Any]]  # the fields of each method, with its size
ChosenRates = dict[tuple[str, str], float | None]  # by method and task


def trials(study: Study, sizes: Sizes) -> Iterator[Request]:
    """Yield the requests of the learning-rate search."""
    if study.search is None:
        return
    steps = {"max_steps": study.search.max_steps} if study.search.max_steps else {}
    for task in study.search.tasks or study.trained:
        for name, method in study.methods.items():
            if method.is_trained and len(study.rates(method)) > 1:
                for rate in study.rates(method):
                    training = {**steps, "learning_rate": rate}
                    yield make_request(study, task, name, sizes[name], study.search.seed, training, is_trial=True)


def runs(study: Study, sizes: Sizes, rates: ChosenRates) -> Iterator[Request]:
    """Yield the requests of the runs that are reported, seed by seed."""
    for name, method in study.methods.items():
        if not method.is_trained:
            for task in study.tasks:
                if not study.classifies(task):  # the base has no classification head
                    yield make_request(study, task, name, sizes[name], 0, {}, tests=[task])
    for seed in study.config.seeds:
        for task in study.trained:
            for name, method in study.methods.items():
                if method.is_trained:
                    rate = rates.get((name, task))
                    yield make_request(
                        study, task, name, sizes[name], seed, {} if rate is None else {"learning_rate": rate}
                    )


def make_request(
    study: Study, task: str, method: str, fields: dict[str, Any], seed: int, training: dict[str, Any], *,
    is_trial: bool = False, tests: list[str] | None = None,
) -> Request:  # fmt: skip
    """Return the request of one run.

    Args:
        study: The study.
        task: The task to train on, or to test the bare base on.
        method: The name of the method.
        fields: The fields of the method, with its size.
        seed: The seed of initialization and data order.
        training: TrainingArguments of this run, over those of study, task and method.
        is_trial: Whether the run belongs to the learning-rate search.
        tests: The tasks to test on; default those that the study lists for ``task``.
    """
    options, config = study.methods[method], study.config
    settings = {**config.training, **study.tasks[task].training, **options.training, **training}
    settings = settings if options.is_trained else {k: v for k, v in settings.items() if k == "use_cpu"}
    tests = [] if is_trial else tests or study.tested(task)
    involved = dict.fromkeys([task, *tests])
    return json.loads(json.dumps({
        "schema": SCHEMA, "base": config.base, "dtype": config.dtype, "chat_template": config.chat_template,
        "method": method, "kind": options.kind, "fields": fields, "defaults": _defaults(options.kind, fields),
        "modes": list(options.modes), "task": task, "seed": seed, "training": settings, "is_trial": is_trial, "tests": tests,
        "batch_size": config.batch_size,
        "tasks": {n: asdict(study.tasks[n]) for n in involved},
        "data": {n: study.tasks[n].digest(n) for n in involved},
        "models": {p: digest_of(_weights(p)) for p in (config.base, fields.get("shadow", "")) if _weights(p)},
    }))  # fmt: skip


def _defaults(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the umbra dialect for fields that the study leaves open."""
    if kind not in SHADOWS or fields.get("dialect", "umbra") != "umbra":
        return {}
    resolved = _former_names(ShadowConfig.from_dict(read_update(fields)[0]).resolve().to_dict())
    set_by_study = _former_names(fields)
    return {k: resolved[k] for k in FIRST if set_by_study.get(k) is None}


def key_of(request: Request) -> str:
    """Return the key of a request, 16 hexadecimal digits.

    It depends neither on the name of the method nor on the paths of files, whose contents count. Fields that were added later
    do not change it while they have their default, nor do defaults that never changed: older records stay valid.
    """
    relevant = {k: v for k, v in request.items() if k not in ("method", "batch_size", "defaults")}
    if changed := {k: v for k, v in request.get("defaults", {}).items() if FIRST.get(k) != v}:
        relevant["defaults"] = changed
    if request["kind"] in SHADOWS:
        relevant["fields"] = _former_names(request["fields"])
    relevant["tasks"] = {
        n: {k: v for k, v in t.items() if k != "data" and (k, v) not in LATER.items() and not _is_local_path(k, v)}
        for n, t in request["tasks"].items()
    }  # fmt: skip
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _former_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a shadow under their names in the first records, so that keys do not change."""
    flat = {**fields, **(fields.get("constants") or {})}
    flat.pop("constants", None)
    return {"channel_scale" if k == "input_scale" else k: v for k, v in flat.items()}


def _is_local_path(field: str, value: str | list[str] | None) -> bool:
    """Return whether a task's field names local files, whose contents are part of the digest."""
    if not value or not isinstance(value, str):
        return False
    return (field in ("train", "test") and Path(value).is_file()) or (field == "lm_eval_path" and Path(value).is_dir())


def _weights(path: str) -> list[Path]:
    """Return the files of a model in a local folder; none for a hub id or a built-in name."""
    if not path or not Path(path).is_dir():
        return []
    return sorted(f for ending in ("*.json", "*.safetensors", "pytorch_model*.bin") for f in Path(path).glob(ending))
