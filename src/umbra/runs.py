"""What `umbra train` and `umbra pretrain` share: flat settings sorted out, and an output folder that can be resumed."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from . import checkpoint, folder
from .config import ShadowConfig
from .errors import CheckpointError, ConfigError, unknown_key
from .options import check_dtype, check_types, names

RUN_FILE = "run.json"  # what a run was asked for; lies in its output folder
DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
}
POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Fields that may differ between a run and its continuation: they change nothing that is learned.
HARMLESS = ("overwrite", "disable_tqdm", "report_to", "logging_dir", "save_total_limit", "resume_from_checkpoint")


def sort_settings(
    values: dict[str, Any], kind: type, required: tuple[str, ...], where: str
) -> tuple[Any, ShadowConfig, dict[str, Any]]:
    """Sort flat settings into the run's own (``kind``, a dataclass), the shadow's and TrainingArguments'.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a required one missing, or a value of a wrong type.
    """
    arguments = [f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_")]
    known = [*names(kind, ShadowConfig), *arguments]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, where)
    if isinstance(out := values.get("output_dir"), str):
        values = {**values, "output_dir": os.path.expanduser(out)}  # as TrainingArguments does
    if not isinstance(values.get("resume_from_checkpoint"), bool | None):
        raise ConfigError(
            "resume_from_checkpoint: a run goes on where it was by itself, from its own folder; leave it out."
        )
    options = kind(**{k: v for k, v in values.items() if k in names(kind)})
    check_types(kind, asdict(options))
    shadow = ShadowConfig(**{k: v for k, v in values.items() if k in names(ShadowConfig)})
    for name in required:
        if not getattr(options, name):
            raise ConfigError(f"{name} is missing: set it in the configuration, or by --{name}.")
    check_dtype(options.dtype)
    if options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {options.max_length}.")
    rest = {k: v for k, v in values.items() if k in arguments and k not in names(kind, ShadowConfig)}
    rest.pop("resume_from_checkpoint", None)
    # fsdp may be true too, though its type does not say so.
    check_types(TrainingArguments, {k: v for k, v in rest.items() if (k, v) != ("fsdp", True)})
    return options, shadow, rest


def make_arguments(out: Path | str, given: dict[str, Any]) -> TrainingArguments:
    """TrainingArguments with `DEFAULTS` where nothing else is given; on the CPU where there is nothing else.

    Raises:
        ConfigError: a value that they, or we, refuse.
    """
    best = given.get("load_best_model_at_end") and "save_steps" not in given  # whose strategies must agree
    agreeing = {"save_strategy": given.get("eval_strategy", "no")} if best else {}
    if best and "eval_steps" in given:
        agreeing["save_steps"] = given["eval_steps"]
    # transformers ask to be told of the CPU, where the precision is one that GPUs have too.
    given = {**DEFAULTS, "use_cpu": not torch.accelerator.is_available(), **agreeing, **given}
    for name in POSITIVE:
        if given.get(name, 1) < 1:
            raise ConfigError(f"{name} must be at least 1, got {given[name]}.")
    if not 0 <= given.get("seed", 0) < 2**32:
        raise ConfigError(f"seed must lie in [0, 2³²), got {given['seed']}.")
    try:
        arguments = TrainingArguments(output_dir=str(out), **given)
    except Exception as error:  # their checks, and those of accelerate's and deepspeed's part, raise many types
        raise ConfigError(f"transformers' TrainingArguments refuse these settings: {error!s:.500}") from error
    # DataParallel would copy hooks that know one device, and put several batches into one; launchers use all GPUs.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@dataclass
class Run:
    """An output folder and what it was asked for.

    Args:
        asked: every setting that has a say in what is learned.
        defaults: of settings that a run of an earlier version may not have noted.
        files: names of what a run writes there, files and folders, beside `RUN_FILE` and checkpoints.
        contents: digests of what it reads, by paths of local files.
    """

    out: Path
    asked: dict[str, Any]
    defaults: dict[str, Any]
    files: tuple[str, ...]
    contents: dict[str, str]

    @classmethod
    def of(
        cls,
        files: tuple[str, ...],
        options: Any,
        shadow: ShadowConfig,
        rest: dict[str, Any],
        sources: Iterable[str | None],
    ) -> "Run":
        """The run of these settings, the run's own, a dataclass, the shadow's and TrainingArguments', on these sources."""
        asked = {**asdict(options), **shadow.resolve().to_dict(), **rest}
        asked = {k: v for k, v in asked.items() if k not in HARMLESS}
        defaults = {f.name: f.default for f in fields(options) if f.name not in HARMLESS}
        asked, defaults = json.loads(json.dumps([asked, defaults], default=str))
        contents = {}
        for source in filter(None, sources):
            with suppress(OSError):  # whoever reads it says so
                if Path(source).is_file():
                    contents[source] = folder.digest_of([Path(source)])
        return cls(Path(options.output_dir), asked, defaults, files, contents)

    def claim(self, overwrite: bool) -> dict[str, Any] | None:
        """Make sure that the output folder is this run's, or can become it by `clear`; its metrics where it has finished.

        Raises:
            CheckpointError: it holds another run, adapter or model.
        """
        out, file = self.out, folder.find(self.out, RUN_FILE)
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"output_dir={out} is a file.")
        if overwrite:
            return None
        if not file.exists():
            for name in (checkpoint.CONFIG_FILE, "config.json"):
                if folder.find(out, name).exists():
                    raise CheckpointError(
                        f"{out} already holds another adapter or model: choose another output_dir, or overwrite."
                    )
            for path in out.glob("checkpoint-*"):
                if not _is_ours(path):
                    raise CheckpointError(f"{out} holds {path.name} of something else: choose another output_dir.")
            return None
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            before = {**self.defaults, **run["asked"]}
            shadow = ShadowConfig.from_dict({k: v for k, v in before.items() if k in names(ShadowConfig)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}. Choose another output_dir, or overwrite.") from error
        before |= json.loads(json.dumps(shadow.resolve().to_dict()))
        changed = sorted(k for k in self.asked.keys() | before.keys() if self.asked.get(k) != before.get(k))
        if changed:
            differences = ", ".join(f"{k}: {before.get(k)!r} → {self.asked.get(k)!r}" for k in changed)
            raise CheckpointError(f"{out} holds another run ({differences}): choose another output_dir, or overwrite.")
        self.check_contents()
        metrics = run.get("metrics")
        if metrics is not None:
            print(f"{out} holds this run already, finished: nothing was trained.", file=sys.stderr)
        return metrics

    def clear(self, keep: tuple[str, ...] = ()) -> None:
        """Take away what another run has left, now that nothing can stop this one."""
        for path in [self.out / n for n in (RUN_FILE, *self.files) if n not in keep] + [*self.out.glob("checkpoint-*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def agrees(self, settings: tuple[str, ...]) -> bool:
        """Whether what is noted in the folder was asked for the same of ``settings``."""
        try:
            before = {**self.defaults, **json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["asked"]}
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return all(before.get(name) == self.asked.get(name) for name in settings)

    def rewritten(self) -> list[str]:
        """Which of `contents` are others than when the run was noted in the folder; none where none were noted."""
        try:
            before = json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["contents"]
            return [path for path, digest in self.contents.items() if before.get(path, digest) != digest]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return []

    def check_contents(self) -> None:
        """Raise a CheckpointError where the folder's run has read other contents of the same files."""
        if changed := self.rewritten():
            told = ", ".join(f"another content of {path}" for path in changed)
            raise CheckpointError(f"{self.out} holds another run ({told}): choose another output_dir, or overwrite.")

    def check_apart(self, **inputs: str | None) -> None:
        """Refuse an input that the run would write over.

        Raises:
            ConfigError: one of ``inputs``, paths or hub ids by the names of their settings.
        """
        for name, path in inputs.items():
            try:
                out, place = self.out.resolve(), Path(path or "").resolve()
            except (OSError, ValueError):  # no path: whoever loads it says so
                continue
            if not path or not place.is_relative_to(out):
                continue
            first = next(iter(place.relative_to(out).parts), None)
            if first is None or first in (RUN_FILE, *self.files) or first.startswith("checkpoint-"):
                raise ConfigError(
                    f"{name}={path} is in output_dir={self.out}, where the run writes: choose another one."
                )

    def record(self, metrics: dict | None = None, history: list[dict] | None = None) -> None:
        """Note down what was asked for, and what came of it."""
        run = {"asked": self.asked, "contents": self.contents, "metrics": metrics, "history": history}
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        folder.write_together(self.out, lambda staging: folder.write_text(staging / RUN_FILE, text))


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint's folder holds an adapter of Umbra."""
    try:
        return json.loads(folder.read_text(folder.find(path, checkpoint.CONFIG_FILE)))["peft_type"] == "UMBRA"
    except (OSError, ValueError, LookupError, TypeError):
        return False
