"""Load the data and the base of a study once, and check what only they can tell, before anything is trained."""

from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from umbra.base import architectures
from umbra.base.loading import load_tokenizer
from umbra.data import ChatFormatter, encode_all
from umbra.errors import ConfigError, DataError
from umbra.lab.bench.base import Base
from umbra.lab.study import lm_eval_tasks
from umbra.lab.study.definition import Study
from umbra.lab.study.methods import count, match
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.requests import Sizes
from umbra.lab.study.tasks import Task, load_task, prompt_key


def prepare(study: Study) -> tuple[Sizes, dict[str, int]]:
    """Check a study against its data and its base; see `sizes_of` for the result.

    Raises:
        ConfigError, DataError: some run would fail.
    """
    tokenizer = cast(PreTrainedTokenizerBase, load_tokenizer(study.config.base))
    formatter = ChatFormatter(tokenizer, study.config.chat_template)
    tasks = _load_tasks(study, formatter.chats)
    base = Base.named(study.config.base, torch.bfloat16, torch.device("cpu"))
    for task in tasks:
        _check_lengths(task, formatter, architectures.positions(base.model.config))
    return sizes_of(study, base)


def sizes_of(study: Study, base: Base) -> tuple[Sizes, dict[str, int]]:
    """Return the fields of every method with its size, and its number of trainable parameters."""
    fields, target = {n: m.fields for n, m in study.methods.items()}, study.config.match
    if isinstance(target, str):
        others = {n: m for n, m in study.methods.items() if n != target}
        fields |= match(base, others, count(base, target, study.methods[target], fields[target]))
    elif target is not None:
        fields = match(base, study.methods, int(target))
    return fields, {n: count(base, n, m, fields[n]) for n, m in study.methods.items()}


def _load_tasks(study: Study, chats: bool) -> list[Task]:
    """Load all tasks but lm-eval's, and check that test classes and prompts fit the training records."""
    tasks, labels = [], {}
    for name, options in study.tasks.items():
        if options.lm_eval is not None:
            lm_eval_tasks.check(name, options)
            continue
        task = load_task(name, options, chats, name in study.trained)
        tasks.append(task)
        if options.head == "classify":
            labels[name] = [{str(r["label"]) for r in part} for part in ((*task.train, *task.validation), task.test)]
    _check_leakage(study, {t.name: t for t in tasks})
    for trained in labels.keys() & set(study.trained):
        for tested in study.tested(trained):
            if unseen := labels[tested][1] - labels[trained][0]:
                raise ConfigError(
                    f"{trained} cannot be tested on {tested}: it has no training record of {', '.join(sorted(unseen))}."
                )
    return tasks


def _check_leakage(study: Study, tasks: dict[str, Task]) -> None:
    """Check that no test record of another task is among the training records. `load_task` checks each task itself."""
    for trained in study.trained:
        prompts = {prompt_key(r) for r in (*tasks[trained].train, *tasks[trained].validation)}
        for tested in tasks.keys() & set(study.tested(trained)) - {trained}:
            if seen := sum(prompt_key(r) in prompts for r in tasks[tested].test):
                raise DataError(
                    f"{seen} of {len(tasks[tested].test)} test records of {tested} are training records of {trained}, which is "
                    "tested on it: remove them from one of the two."
                )


def _check_lengths(task: Task, formatter: ChatFormatter, positions: int | None) -> None:
    """Check that prompts have tokens and that nothing exceeds the base's positions, which would crash a GPU.

    Args:
        task: The task.
        formatter: Formats its prompts.
        positions: The number of positions of the base; None if it is unlimited.
    """
    name, max_length, max_new_tokens = task.name, task.options.max_length, task.max_new_tokens
    is_generated = task.options.head == "generate" and task.metric != LOSS
    prompts = _prompt_lengths(task, formatter, is_generated)
    if prompts and not min(prompts):
        raise DataError(f"task {name}: the prompt of test record {prompts.index(0) + 1} has no token.")
    if positions is None:
        return
    if is_generated and (longest := max(prompts, default=0)) + max_new_tokens > positions:
        raise ConfigError(
            f"task {name}: its longest test prompt has {longest} tokens, with max_new_tokens={max_new_tokens} "
            f"{longest + max_new_tokens}, but the base has {positions} positions: lower max_new_tokens, or set words, which "
            "truncates the texts of a known data set."
        )
    records = [*task.train, *task.validation, *([] if is_generated else task.test)]
    if records and max_length > positions:
        examples = encode_all(
            records, formatter.tokenizer, max_length=max_length, chat_template=formatter.chat_template, name=name
        )  # fmt: skip
        longest = max(len(e["input_ids"]) for e in examples)
        if longest > positions:
            raise ConfigError(
                f"task {name}: a record has {longest} tokens within max_length={max_length}, but the base has {positions} "
                f"positions: set max_length to at most {positions}."
            )


def _prompt_lengths(task: Task, formatter: ChatFormatter, is_generated: bool) -> list[int]:
    if task.options.head == "classify":
        return [len(formatter.tokenizer(r["text"])["input_ids"]) for r in task.test]
    if is_generated:
        return [len(formatter.tokens(formatter.prompt(r), formatter.is_plain(r))) for r in task.test]
    return []
