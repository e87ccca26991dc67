"""Checks of a study's definition before anything is loaded."""

from transformers import TrainingArguments

from umbra.errors import ConfigError, shown, unknown_key
from umbra.lab.bench.base import RANDOM
from umbra.lab.study.definition import Study
from umbra.lab.study.mappings import name_list
from umbra.options import check_dtype, check_types
from umbra.training.runs import make_arguments

SET_BY_STUDY = ("output_dir", "seed")  # TrainingArguments that the study sets


def check_study(study: Study) -> None:
    """Check everything about a study that its file alone decides.

    Raises:
        ConfigError: the study cannot be run; the message names the key.
    """
    _check_values(study)
    _check_names(study)
    _check_rates(study)
    if not study.trained:
        raise ConfigError("Every task of the study is tested only: add a task with training records.")
    for task in study.trained:
        for method in study.methods.values():
            _check_training({**study.config.training, **study.tasks[task].training, **method.training}, task)
    _check_search(study)
    _check_heads(study)


def _check_values(study: Study) -> None:
    config = study.config
    check_dtype(config.dtype)
    if config.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {config.batch_size}.")
    if config.base.startswith(RANDOM):
        raise ConfigError(f"base={config.base!r} is for umbra bench: a study needs trained weights; name a model.")
    if not config.seeds or not all(0 <= s < 2**32 for s in config.seeds):
        raise ConfigError(f"seeds must be a list of whole numbers from 0 on, got {shown(config.seeds)}.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds has duplicates: {shown(config.seeds)}.")
    if isinstance(config.match, int | float) and config.match < 1:
        raise ConfigError(f"match must be a number of parameters or a method's name, got {shown(config.match)}.")


def _check_names(study: Study) -> None:
    """Check that all tasks and methods that the study refers to are defined."""
    config = study.config
    transfer = [n for k, v in config.transfer.items() for n in (k, *name_list(v, f"transfer.{k}"))]
    searched = (study.search.tasks or []) if study.search else []
    for where, tasks in (("search.tasks", searched), ("transfer", transfer), ("forgetting", config.forgetting)):
        for name in tasks:
            if name not in study.tasks:
                raise unknown_key(str(name), study.tasks, f"the study's tasks ({where})")
    match = config.match if isinstance(config.match, str) else None
    for where, methods in (("reference", [config.reference]), ("ours", config.ours or []), ("match", [match])):
        for name in methods:
            if name is not None and name not in study.methods:
                raise unknown_key(str(name), study.methods, f"the study's methods ({where})")
    if config.reference is not None:
        kind = study.methods[config.reference].kind
        if sum(m.kind == kind for m in study.methods.values()) < 2:
            raise ConfigError(f"reference={config.reference} is the only method of kind {kind}: it has no ablations.")


def _check_rates(study: Study) -> None:
    rates = [r for m in study.methods.values() for r in m.learning_rate or []]
    for rate in (*rates, *(study.search.learning_rate if study.search else [])):
        if rate <= 0:
            raise ConfigError(f"learning_rate must be above 0, got {shown(rate)}.")


def _check_training(arguments: dict[str, object], task: str) -> None:
    """Check the TrainingArguments of one task and method."""
    known = [f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_") and f not in SET_BY_STUDY]
    for key in arguments:
        if key not in known:
            raise unknown_key(key, known, f"training (task {task})")
    check_types(TrainingArguments, arguments)
    if arguments.get("eval_strategy", "no") != "no":
        raise ConfigError(f"training (task {task}): eval_strategy must be no; a study scores its runs at the end.")
    make_arguments("unused", arguments)


def _check_search(study: Study) -> None:
    search = study.search
    if search is None:
        for name, method in study.methods.items():
            if len(method.learning_rate or []) > 1:
                raise ConfigError(f"method {name} has several learning rates, but the study has no search.")
        return
    if len(set(search.learning_rate)) < len(search.learning_rate):
        raise ConfigError(f"search.learning_rate has duplicates: {shown(search.learning_rate)}.")
    if not search.learning_rate:
        raise ConfigError("search.learning_rate is empty: list the rates to try.")
    if (search.max_steps is not None and search.max_steps < 1) or not 0 <= search.seed < 2**32:
        raise ConfigError("search.max_steps must be at least 1, and search.seed at least 0.")
    for name in study.trained:
        if "learning_rate" in study.tasks[name].training:
            raise ConfigError(f"task {name} sets a learning_rate, which the search would override: remove one of them.")
    for name in search.tasks or []:
        if name not in study.trained:
            raise ConfigError(f"search.tasks includes {name}, which is tested only: list tasks that are trained on.")


def _check_heads(study: Study) -> None:
    """Check that every task can be tested with the head of the task that was trained."""
    for trained in study.trained:
        for name in study.transfer_of(trained):
            if study.classifies(name) != study.classifies(trained):
                head = "a classification head" if study.classifies(trained) else "generated text"
                raise ConfigError(f"{trained} uses {head}, so it cannot be tested on {name}: give both the same head.")
    for name in study.config.forgetting:
        if study.classifies(name):
            raise ConfigError(f"forgetting: the bare base has no classification head for {name}: set head: generate.")
    if study.config.forgetting and all(m.is_trained for m in study.methods.values()):
        raise ConfigError("forgetting is measured against the bare base: add a method with {kind: base}.")
