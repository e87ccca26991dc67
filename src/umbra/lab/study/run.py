"""One run: a request becomes a trained model, its scores, and a record (docs/guides/studies.md describes requests and records)."""

import gc
import math
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter, Labels
from umbra.lab.bench.methods import trainable
from umbra.lab.study import records
from umbra.lab.study.methods import BY_LIKELIHOOD, build
from umbra.lab.study.requests import Request
from umbra.lab.study.scoring import in_study_mode, loss_of, score_likelihood, score_task
from umbra.lab.study.tasks import Task, TaskOptions, load_task
from umbra.lab.study.training import configuration_of, save_adapter, train_model

Value = TypeVar("Value")


def run(request: Request, folder: Path, adapters: Path | None) -> records.Record:
    """Execute a request and return its record. An exception is recorded with its traceback; only interruptions are raised.

    Args:
        request: The request.
        folder: The folder for checkpoints, if ``save_strategy`` asks for any; a killed run resumes from them.
        adapters: The folder to save the adapter in; None to discard it.
    """
    started, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    measured, error = attempt(lambda: execute(request, folder, adapters))
    measured = measured or {}
    gc.collect()
    seconds = time.perf_counter() - started + measured.get("earlier_seconds", 0.0)
    return records.make(request, measured, created, seconds, error)


def attempt(call: Callable[[], Value]) -> tuple[Value | None, str]:
    """Return the result of a call and no error, or None and the traceback of its exception.

    Methods, data sets and libraries may raise anything; it is the result of their run or test and must not end the study.
    """
    try:
        return call(), ""
    except Exception:
        return None, traceback.format_exc()


def execute(request: Request, folder: Path, adapters: Path | None) -> dict[str, Any]:
    """Train and score the model of a request; see `run` for the arguments.

    Returns:
        The measurements that `records.make` puts into a record.
    """
    tokenizer = cast(PreTrainedTokenizerBase, load_tokenizer(request["base"]))
    options = {n: TaskOptions(**t) for n, t in request["tasks"].items()}
    tasks = _load_tasks(request, options, tokenizer)
    learned = tasks.get(request["task"])
    labels = None
    if learned is not None and learned.options.head == "classify":
        labels = Labels.of(r["label"] for r in (*learned.train, *learned.validation))
    model = _build_model(request, tokenizer, labels)
    measured: dict[str, Any] = {
        "trainable_parameters": trainable(model) if request["kind"] != "base" else 0,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_config": configuration_of(model),
    }
    if request["kind"] != "base":
        assert learned is not None
        measured |= train_model(model, learned, tokenizer, labels, request, folder)
        measured["file_bytes"] = save_adapter(model, adapters, tokenizer, request["chat_template"])
    else:
        model.to("cuda" if torch.cuda.is_available() and not request["training"].get("use_cpu") else "cpu")
    model.eval()
    measured["device"] = str(next(model.parameters()).device)
    if request["is_trial"]:
        assert learned is not None
        with in_study_mode(model, request["modes"][0]) as runner:
            loss = loss_of(runner, tokenizer, learned, learned.validation, labels, request["chat_template"])[0]
        return measured | {"validation_loss": loss if math.isfinite(loss) else None}
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise ValueError("Training has diverged: not all trained weights are finite.")
    measured["max_new_tokens"] = None if learned is None else learned.max_new_tokens
    return measured | _score_all(request, model, options, tasks, tokenizer, labels)


def _load_tasks(
    request: Request, options: dict[str, TaskOptions], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Task]:  # fmt: skip
    """Load the records of all tasks but lm-eval's."""
    chats = ChatFormatter(tokenizer, request["chat_template"]).chats
    return {
        n: load_task(n, o, chats, n == request["task"] and request["kind"] != "base")
        for n, o in options.items()
        if o.lm_eval is None
    }


def _build_model(request: Request, tokenizer: PreTrainedTokenizerBase, labels: Labels | None) -> nn.Module:
    classifier = None if labels is None else {**labels.config(), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(request["seed"])  # for the weights of a classification head
    base = cast(PreTrainedModel, load_base(request["base"], classifier=classifier, dtype=request["dtype"]))
    torch.manual_seed(request["seed"])
    return build(request["kind"], base, request["fields"], labels is not None)


def _score_all(
    request: Request, model: nn.Module, options: dict[str, TaskOptions], tasks: dict[str, Task],
    tokenizer: PreTrainedTokenizerBase, labels: Labels | None,
) -> dict[str, Any]:  # fmt: skip
    """Score a model on all tests and in all modes; a test that fails costs neither the training nor the other scores."""
    scores: dict[str, dict[str, Any]] = {}
    unscored: dict[str, str] = {}
    for name in request["tests"]:
        for mode in request["modes"]:
            score, error = attempt(
                lambda name=name, mode=mode: score_task(
                    model, mode, name, options[name], tasks.get(name), tokenizer, labels, request
                )
            )
            if score is None:
                unscored[name] = error
            else:
                scores.setdefault(name, {})[mode] = score
        task = tasks.get(name)
        if request["kind"] == "base" and task is not None and name in scores:
            score, _ = attempt(
                lambda task=task: score_likelihood(cast(PreTrainedModel, model), task, tokenizer, request)
            )
            scores[name] |= {BY_LIKELIHOOD: score} if score else {}
    if not scores:
        raise RuntimeError(next(iter(unscored.values())))
    return {"scores": scores, "unscored": unscored}
