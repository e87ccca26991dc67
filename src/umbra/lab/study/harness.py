"""Tasks of lm-eval, by name."""

import math
from typing import Any

from umbra.errors import ConfigError, DataError, unknown_key
from umbra.files import hub
from umbra.lab.study.tasks import TaskOptions

DATA = "data sets of lm-eval"  # all of which are on the hub
PERCENT = {  # of lm-eval's metrics: those of sacrebleu, squadv2 and truthfulqa_gen
    "bleu", "chrf", "chrf++", "exact", "HasAns_exact", "NoAns_exact", "HasAns_f1", "NoAns_f1", "best_exact", "best_f1",
    *(f"{name}_{of}" for name in ("bleu", "rouge1", "rouge2", "rougeL") for of in ("max", "diff")),
}  # fmt: skip


def check(name: str, options: TaskOptions) -> None:
    """Refuse a task that lm-eval does not know or cannot score as one, before anything is trained for it.

    Raises:
        ConfigError: none such, a tag or a group without a score of its own, or no lm-eval.
        DataError: its data cannot be had.
    """
    manager, wanted = _manager(options), str(options.lm_eval)
    if wanted not in manager.all_tasks:
        raise unknown_key(wanted, manager.all_tasks, f"the tasks of lm-eval (task {name})")
    if wanted not in manager.all_subtasks:
        raise ConfigError(
            f"task {name}: {wanted} is a group of lm-eval's tasks; name one of them, or each as a task of its own."
        )
    try:
        with hub.lookup(DATA):
            manager.load([wanted])
    except Exception as error:  # whatever its data set, code or packages raise
        way_out = hub.way_out(DATA, error)
        reason = f"{error!s:.300}" + (f" ({way_out})" if way_out else "")
        raise DataError(f"task {name}: lm-eval cannot load {wanted}: {reason}") from error


def score(runner: Any, tokenizer: Any, options: TaskOptions, batch_size: int) -> dict[str, Any]:
    """The task's first metric, which way it is better, its value, all values as lm-eval gives them, and what every sample got.

    Known percents become shares. Of a metric that is no mean over samples, as perplexity is, the value stands alone.
    """
    import lm_eval
    from lm_eval.models import huggingface

    run: Any = lm_eval.simple_evaluate
    make: Any = huggingface.HFLM
    lm, name = make(pretrained=runner, tokenizer=tokenizer, batch_size=batch_size), str(options.lm_eval)
    given: dict[str, Any] = {"task_manager": _manager(options), "bootstrap_iters": 0, "log_samples": True}
    with hub.lookup(DATA):
        found = run(lm, tasks=[name], limit=options.test_limit, **given)
    values = {k: v for k, v in found["results"][name].items() if isinstance(v, float) and not math.isnan(v)}
    values = {k: v for k, v in values.items() if not k.partition(",")[0].endswith("_stderr")}
    if not values:
        raise ValueError(f"lm-eval gives {name} no number: {found['results'][name]}")
    chief = next(iter(values))
    if math.isinf(values[chief]):
        raise ValueError(f"lm-eval's {chief} of {name} is not finite.")
    metric, _, chosen = chief.partition(",")
    samples = [s for s in found["samples"][name] if s.get("filter", chosen) == chosen]
    items = [float(s[metric]) for s in samples if isinstance(s.get(metric), int | float)]
    if not items or not math.isclose(sum(items) / len(items), values[chief], rel_tol=1e-6, abs_tol=1e-9):
        items = []
    less = found.get("higher_is_better", {}).get(name, {}).get(metric) is False
    whole = whole_of(metric, less)
    items = [i / whole for i in items]
    return {"metric": metric, "less_is_better": less, "value": values[chief] / whole, "values": values, "items": items}


def whole_of(metric: str, less_is_better: bool) -> float:
    """What a value is a part of: 100 of a metric that lm-eval gives in percent, else 1."""
    return 100.0 if metric in PERCENT and not less_is_better else 1.0


def _manager(options: TaskOptions) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("Tasks of lm-eval need it: pip install 'umbra-peft[lm-eval]'.") from error
    return TaskManager(include_path=options.lm_eval_path, include_defaults=options.lm_eval_path is None)
