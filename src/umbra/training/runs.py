"""What `umbra train` and `umbra pretrain` share: flat settings sorted out, and an output folder that can be resumed."""

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from umbra.adapters.card import may_replace
from umbra.adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from umbra.config import ShadowConfig, migrate
from umbra.errors import CheckpointError, ConfigError, unknown_key
from umbra.files import folder
from umbra.options import SEEDS, check_bounds, check_dtype, check_types, names, speaks
from umbra.training import resuming

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
    "logging_nan_inf_filter": False,  # or a loss that is NaN is logged as 0
}
BOUNDS: dict[str, tuple[float, float | None]] = {  # of TrainingArguments that nothing else checks before the data is read
    "per_device_train_batch_size": (1, None), "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None), "seed": (0, SEEDS), "data_seed": (0, SEEDS), "learning_rate": (0, None),
    "dataloader_num_workers": (0, 2**10), "neftune_noise_alpha": (0, None), "num_train_epochs": (0, None),
}  # fmt: skip
STAGE = re.compile(r"\d+-[a-z_+]+")  # a folder of `umbra pretrain`
INNER_FILES = (
    "stage.json", CONFIG_FILE, WEIGHTS_FILE, "teacher.json", "teacher.json.new", "tokens.npy",
    "log_p.npy",
)  # fmt: skip
LENGTHS = ("max_steps", "num_train_epochs")  # that may be raised: the run then goes on from its end
# Fields that may differ between a run and its continuation: they change nothing that is learned.
HARMLESS = (
    "output_dir", "overwrite", "disable_tqdm", "report_to", "logging_dir", "save_total_limit", "resume_from_checkpoint",
)  # fmt: skip


def sort_settings(
    values: dict[str, Any], kind: type, required: tuple[str, ...], where: str
) -> tuple[Any, ShadowConfig, dict[str, Any]]:
    """Sort flat settings into the run's own (``kind``, a dataclass), the shadow's and TrainingArguments'.

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
    for name, (least, below) in BOUNDS.items():
        check_bounds(name, given.get(name), least, below)
    try:
        arguments = TrainingArguments(output_dir=str(out), **given)
        _check_schedule(arguments)
    except Exception as error:  # their checks, and those of accelerate's and deepspeed's part, raise many types
        raise ConfigError(f"transformers' TrainingArguments refuse these settings: {error!s:.500}") from error
    # DataParallel would copy hooks that know one device, and put several batches into one; launchers use all GPUs.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_schedule(arguments: TrainingArguments) -> None:
    """Make a schedule now, as a trainer does only when it begins to train; it raises whatever type it likes."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )  # fmt: skip


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
    is_extensible: bool = True
    is_longer: bool = False  # than the folder's run, of which it is the continuation
    ended_at: int | None = None  # the step at which that run ended, if it had finished

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
            CheckpointError: it holds another run, adapter or model; or, with ``overwrite``, something that Umbra did not write
                and the run would replace.
        """
        out = self.out
        if os.path.lexists(out) and not out.is_dir():
            raise CheckpointError(f"output_dir={out} is a file, or a link to no folder: choose another one.")
        for path in resuming.checkpoints(out):
            if not _is_ours(path):
                raise CheckpointError(f"{out} holds {path.name} of something else: choose another output_dir.")
        if overwrite:
            self._check_own()
            return None
        if not folder.find(out, RUN_FILE).exists():
            for name in (CONFIG_FILE, "config.json"):
                if folder.find(out, name).exists():
                    raise CheckpointError(
                        f"{out} already holds another adapter or model: choose another output_dir, or overwrite."
                    )
            return None
        run, before = self._noted()
        changed = sorted(k for k in self.asked.keys() | before.keys() if self.asked.get(k) != before.get(k))
        metrics = run.get("metrics")
        self.is_longer = self._is_longer(changed, before, metrics or {})
        if changed and not self.is_longer:
            differences = ", ".join(f"{k}: {before.get(k)!r} → {self.asked.get(k)!r}" for k in changed)
            limits = ("a run of several stages keeps its length", "it can be made longer, not shorter")
            limit = f" ({limits[self.is_extensible]})" if set(changed) <= set(LENGTHS) else ""
            raise CheckpointError(
                f"{out} holds another run ({differences}){limit}: choose another output_dir, or overwrite."
            )
        self.check_contents()
        if self.is_longer:
            self.ended_at = None if metrics is None else metrics.get("global_step")
            return None
        if metrics is not None and speaks():
            print(f"{out} holds this run already, finished: nothing was trained.", file=sys.stderr)
        return metrics

    def _noted(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of the folder's `RUN_FILE`, and what its run was asked for, in today's terms."""
        file = folder.find(self.out, RUN_FILE)
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            before = migrate({k: v for k, v in {**self.defaults, **run["asked"]}.items() if k not in HARMLESS})
            shadow = ShadowConfig.from_dict({k: v for k, v in before.items() if k in names(ShadowConfig)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}. Choose another output_dir, or overwrite.") from error
        return run, before | json.loads(json.dumps(shadow.resolve().to_dict()))

    def _is_longer(self, changed: list[str], before: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Whether nothing but the run's length has changed, and that has grown."""
        key = "max_steps" if (self.asked.get("max_steps") or -1) > 0 else "num_train_epochs"
        if not self.is_extensible or changed != [key]:
            return False
        default = DEFAULTS.get(key, metrics.get("global_step"))  # of epochs, or as many steps as they were
        earlier, now = before.get(key, default), self.asked.get(key, default)
        return earlier is not None and now is not None and 0 < earlier < now

    def resumes_from(self, where: Path | None = None) -> str | None:
        """The checkpoint that the run goes on from; of a finished one that became longer, that of its end.

        Args:
            where: the folder of the checkpoints; by default the run's own.

        Raises:
            CheckpointError: all checkpoints are damaged, or there is none of the end.
        """
        last = resuming.last_checkpoint(where or self.out)
        if self.ended_at is not None and (last is None or resuming.step_of(Path(last)) != self.ended_at):
            raise CheckpointError(
                f"{self.out} has no checkpoint of its end, step {self.ended_at}, to go on from (save_strategy=no and best keep "
                "none): start a new run from its adapter by --adapter, or train anew with overwrite."
            )
        return last

    def _check_own(self) -> None:
        """Raise a CheckpointError for a file that the run would replace and Umbra did not write."""
        for name in (RUN_FILE, *self.files):
            path = folder.find(self.out, name)
            if path.is_file() and name != CARD_FILE and not self._wrote(name):
                raise CheckpointError(
                    f"{path} was not written by this kind of run, or has been changed since: overwrite removes only what "
                    "Umbra wrote. Move it away, or choose another output_dir."
                )

    def _wrote(self, name: str) -> bool:
        """Whether Umbra wrote a file in the folder: by its content, or by the digest that the finished run has noted."""
        path = folder.find(self.out, name)
        try:
            if name == CARD_FILE:
                return may_replace(path)
            if name == WEIGHTS_FILE:
                path = folder.find(self.out, CONFIG_FILE)
            if name in (CONFIG_FILE, WEIGHTS_FILE):
                return json.loads(folder.read_text(path))["peft_type"] == "UMBRA"
            run = json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))
            digests = run.get("files")
            if name == RUN_FILE:
                return "asked" in run and "contents" in run
            return digests is None or name not in digests or digests[name] == folder.digest_of([path])
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def clear(self, keep: tuple[str, ...] = ()) -> None:
        """Take away what another run has left, now that nothing can stop this one; nothing that Umbra did not write."""
        names = [n for n in self.files if n not in keep and self._wrote(n)]
        for path in resuming.checkpoints(self.out):
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
        """Whether what is noted in the folder was asked for the same of ``settings``."""
        try:
            before = {**self.defaults, **json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["asked"]}
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return all(before.get(name) == self.asked.get(name) for name in settings)

    def rewritten(self) -> list[str]:
        """Which of `contents` are others than when the run was noted in the folder; none where none were noted.

        A file that has come to a folder or a glob, or has gone, is one of them; a base or an adapter is noted by some runs alone.
        """
        try:
            before = json.loads(folder.read_text(folder.find(self.out, RUN_FILE)))["contents"]
            models = {self.asked.get("base"), self.asked.get("adapter")}
            files = (before.keys() ^ self.contents.keys()) - models if before and self.contents else set()
            return sorted(files | {p for p in before.keys() & self.contents.keys() if before[p] != self.contents[p]})
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
            if path and self._writes_over(path):
                raise ConfigError(
                    f"{name}={path} is in output_dir={self.out}, where the run writes: choose another one."
                )

    def _writes_over(self, path: str) -> bool:
        """Whether an input lies where the run writes, or is another name of a file there."""
        try:
            out, place = self.out.resolve(), Path(path).resolve()
            written = [out / n for n in (RUN_FILE, *self.files)]
            if place.is_file() and any(p.is_file() and p.samefile(place) for p in written):
                return True
        except (OSError, ValueError, RuntimeError):  # no path: whoever loads it says so
            return False
        if not place.is_relative_to(out):
            return False
        if place.is_dir():
            return True
        first = next(iter(place.relative_to(out).parts), None)
        return first is None or first in (RUN_FILE, *self.files) or first.startswith("checkpoint-")

    def record(self, metrics: dict | None = None, history: list[dict] | None = None) -> None:
        """Note down what was asked for, and what came of it: the metrics, and digests of the files that were written."""
        run = {"asked": self.asked, "contents": self.contents, "metrics": metrics, "history": history}
        if metrics is not None:
            written = [n for n in self.files if (self.out / n).is_file() and n != CARD_FILE]
            run["files"] = {n: folder.digest_of([self.out / n]) for n in written}
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        folder.write_together(self.out, lambda staging: folder.write_text(staging / RUN_FILE, text))


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint's folder holds an adapter of Umbra, or what a kill has left of one."""
    try:
        if folder.is_empty(path):
            return True
        return json.loads(folder.read_text(folder.find(path, CONFIG_FILE)))["peft_type"] == "UMBRA"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _clear_folder(path: Path) -> None:
    """Remove the files of stages and of a teacher from a folder of these, and the folder where nothing else is in it."""
    for inner in path.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            if STAGE.fullmatch(inner.name):
                _clear_folder(inner)
            elif resuming.step_of(inner) is not None and _is_ours(inner):
                folder.remove(inner)
        elif inner.name in INNER_FILES or (inner.name == CARD_FILE and may_replace(inner)):
            inner.unlink()
    folder.settle(path)
    with suppress(OSError):
        path.rmdir()
