"""The record of a run: one JSON file, in the form of PEFT's method comparison, with what that form has no place for under "umbra".

docs/evaluate.md lists its fields. One that is damaged, or of another schema, counts as not run.
"""

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from umbra.files import folder
from umbra.lab.bench.machine import Device, commit, versions
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.study import SCHEMA, key_of

PACKAGES = (
    "umbra-peft", "torch", "transformers", "peft", "datasets", "accelerate", "reasoning_gym", "lm_eval", "bitsandbytes",
)  # fmt: skip
ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed",
    "bf16", "fp16", "use_cpu", "activation_checkpointing",
)  # fmt: skip


PART = 60  # bytes of a name within a file's, of which there may be 255
READ = {  # what a report reads of a record
    "run_info": {"created_at", "total_time", "error_msg"},
    "train_info": {"accelerator_memory_max", "train_time", "file_size", "num_trainable_params", "status"},
    "meta_info": {"package_info"},
    "umbra": {
        "key", "request", "scores", "validation_loss", "memory_before", "seconds_per_step", "commit", "machine",
    },
}  # fmt: skip


def make(request: dict[str, Any], found: dict[str, Any], created: str, seconds: float, error: str) -> dict[str, Any]:
    """The record of a request.

    Args:
        found: what run.py has measured; empty where it failed.
        error: the traceback, or nothing.
    """
    task = request["tasks"][request["task"]]
    arguments, scores = found.get("arguments", {}), found.get("scores", {})
    device = found.get("device", "cpu")
    own = scores.get(request["task"], {}).get(request["modes"][0], {})
    memory = {k: found.get(f"{k}_bytes", 0) for k in ("peak", "before")}
    history = [
        {"step": h["step"], "train loss": h["loss"], "learning rate": h.get("learning_rate")}
        for h in found.get("history", [])
    ]
    last = {
        "step": found.get("steps", 0), "test accuracy": _accuracy(own), "train loss": found.get("train_loss"),
        "train samples": found.get("samples", 0), "train total tokens": found.get("tokens", 0),
    }  # fmt: skip
    return {
        "run_info": {
            "created_at": created, "total_time": seconds, "error_msg": error, "peft_branch": "main",
            "experiment_name": f"{request['kind']}/{request['task']}-{request['method']}-seed-{request['seed']}",
            "train_config": {
                "model_id": request["base"], "dtype": request["dtype"], "max_seq_length": task["max_length"],
                "batch_size": arguments.get("per_device_train_batch_size"), "batch_size_eval": request["batch_size"],
                "max_steps": found.get("steps", 0), "eval_steps": None, "compile": False, "query_template": None,
                "seed": request["seed"], "grad_norm_clip": arguments.get("max_grad_norm"),
                "optimizer_type": arguments.get("optim"),
                "optimizer_kwargs": {"lr": arguments.get("learning_rate"), "weight_decay": arguments.get("weight_decay")},
                "lr_scheduler": arguments.get("lr_scheduler_type"), "use_amp": bool(arguments.get("bf16") or arguments.get("fp16")),
                "use_gc": bool(arguments.get("activation_checkpointing")), "autocast_adapter_dtype": True,
                "generation_kwargs": {"max_new_tokens": found.get("max_new_tokens")}, "attn_implementation": None,
            },
            "peft_config": found.get("adapter_config") or None,
        },
        "train_info": {
            "accelerator_memory_max": memory["peak"], "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_reserved_99th": 0, "train_time": found.get("train_seconds", 0.0),
            "file_size": found.get("file_bytes", 0), "num_trainable_params": found.get("trainable_parameters", 0),
            "num_total_params": found.get("total_parameters", 0), "status": "failed" if error else "success",
            "metrics": [*history, last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {n: {"sha": d, "created_at": None} for n, d in request["data"].items()},
            "package_info": {f"{k}-version": v for k, v in versions(PACKAGES).items()},
            "system_info": _system(), "pytorch_info": torch.__config__.show(),
        },
        "umbra": {
            "schema": SCHEMA, "key": key_of(request), "request": request, "scores": scores,
            "unscored": found.get("unscored", {}),
            "validation_loss": found.get("validation_loss"), "memory_before": memory["before"],
            "seconds_per_step": found.get("seconds_per_step", 0.0), "commit": commit(),
            "machine": Device(device if device.startswith("cuda") else "cpu").describe(),
        },
    }  # fmt: skip


def _accuracy(score: dict[str, Any]) -> float | None:
    """What PEFT's form has a place for: no loss."""
    return None if score.get("metric") == LOSS or score.get("less_is_better") else score.get("value")


def _system() -> dict[str, str]:
    told = {k: getattr(platform, k)() for k in ("system", "release", "version", "machine", "processor")}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A"
    return {**told, "accelerator": gpu}


# -- files -------------------------------------------------------------------------------------------------------------


def file_of(out: Path, request: dict[str, Any]) -> Path:
    """Where the record of a request lies: readable names first, its key last."""
    rate = request["training"].get("learning_rate")
    parts = (request["task"], request["method"], f"rate-{rate}" if request["is_trial"] else f"seed-{request['seed']}")
    names = (re.sub(r"[^\w.+=-]+", "-", str(p)).strip("-") or "x" for p in parts)
    name = "--".join(n.encode()[:PART].decode(errors="ignore") for n in names)
    return out / ("trials" if request["is_trial"] else "runs") / f"{name}--{key_of(request)}.json"


def write(out: Path, record: dict[str, Any]) -> None:
    """Into its file, whole or not at all; one of the same run under another method's name then goes.

    Raises:
        CheckpointError: the disk refuses.
    """
    file = file_of(out, record["umbra"]["request"])
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    folder.write_together(file.parent, lambda staging: folder.write_text(staging / file.name, text))
    for other in set(file.parent.glob(f"*--{record['umbra']['key']}.json")) - {file}:
        other.unlink(missing_ok=True)


def read_all(out: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder, by key; files that are none are left out."""
    found = {}
    for file in sorted((*out.glob("runs/*.json"), *out.glob("trials/*.json"))):
        try:
            record = json.loads(folder.read_text(file))
            if record["umbra"]["schema"] == SCHEMA and all(READ[part] <= record[part].keys() for part in READ):
                found[record["umbra"]["key"]] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def succeeded(record: dict[str, Any] | None) -> bool:
    """Whether there is one, and of a run that ended well."""
    return record is not None and record["train_info"]["status"] == "success"


def is_whole(record: dict[str, Any] | None) -> bool:
    """Whether it also has all the scores that it was to have."""
    return record is not None and succeeded(record) and not record["umbra"].get("unscored")
