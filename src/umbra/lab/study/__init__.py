"""``umbra evaluate``: methods × tasks × seeds, with one search for every method's learning rate; ``umbra report`` tells of it.

sets.py, tasks.py and harness.py say what is learned and tested, methods.py by what, study.py declares both and names the runs,
run.py makes one, record.py keeps it, results.py and statistics.py compare, report.py, plots.py and page.py tell.
"""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from umbra.base import architectures
from umbra.base.loading import load_tokenizer
from umbra.data import ChatFormatter, encode_all
from umbra.errors import CheckpointError, ConfigError, DataError
from umbra.files import folder
from umbra.files.locks import locked
from umbra.lab.bench.base import Base
from umbra.lab.study import harness, record
from umbra.lab.study.ablations import is_ablated
from umbra.lab.study.methods import count, match
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.report import write_report
from umbra.lab.study.run import run
from umbra.lab.study.study import Study, key_of
from umbra.lab.study.tasks import STUDY_FILE, Task, asked, load_task
from umbra.options import EvaluateOptions

LOST = "device-side assert"  # what CUDA says when nothing runs on the GPU any more


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Run what of a study has not been run yet, and write its report.

    Returns:
        runs, failed, and the paths of the report's files.

    Raises:
        ConfigError, DataError: a study, or data of it, that nothing could be run from: before any training.
        CheckpointError: a folder that cannot be written; a GPU that a run has left unusable.
    """
    study, out = Study.read(options.study), Path(options.out)
    sizes, parameters = _check(study)
    with locked(out):
        for folder_of_records in (out / "runs", out / "trials"):
            folder.settle(folder_of_records)
        return _evaluate(options, study, out, sizes, parameters)


def _evaluate(
    options: EvaluateOptions, study: Study, out: Path, sizes: dict[str, dict[str, Any]], parameters: dict[str, int]
) -> dict[str, Any]:
    trials, done = list(study.trials(sizes)), record.read_all(out)
    bar = tqdm(total=len(trials) + _count(study, sizes), desc="study", disable=None, smoothing=0.1)
    note = {
        "study": _plain(study),
        "parameters": parameters,
        "command": shlex.join(["umbra", "evaluate", str(options.study), "--out", str(options.out)]),
    }
    requests: list[dict[str, Any]] = []
    for stage in (trials, requests):
        rates = choose(study, trials, done)
        requests[:] = study.runs(sizes, {k: rate for k, (rate, _) in rates.items()})
        _note(out, note, trials, requests, rates if stage is requests else {})
        with _quiet():
            _sweep(stage, done, out, study, bar, options.retry)
    bar.close()
    shutil.rmtree(out / "work", ignore_errors=True)
    if study.options.keep_adapters:
        _tell_unkept(out, requests, done)
    failed = [r for r in (*trials, *requests) if not record.is_whole(done.get(key_of(r)))]
    return {"runs": len(trials) + len(requests), "failed": len(failed), "report": [str(f) for f in write_report(out)]}


def _check(study: Study) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Load all data and the base, once, and refuse what cannot be run; what `_sizes` finds."""
    writer = ChatFormatter(load_tokenizer(study.options.base), study.options.chat_template)
    tasks = _check_data(study, writer.chats)
    base = Base.named(study.options.base, torch.bfloat16, torch.device("cpu"))
    for task in tasks:
        _check_lengths(task, writer, architectures.positions(base.model.config))
    return _sizes(study, base)


def _check_data(study: Study, chats: bool) -> list[Task]:
    """All that is learned and tested but lm-eval's, loaded once."""
    tasks, labels = [], {}
    for name, options in study.tasks.items():
        if options.lm_eval is not None:
            harness.check(name, options)
            continue
        task = load_task(name, options, chats, name in study.trained)
        tasks.append(task)
        if options.head == "classify":
            labels[name] = [{str(r["label"]) for r in part} for part in ((*task.train, *task.validation), task.test)]
    _check_unseen(study, {t.name: t for t in tasks})
    for trained in labels.keys() & set(study.trained):
        for tested in study.tested(trained):
            if other := labels[tested][1] - labels[trained][0]:
                raise ConfigError(
                    f"{trained} cannot be tested on {tested}: it does not learn the classes {', '.join(sorted(other))}."
                )
    return tasks


def _check_unseen(study: Study, tasks: dict[str, Task]) -> None:
    """Refuse to test after a task what was learned in it: a task's own test records are left out of what it learns."""
    for trained in study.trained:
        learned = {asked(r) for r in (*tasks[trained].train, *tasks[trained].validation)}
        for tested in tasks.keys() & set(study.tested(trained)) - {trained}:
            if seen := sum(asked(r) in learned for r in tasks[tested].test):
                raise DataError(
                    f"{seen} of {len(tasks[tested].test)} test records of {tested} are learned in {trained}, after which it is "
                    f"tested: take them out of one of them."
                )


def _check_lengths(task: Task, writer: ChatFormatter, positions: int | None) -> None:
    """Refuse what has no token, and what is longer than the base's positions, which a GPU would not survive."""
    name, most, new = task.name, task.options.max_length, task.max_new_tokens
    is_answered = task.options.head == "generate" and task.metric != LOSS
    if task.options.head == "classify":
        prompts = [len(writer.tokenizer(r["text"])["input_ids"]) for r in task.test]
    else:
        prompts = [len(writer.tokens(writer.prompt(r), writer.is_plain(r))) for r in task.test] if is_answered else []
    if prompts and not min(prompts):
        raise DataError(f"task {name}: test record {prompts.index(0) + 1} asks nothing: its prompt has no token.")
    if positions is None:
        return
    if is_answered:
        longest = max(prompts, default=0)
        if longest + new > positions:
            raise ConfigError(
                f"task {name}: its longest test prompt has {longest} tokens, with max_new_tokens={new} {longest + new}, but the "
                f"base is made for {positions}: set max_new_tokens lower, or words, which cuts a known set's texts."
            )
    read = [*task.train, *task.validation, *([] if is_answered else task.test)]
    if read and most > positions:
        examples = encode_all(read, writer.tokenizer, max_length=most, chat_template=writer.chat_template, name=name)
        longest = max(len(e["input_ids"]) for e in examples)
        if longest > positions:
            raise ConfigError(
                f"task {name}: a record has {longest} tokens within max_length={most}, but the base is made for {positions}: set "
                f"max_length to {positions} at most."
            )


def _note(
    out: Path, note: dict[str, Any], trials: list[dict[str, Any]], requests: list[dict[str, Any]], rates: "Rates"
) -> None:
    """What the report reads, also while runs are missing."""
    about = {
        **note, "trials": [key_of(r) for r in trials], "runs": [key_of(r) for r in requests],
        "methods": _names((*trials, *requests)), "rates": [[*k, *found] for k, found in rates.items()],
    }  # fmt: skip
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    folder.write_together(out, lambda staging: folder.write_text(staging / STUDY_FILE, text))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of each of many models."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _sizes(study: Study, base: Base) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The fields of every method with its size, and how many parameters it trains."""
    fields, target = {n: m.fields for n, m in study.methods.items()}, study.options.match
    if isinstance(target, str):
        others = {n: m for n, m in study.methods.items() if n != target}
        fields |= match(base, others, count(base, target, study.methods[target], fields[target]))
    elif target is not None:
        fields = match(base, study.methods, int(target))
    return fields, {n: count(base, n, m, fields[n]) for n, m in study.methods.items()}


def _names(requests: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """By key, the methods that a run stands for: two of one configuration share theirs."""
    found: dict[str, list[str]] = {}
    for request in requests:
        found.setdefault(key_of(request), []).append(request["method"])
    return found


def _count(study: Study, sizes: dict[str, dict[str, Any]]) -> int:
    return sum(1 for _ in study.runs(sizes, {}))


def _sweep(
    requests: Iterable[dict[str, Any]], done: dict[str, Any], out: Path, study: Study, bar: tqdm, retry: bool
) -> None:
    for request in requests:
        key = key_of(request)
        bar.set_postfix_str(
            f"{request['task']}, {request['method']}, {'trial' if request['is_trial'] else request['seed']}"
        )
        if key not in done or (retry and not record.is_whole(done[key])):
            work = out / "work" / key
            adapters = out / "adapters" / record.file_of(out, request).stem if study.options.keep_adapters else None
            done[key] = run(request, work, None if request["is_trial"] or is_ablated(request["fields"]) else adapters)
            record.write(out, done[key])
            shutil.rmtree(work, ignore_errors=True)
            unscored = {f" on {t}": e for t, e in done[key]["umbra"]["unscored"].items()}
            errors = {"": done[key]["run_info"]["error_msg"], **unscored}
            for where, error in errors.items():
                if error:
                    told = error.strip().splitlines()[-1]
                    tqdm.write(f"{request['task']}, {request['method']}{where} failed: {told:.200}", file=sys.stderr)
            if any(LOST in error for error in errors.values()):
                raise CheckpointError(
                    f"{request['task']}, {request['method']} failed and took the GPU's context with it: nothing more can run there "
                    f"in this process. What is done is kept in {out}, and the same command goes on after this run."
                )
        bar.update()


def _tell_unkept(out: Path, requests: Iterable[dict[str, Any]], done: dict[str, Any]) -> None:
    """Say of how many runs no adapter lies there: they ended before keep_adapters was set, or adapters were removed."""
    trained = [r for r in requests if r["kind"] != "base" and not is_ablated(r["fields"])]
    keys = {key for key in map(key_of, trained) if record.succeeded(done.get(key))}
    unkept = sum(not any(out.glob(f"adapters/*--{key}")) for key in keys)
    if unkept:
        tqdm.write(
            f"keep_adapters: {unkept} of {len(keys)} finished runs have no adapter in {out / 'adapters'}, since they ended without "
            f"keep_adapters. To train one again, remove its record from {out / 'runs'} and give the same command.",
            file=sys.stderr,
        )


Rates = dict[tuple[str, str], tuple[float | None, str]]


def choose(study: Study, trials: list[dict[str, Any]], done: dict[str, Any]) -> Rates:
    """The learning rate of every method and task, and where it comes from: the one whose held-out loss is lowest, on the task
    itself where it was searched on, else over those that were (each task's losses relative to its lowest).
    """
    found: dict[tuple[str, str], dict[float, float]] = {}
    for request in trials:
        kept = done.get(key_of(request))
        loss = kept["umbra"]["validation_loss"] if kept is not None and record.succeeded(kept) else None
        if loss is not None and math.isfinite(loss):
            found.setdefault((request["method"], request["task"]), {})[request["training"]["learning_rate"]] = loss
    rates: Rates = {}
    for name, method in study.methods.items():
        given = study.rates(method)
        searched = [task for method_name, task in found if method_name == name]
        for task in study.trained if method.is_trained else []:
            if len(given) == 1:
                rates[name, task] = given[0], "given"
                continue
            judged = [found[name, of] for of in ([task] if task in searched else searched)]
            common = [r for r in given if judged and all(r in losses for losses in judged)]
            worse = {r: sum(losses[r] / max(min(losses.values()), 1e-9) for losses in judged) for r in common}
            if worse:
                best = min(worse, key=lambda r: worse[r])
                rates[name, task] = best, "searched" if task in searched else f"searched on {', '.join(searched)}"
            else:
                rates[name, task] = (
                    None,
                    "no trial has succeeded: the training's own" if given else "the training's own",
                )
    return rates


def _plain(study: Study) -> dict[str, Any]:
    return {
        **asdict(study.options), "tasks": {n: asdict(t) for n, t in study.tasks.items()},
        "methods": {n: asdict(m) for n, m in study.methods.items()}, "trained": study.trained,
        "search": None if study.search is None else asdict(study.search),
        "tested": {n: study.tested(n) for n in study.trained},
    }  # fmt: skip
