"""Records: the result of one run as one JSON file, in the form of PEFT's method comparison with our additions under "umbra".

docs/guides/studies.md lists the fields. A file that is damaged, or has another schema, counts as a run that is missing.
"""

import json
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from umbra.files import folder
from umbra.lab.bench.machine import Device, commit, versions
from umbra.lab.study.archive import Record, pack, read_archive, read_description
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.requests import SCHEMA, Request, key_of

PACKAGES = (
    "umbra-peft", "torch", "transformers", "peft", "datasets", "accelerate", "reasoning_gym", "lm_eval", "bitsandbytes",
)  # fmt: skip
ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed",
    "bf16", "fp16", "use_cpu", "activation_checkpointing",
)  # fmt: skip
PART = 60  # maximum bytes of each part of a file name; file systems allow 255 for the whole
REQUIRED = {  # fields that a report reads
    "run_info": {"created_at", "total_time", "error_msg"},
    "train_info": {"accelerator_memory_max", "train_time", "file_size", "num_trainable_params", "status"},
    "meta_info": {"package_info"},
    "umbra": {
        "key", "request", "scores", "validation_loss", "memory_before", "seconds_per_step", "commit", "machine",
    },
}  # fmt: skip


def make(request: Request, measured: dict[str, Any], created: str, seconds: float, error: str) -> Record:
    """Return the record of a request.

    Args:
        request: The request.
        measured: The measurements of `run.run`; empty if the run failed.
        created: The time at which the run began, in ISO format.
        seconds: The duration of the run.
        error: The traceback of a failed run, otherwise empty.
    """
    device = measured.get("device", "cpu")
    return {
        "run_info": _run_info(request, measured, created, seconds, error),
        "train_info": _train_info(request, measured, error),
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {n: {"sha": d, "created_at": None} for n, d in request["data"].items()},
            "package_info": {f"{k}-version": v for k, v in versions(PACKAGES).items()},
            "system_info": _system(), "pytorch_info": torch.__config__.show(),
        },
        "umbra": {
            "schema": SCHEMA, "key": key_of(request), "request": request, "scores": measured.get("scores", {}),
            "unscored": measured.get("unscored", {}),
            "validation_loss": measured.get("validation_loss"), "memory_before": measured.get("before_bytes", 0),
            "seconds_per_step": measured.get("seconds_per_step", 0.0), "commit": commit(),
            "machine": Device(device if device.startswith("cuda") else "cpu").describe(),
        },
    }  # fmt: skip


def _run_info(request: Request, measured: dict[str, Any], created: str, seconds: float, error: str) -> dict[str, Any]:
    arguments, task = measured.get("arguments", {}), request["tasks"][request["task"]]
    return {
        "created_at": created, "total_time": seconds, "error_msg": error, "peft_branch": "main",
        "experiment_name": f"{request['kind']}/{request['task']}-{request['method']}-seed-{request['seed']}",
        "train_config": {
            "model_id": request["base"], "dtype": request["dtype"], "max_seq_length": task["max_length"],
            "batch_size": arguments.get("per_device_train_batch_size"), "batch_size_eval": request["batch_size"],
            "max_steps": measured.get("steps", 0), "eval_steps": None, "compile": False, "query_template": None,
            "seed": request["seed"], "grad_norm_clip": arguments.get("max_grad_norm"),
            "optimizer_type": arguments.get("optim"),
            "optimizer_kwargs": {"lr": arguments.get("learning_rate"), "weight_decay": arguments.get("weight_decay")},
            "lr_scheduler": arguments.get("lr_scheduler_type"), "use_amp": bool(arguments.get("bf16") or arguments.get("fp16")),
            "use_gc": bool(arguments.get("activation_checkpointing")), "autocast_adapter_dtype": True,
            "generation_kwargs": {"max_new_tokens": measured.get("max_new_tokens")}, "attn_implementation": None,
        },
        "peft_config": measured.get("adapter_config") or None,
    }  # fmt: skip


def _train_info(request: Request, measured: dict[str, Any], error: str) -> dict[str, Any]:
    score = measured.get("scores", {}).get(request["task"], {}).get(request["modes"][0], {})
    history = [
        {"step": h["step"], "train loss": h["loss"], "learning rate": h.get("learning_rate")}
        for h in measured.get("history", [])
    ]
    last = {
        "step": measured.get("steps", 0), "test accuracy": _accuracy(score), "train loss": measured.get("train_loss"),
        "train samples": measured.get("samples", 0), "train total tokens": measured.get("tokens", 0),
    }  # fmt: skip
    return {
        "accelerator_memory_max": measured.get("peak_bytes", 0), "accelerator_memory_reserved_avg": 0,
        "accelerator_memory_reserved_99th": 0, "train_time": measured.get("train_seconds", 0.0),
        "file_size": measured.get("file_bytes", 0), "num_trainable_params": measured.get("trainable_parameters", 0),
        "num_total_params": measured.get("total_parameters", 0), "status": "failed" if error else "success",
        "metrics": [*history, last],
    }  # fmt: skip


def _accuracy(score: dict[str, Any]) -> float | None:
    """Return the value of a score; None for losses, which PEFT's form has no field for."""
    return None if score.get("metric") == LOSS or score.get("less_is_better") else score.get("value")


def _system() -> dict[str, str]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A"
    return {
        "system": platform.system(), "release": platform.release(), "version": platform.version(),
        "machine": platform.machine(), "processor": platform.processor(), "accelerator": gpu,
    }  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------


def file_of(out: Path, request: Request) -> Path:
    """Return the path of a record: readable names first, the key last."""
    rate = request["training"].get("learning_rate")
    parts = (request["task"], request["method"], f"rate-{rate}" if request["is_trial"] else f"seed-{request['seed']}")
    names = (re.sub(r"[^\w.+=-]+", "-", str(p)).strip("-") or "x" for p in parts)
    name = "--".join(n.encode()[:PART].decode(errors="ignore") for n in names)
    return out / ("trials" if request["is_trial"] else "runs") / f"{name}--{key_of(request)}.json"


def write(out: Path, record: Record) -> None:
    """Write a record atomically, and remove the file of the same run under another name of its method.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    file = file_of(out, record["umbra"]["request"])
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    folder.write_together(file.parent, lambda staging: folder.write_text(staging / file.name, text))
    for other in set(file.parent.glob(f"*--{record['umbra']['key']}.json")) - {file}:
        other.unlink(missing_ok=True)


def read_all(out: Path) -> dict[str, Record]:
    """Return the records of a study's folder by key: those of its archive, then single files, which replace them.

    Files that are no records of this schema are skipped.

    Raises:
        CheckpointError: the archive is damaged.
    """
    return {r["umbra"]["key"]: r for r in (*filter(_is_valid, read_archive(out)[1]), *_single_files(out))}


def _single_files(out: Path) -> Iterable[Record]:
    for file in sorted((*out.glob("runs/*.json"), *out.glob("trials/*.json"))):
        try:
            record = json.loads(folder.read_text(file))
        except (OSError, ValueError):
            continue
        if _is_valid(record):
            yield record


def _is_valid(record: Record) -> bool:
    try:
        return record["umbra"]["schema"] == SCHEMA and all(REQUIRED[part] <= record[part].keys() for part in REQUIRED)
    except (KeyError, TypeError, AttributeError):
        return False


def pack_study(out: Path, to: Path) -> Path:
    """Write the description and all records of a study's folder as one archive.

    Args:
        out: The folder of the study.
        to: The folder of the archive, which may be ``out``.

    Returns:
        The path of the archive.

    Raises:
        CheckpointError: ``out`` holds no study, or ``to`` cannot be written.
    """
    description, by_key = read_description(out), read_all(out)
    keys = dict.fromkeys([*description["trials"], *description["runs"], *by_key])
    return pack(description, [by_key[k] for k in keys if k in by_key], to)


def succeeded(record: Record | None) -> bool:
    """Return whether a run has ended without an error."""
    return record is not None and record["train_info"]["status"] == "success"


def is_complete(record: Record | None) -> bool:
    """Return whether a run has ended without an error and has all of its scores."""
    return record is not None and succeeded(record) and not record["umbra"].get("unscored")
