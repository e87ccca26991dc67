"""Tasks of lm-eval, by name."""

import math
from typing import Any

from ..errors import ConfigError, unknown_key
from .tasks import TaskOptions


def check(name: str, options: TaskOptions) -> None:
    """Refuse a task that lm-eval does not know, before anything is trained for it.

    Raises:
        ConfigError: none such, or no lm-eval.
    """
    known = _manager(options).all_tasks
    if options.lm_eval not in known:
        raise unknown_key(str(options.lm_eval), known, f"the tasks of lm-eval (task {name})")


def score(runner: Any, tokenizer: Any, options: TaskOptions, batch_size: int) -> dict[str, Any]:
    """The task's first metric, all its values, and what every sample got."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm, name = HFLM(pretrained=runner, tokenizer=tokenizer, batch_size=batch_size), str(options.lm_eval)
    found = simple_evaluate(
        lm, tasks=[name], limit=options.test_limit, task_manager=_manager(options), bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    values = {k: v for k, v in found["results"][name].items() if isinstance(v, float) and not math.isnan(v)}
    chief = next(iter(values))
    metric = chief.partition(",")[0]
    samples = [sample for of_task in found["samples"].values() for sample in of_task]
    items = [float(s[metric]) for s in samples if isinstance(s.get(metric), int | float)]
    return {"metric": metric, "value": values[chief], "values": values, "items": items}


def _manager(options: TaskOptions) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("Tasks of lm-eval need it: pip install 'umbra-peft[lm-eval]'.") from error
    return TaskManager(include_path=options.lm_eval_path, include_defaults=options.lm_eval_path is None)
