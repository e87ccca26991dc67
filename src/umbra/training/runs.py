"""Runs of `umbra train` and `umbra pretrain`: sorting flat settings, and an output folder that can be resumed."""

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments, get_scheduler

from umbra.adapters.card import may_replace
from umbra.adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, is_umbra
from umbra.base import private_transformers
from umbra.config import ShadowConfig, migrate
from umbra.errors import CheckpointError, ConfigError, raising, unknown_key
from umbra.files import folder
from umbra.options import (
    SEEDS,
    PretrainOptions,
    TrainOptions,
    check_bounds,
    check_dtype,
    check_types,
    is_main_process,
    names,
)
from umbra.training import checkpoints

RUN_FILE = "run.json"  # settings and results of a run, in its output folder
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
    "logging_nan_inf_filter": False,  # otherwise a loss that is NaN is logged as 0
}
BOUNDS: dict[str, tuple[float, float | None]] = {  # of TrainingArguments that are otherwise checked only after the data is read
    "per_device_train_batch_size": (1, None), "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None), "seed": (0, SEEDS), "data_seed": (0, SEEDS), "learning_rate": (0, None),
    "dataloader_num_workers": (0, 2**10), "neftune_noise_alpha": (0, None), "num_train_epochs": (0, None),
}  # fmt: skip
STAGE = re.compile(r"\d+-[a-z_+]+")  # a folder of `umbra pretrain`
INNER_FILES = (
    "stage.json", CONFIG_FILE, WEIGHTS_FILE, "teacher.json", "teacher.json.new", "tokens.npy",
    "log_p.npy",
)  # fmt: skip
LENGTHS = ("max_steps", "num_train_epochs")  # settings that may be raised: the run then continues from its end
# Settings that may differ between a run and its continuation: they do not affect the weights.
HARMLESS = (
    "output_dir", "overwrite", "disable_tqdm", "report_to", "logging_dir", "save_total_limit", "resume_from_checkpoint",
)  # fmt: skip


def sort_settings(
    values: dict[str, Any], kind: type, required: tuple[str, ...], where: str
) -> tuple[Any, ShadowConfig, dict[str, Any]]:
    """Sort flat settings by what they configure.

    Args:
        values: the settings.
        kind: dataclass of the run's own options.
        required: names of options that must be set.
        where: the source of the settings, for messages.

    Returns:
        The run's options, the shadow's configuration, and the settings of TrainingArguments.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a required one missing, or a value of a wrong type.
    """
    values = migrate(values)
    arguments = [f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_")]
    known = [*names(kind, ShadowConfig), *arguments]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, where)
    if isinstance(out := values.get("output_dir"), str):
        values = {**values, "output_dir": os.path.expanduser(out)}  # as TrainingArguments does
    if not isinstance(values.get("resume_from_checkpoint"), bool | None):
        raise ConfigError("resume_from_checkpoint: a run resumes by itself, from its own folder; leave it out.")
    options = kind(**{k: v for k, v in values.items() if k in names(kind)})
    check_types(kind, asdict(options))
    shadow = ShadowConfig(**{k: v for k, v in values.items() if k in names(ShadowConfig)})
    for name in required:
        if not getattr(options, name):
            raise ConfigError(f"{name} is missing: set it in the configuration, or by --{name}.")
    check_dtype(options.dtype)
    if options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {options.max_length}.")
    trainer_settings = {k: v for k, v in values.items() if k in arguments and k not in names(kind, ShadowConfig)}
    trainer_settings.pop("resume_from_checkpoint", None)
    # TrainingArguments accepts fsdp=True, although its annotation does not.
    check_types(TrainingArguments, {k: v for k, v in trainer_settings.items() if (k, v) != ("fsdp", True)})
    return options, shadow, trainer_settings


def make_arguments(out: Path | str, settings: dict[str, Any]) -> TrainingArguments:
    """Return TrainingArguments with `DEFAULTS` for settings that are not given, on the CPU if there is no accelerator.

    Args:
        out: the output folder.
        settings: fields of TrainingArguments.

    Raises:
        ConfigError: a value that is refused.
    """
    loads_best = settings.get("load_best_model_at_end") and "save_steps" not in settings  # needs agreeing strategies
    agreeing = {"save_strategy": settings.get("eval_strategy", "no")} if loads_best else {}
    if loads_best and "eval_steps" in settings:
        agreeing["save_steps"] = settings["eval_steps"]
    # transformers requires use_cpu for a precision that GPUs support too.
    settings = {**DEFAULTS, "use_cpu": not torch.accelerator.is_available(), **agreeing, **settings}
    for name, (least, below) in BOUNDS.items():
        check_bounds(name, settings.get(name), least, below)
    refused = "transformers' TrainingArguments refuse these settings"
    with raising(ConfigError, lambda error: f"{refused}: {error!s:.500}"):
        arguments = TrainingArguments(output_dir=str(out), **settings)
        _check_schedule(arguments)
    # DataParallel would copy hooks that refer to one device, and merge several batches; launchers use all GPUs.
    private_transformers.use_one_gpu(arguments)
    return arguments


def _check_schedule(arguments: TrainingArguments) -> None:
    """Create a schedule, which a trainer does only when it begins to train; invalid settings raise exceptions of any type."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2,
        scheduler_specific_kwargs=cast("dict[str, Any] | None", arguments.lr_scheduler_kwargs),
    )  # fmt: skip


@dataclass
class Run:
    """An output folder and the settings of its run.

    Args:
        out: the folder.
        settings: all settings that affect the weights.
        defaults: defaults of the options, for runs of earlier versions that did not record them.
        files: names of the files and folders that the run writes, besides `RUN_FILE` and checkpoints.
        contents: digests of the local files that the run reads, by path.
        is_extensible: whether the run can be made longer.
        is_longer: whether the folder holds a shorter run with otherwise equal settings.
        ended_at: the last step of that run, if it had finished.
    """

    out: Path
    settings: dict[str, Any]
    defaults: dict[str, Any]
    files: tuple[str, ...]
    contents: dict[str, str]
    is_extensible: bool = True
    is_longer: bool = False
    ended_at: int | None = None

    @classmethod
    def of(
        cls,
        files: tuple[str, ...],
        options: PretrainOptions | TrainOptions,
        shadow: ShadowConfig,
        trainer_settings: dict[str, Any],
        sources: Iterable[str | None],
    ) -> "Run":
        """Return the run of settings as `sort_settings` returns them, which reads the files ``sources`` and writes ``files``."""
        settings = {**asdict(options), **shadow.resolve().to_dict(), **trainer_settings}
        settings = {k: v for k, v in settings.items() if k not in HARMLESS}
        defaults = {f.name: f.default for f in fields(options) if f.name not in HARMLESS}
        settings, defaults = json.loads(json.dumps([settings, defaults], default=str))
        contents = {}
        for source in filter(None, sources):
            with suppress(OSError):  # reported when the file is read
                if Path(source).is_file():
                    contents[source] = folder.digest_of([Path(source)])
        return cls(Path(options.output_dir), settings, defaults, files, contents)

    def claim(self, overwrite: bool) -> dict[str, Any] | None:
        """Check that the output folder belongs to this run, or can be made so by `clear`.

        Args:
            overwrite: whether another run in the folder may be replaced.

        Returns:
            The metrics of the run if it has finished, otherwise None.

        Raises:
            CheckpointError: the folder holds another run, adapter or model; or, with ``overwrite``, a file that Umbra did not
                write and that the run would replace.
        """
        out = self.out
        if os.path.lexists(out) and not out.is_dir():
            raise CheckpointError(f"output_dir={out} is a file, or a link without a target: choose another output_dir.")
        for path in checkpoints.checkpoints(out):
            if not _is_ours(path):
                raise CheckpointError(f"{out} holds {path.name} of something else: choose another output_dir.")
        if overwrite:
            self._check_replaceable()
            return None
        if not folder.find(out, RUN_FILE).exists():
            for name in (CONFIG_FILE, "config.json"):
                if folder.find(out, name).exists():
                    raise CheckpointError(
                        f"{out} already holds another adapter or model: choose another output_dir, or overwrite."
                    )
            return None
        run, before = self._recorded()
        changed = sorted(k for k in self.settings.keys() | before.keys() if self.settings.get(k) != before.get(k))
        metrics = run.get("metrics")
        self.is_longer = self._is_longer(changed, before, metrics or {})
        if changed and not self.is_longer:
            differences = ", ".join(f"{k}: {before.get(k)!r} → {self.settings.get(k)!r}" for k in changed)
            limits = ("a run of several stages cannot change its length", "it can be made longer, not shorter")
            limit = f" ({limits[self.is_extensible]})" if set(changed) <= set(LENGTHS) else ""
            raise CheckpointError(
                f"{out} holds another run ({differences}){limit}: choose another output_dir, or overwrite."
            )
        self.check_contents()
        if self.is_longer:
            self.ended_at = None if metrics is None else metrics.get("global_step")
            return None
        if metrics is not None and is_main_process():
            print(f"{out} holds this run already, finished: nothing was trained.", file=sys.stderr)
        return metrics

    def _recorded(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of the folder's `RUN_FILE`, and the settings of its run, in their current form."""
        file = folder.find(self.out, RUN_FILE)
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            before = migrate({k: v for k, v in {**self.defaults, **run["asked"]}.items() if k not in HARMLESS})
            shadow = ShadowConfig.from_dict({k: v for k, v in before.items() if k in names(ShadowConfig)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}. Choose another output_dir, or overwrite.") from error
        return run, before | json.loads(json.dumps(shadow.resolve().to_dict()))

    def _is_longer(self, changed: list[str], before: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Return whether the only change is a greater length."""
        key = "max_steps" if (self.settings.get("max_steps") or -1) > 0 else "num_train_epochs"
        if not self.is_extensible or changed != [key]:
            return False
        default = DEFAULTS.get(key, metrics.get("global_step"))  # number of epochs, or of steps
        earlier, now = before.get(key, default), self.settings.get(key, default)
        return earlier is not None and now is not None and 0 < earlier < now

    def resumes_from(self, where: Path | None = None) -> str | None:
        """Return the checkpoint from which the run resumes; for a finished run that was made longer, its last one.

        Args:
            where: the folder of the checkpoints; by default the run's.

        Raises:
            CheckpointError: all checkpoints are damaged, or the last one does not exist.
        """
        last = checkpoints.last_checkpoint(where or self.out)
        if self.ended_at is not None and (last is None or checkpoints.step_of(Path(last)) != self.ended_at):
            raise CheckpointError(
                f"{self.out} has no checkpoint of its end, step {self.ended_at}, to continue from (save_strategy=no and best keep "
                "none): start a new run from its adapter by --adapter, or start over with overwrite."
            )
        return last

    def _check_replaceable(self) -> None:
        """Raise a CheckpointError if the run would replace a file that Umbra did not write."""
        for name in (RUN_FILE, *self.files):
            path = folder.find(self.out, name)
            if path.is_file() and name != CARD_FILE and not self._is_written_by_umbra(name):
                raise CheckpointError(
                    f"{path} was not written by this kind of run, or has been changed since: overwrite removes only what "
                    "Umbra wrote. Move it away, or choose another output_dir."
                )

    def _is_written_by_umbra(self, name: str) -> bool:
        """Return whether Umbra wrote a file in the folder, by its content or by the digest that a finished run recorded."""
        path = folder.find(self.out, name)
        try:
            if name == CARD_FILE:
                return may_replace(path)
            if name == WEIGHTS_FILE:
                path = folder.find(self.out, CONFIG_FILE)
            if name in (CONFIG_FILE, WEIGHTS_FILE):
                return is_umbra(json.loads(folder.read_text(path)))
            run = json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))
            digests = run.get("files")
            if name == RUN_FILE:
                return "asked" in run and "contents" in run
            return digests is None or name not in digests or digests[name] == folder.digest_of([path])
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def clear(self, keep: tuple[str, ...] = ()) -> None:
        """Remove the files of another run, except for ``keep`` and for files that Umbra did not write."""
        names = [n for n in self.files if n not in keep and self._is_written_by_umbra(n)]
        for path in checkpoints.checkpoints(self.out):
            if _is_ours(path):
                folder.remove(path)
        for name in names:
            path = self.out / name
            if path.is_dir() and not path.is_symlink():
                _clear_folder(path)
            else:
                path.unlink(missing_ok=True)
        if RUN_FILE not in keep:
            (self.out / RUN_FILE).unlink(missing_ok=True)

    def agrees(self, settings: tuple[str, ...]) -> bool:
        """Return whether the run that is recorded in the folder has equal values of these settings."""
        try:
            before = {**self.defaults, **json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["asked"]}
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return all(before.get(name) == self.settings.get(name) for name in settings)

    def rewritten(self) -> list[str]:
        """Return the inputs whose content differs from the recorded one; none if none was recorded.

        They include files that were added to a folder or a glob, or removed. Only some runs record a base or an adapter.
        """
        try:
            before = json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["contents"]
            models = {self.settings.get("base"), self.settings.get("adapter")}
            files = (before.keys() ^ self.contents.keys()) - models if before and self.contents else set()
            return sorted(files | {p for p in before.keys() & self.contents.keys() if before[p] != self.contents[p]})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return []

    def check_contents(self) -> None:
        """Raise a CheckpointError if the recorded run read other contents of the same files."""
        if changed := self.rewritten():
            changes = ", ".join(f"another content of {path}" for path in changed)
            raise CheckpointError(f"{self.out} holds another run ({changes}): choose another output_dir, or overwrite.")

    def check_apart(self, **inputs: str | None) -> None:
        """Check that the run overwrites none of its inputs.

        Args:
            inputs: paths or hub ids, by the names of their settings.

        Raises:
            ConfigError: names the input.
        """
        for name, path in inputs.items():
            if path and self._writes_over(path):
                raise ConfigError(
                    f"{name}={path} is in output_dir={self.out}, where the run writes: choose another one."
                )

    def _writes_over(self, path: str) -> bool:
        """Return whether an input lies where the run writes, or is another name of a file there."""
        try:
            out, place = self.out.resolve(), Path(path).resolve()
            written = [out / n for n in (RUN_FILE, *self.files)]
            if place.is_file() and any(p.is_file() and p.samefile(place) for p in written):
                return True
        except (OSError, ValueError, RuntimeError):  # not a path: reported when it is loaded
            return False
        if not place.is_relative_to(out):
            return False
        if place.is_dir():
            return True
        first = next(iter(place.relative_to(out).parts), None)
        return first is None or first in (RUN_FILE, *self.files) or first.startswith("checkpoint-")

    def record(self, metrics: dict | None = None, history: list[dict] | None = None) -> None:
        """Record the run's settings and results: the metrics, the log, and digests of the written files."""
        run = {"asked": self.settings, "contents": self.contents, "metrics": metrics, "history": history}
        if metrics is not None:
            written = [n for n in self.files if (self.out / n).is_file() and n != CARD_FILE]
            run["files"] = {n: folder.digest_of([self.out / n]) for n in written}
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        folder.write_together(self.out, lambda staging: folder.write_text(staging / RUN_FILE, text))


def _is_ours(path: Path) -> bool:
    """Return whether a checkpoint's folder holds an adapter of Umbra, or the remains of one after a kill."""
    try:
        if folder.is_empty(path):
            return True
        return is_umbra(json.loads(folder.read_text(folder.find(path, CONFIG_FILE))))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _clear_folder(path: Path) -> None:
    """Remove the files of stages and of a teacher cache from their folder, and the folder if it is empty then."""
    for inner in path.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            if STAGE.fullmatch(inner.name):
                _clear_folder(inner)
            elif checkpoints.step_of(inner) is not None and _is_ours(inner):
                folder.remove(inner)
        elif inner.name in INNER_FILES or (inner.name == CARD_FILE and may_replace(inner)):
            inner.unlink()
    folder.recover(path)
    with suppress(OSError):
        path.rmdir()
