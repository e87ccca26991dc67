"""Tasks of lm-eval in a study."""

import math
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.errors import ConfigError, DataError, raising, unknown_key
from umbra.files import hub
from umbra.lab.study.tasks import TaskOptions
from umbra.options.extras import install_command

DATA = "data sets of lm-eval"  # all of them are on the hub
PERCENT = {  # metrics that lm-eval gives in percent: those of sacrebleu, squadv2 and truthfulqa_gen
    "bleu", "chrf", "chrf++", "exact", "HasAns_exact", "NoAns_exact", "HasAns_f1", "NoAns_f1", "best_exact", "best_f1",
    *(f"{name}_{of}" for name in ("bleu", "rouge1", "rouge2", "rougeL") for of in ("max", "diff")),
}  # fmt: skip


def check(name: str, options: TaskOptions) -> None:
    """Check that lm-eval has a task and can load its data, before anything is trained.

    Raises:
        ConfigError: an unknown task, a group or tag without one score, or lm-eval is not installed.
        DataError: the data of the task cannot be loaded.
    """
    manager, task = _manager(options), str(options.lm_eval)
    if task not in manager.all_tasks:
        raise unknown_key(task, manager.all_tasks, f"the tasks of lm-eval (task {name})")
    if task not in manager.all_subtasks:
        raise ConfigError(f"task {name}: {task} is a group of lm-eval's tasks; use its members as tasks instead.")

    def describe(error: Exception) -> str:
        advice = hub.offline_advice(DATA, error)
        return f"task {name}: lm-eval cannot load {task}: {error!s:.300}" + (f" ({advice})" if advice else "")

    with raising(DataError, describe), hub.lookup(DATA):
        manager.load([task])


def score(
    runner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions, batch_size: int
) -> dict[str, Any]:  # fmt: skip
    """Score a model on a task of lm-eval.

    Args:
        runner: A causal language model.
        tokenizer: Its tokenizer.
        options: The task.
        batch_size: Records per batch.

    Returns:
        ``metric``, the first metric of the task; ``less_is_better``; its ``value``, percents as shares; all ``values`` as given
        by lm-eval; and the value of every sample as ``items``, empty if the metric is no mean over samples (perplexity).
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    name, manager = str(options.lm_eval), _manager(options)
    model = cast(Any, HFLM)(pretrained=runner, tokenizer=tokenizer, batch_size=batch_size)
    with hub.lookup(DATA):
        results = cast(Any, lm_eval).simple_evaluate(
            model, tasks=[name], limit=options.test_limit, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    values = {k: v for k, v in results["results"][name].items() if isinstance(v, float) and not math.isnan(v)}
    values = {k: v for k, v in values.items() if not k.partition(",")[0].endswith("_stderr")}
    if not values:
        raise ValueError(f"lm-eval gives {name} no number: {results['results'][name]}")
    main = next(iter(values))
    if math.isinf(values[main]):
        raise ValueError(f"lm-eval's {main} of {name} is not finite.")
    metric, _, filter_name = main.partition(",")
    samples = [s for s in results["samples"][name] if s.get("filter", filter_name) == filter_name]
    items = [float(s[metric]) for s in samples if isinstance(s.get(metric), int | float)]
    if not items or not math.isclose(sum(items) / len(items), values[main], rel_tol=1e-6, abs_tol=1e-9):
        items = []
    less_is_better = results.get("higher_is_better", {}).get(name, {}).get(metric) is False
    scale = scale_of(metric, less_is_better)
    return {
        "metric": metric, "less_is_better": less_is_better, "value": values[main] / scale, "values": values,
        "items": [i / scale for i in items],
    }  # fmt: skip


def scale_of(metric: str, less_is_better: bool) -> float:
    """Return 100 for metrics that lm-eval gives in percent, else 1."""
    return 100.0 if metric in PERCENT and not less_is_better else 1.0


def _manager(options: TaskOptions) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"Tasks of lm-eval need it: {install_command('lm-eval')}.") from error
    return TaskManager(include_path=options.lm_eval_path, include_defaults=options.lm_eval_path is None)
