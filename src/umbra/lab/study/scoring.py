"""Score the model of a request on one task."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.data import ChatFormatter, Collator, Labels, Record, encode_all
from umbra.evaluation.likelihood import choose, closed_answers
from umbra.evaluation.scoring import in_mode, score_classes, score_generation
from umbra.lab.study import lm_eval_tasks
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.requests import Request
from umbra.lab.study.tasks import Task, TaskOptions
from umbra.method.losses import IGNORED
from umbra.model.shadow_model import ShadowModel


def in_study_mode(model: nn.Module, mode: str) -> AbstractContextManager[PreTrainedModel]:
    """Return a context whose value is the model to run: a shadow model in the given mode, any other model as it is."""
    if isinstance(model, ShadowModel):
        return in_mode(model, mode)
    return nullcontext(cast(PreTrainedModel, model))


def score_task(
    model: nn.Module, mode: str, name: str, options: TaskOptions, task: Task | None, tokenizer: PreTrainedTokenizerBase,
    labels: Labels | None, request: Request,
) -> dict[str, Any]:  # fmt: skip
    """Score a model on one task in one mode.

    Args:
        model: The model.
        mode: A mode of its method.
        name: The name of the task.
        options: The options of the task.
        task: Its records; None for a task of lm-eval.
        tokenizer: The tokenizer.
        labels: The classes of a classification head.
        request: The request of the run.

    Returns:
        ``metric``, ``value`` and ``items``, the value of every item; further fields depend on the metric.
    """
    with in_study_mode(model, mode) as runner:
        runner.eval()
        if task is None:
            return lm_eval_tasks.score(runner, tokenizer, options, request["batch_size"])
        if task.metric == LOSS:
            losses = loss_of(runner, tokenizer, task, task.test, None, request["chat_template"])[1]
            if not all(map(math.isfinite, losses)):
                raise ValueError(f"The loss on {name} is not finite: training has diverged.")
            return {"metric": LOSS, "value": sum(losses) / len(losses), "items": losses}
        if task.options.head == "classify":
            replies, seconds = score_classes(
                runner, tokenizer, task.test, batch_size=request["batch_size"], max_length=task.options.max_length, name=name
            )  # fmt: skip
            scores = [{"exact": float(r["correct"])} for r in replies]
        else:
            replies, seconds, _ = score_generation(
                runner, ChatFormatter(tokenizer, request["chat_template"]), task.test, batch_size=request["batch_size"],
                max_new_tokens=task.max_new_tokens, name=name,
            )  # fmt: skip
            scores = [task.score(r["reply"], t) for r, t in zip(replies, task.test, strict=True)]
        means = {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}
        main = next(iter(means))
        items = [round(s[main], 4) for s in scores]
        return {"metric": task.metric, "value": means[main], "values": means, "items": items, "seconds": seconds}


def score_likelihood(
    base: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, request: Request
) -> dict[str, Any] | None:  # fmt: skip
    """Score the base by the likelihoods of a task's answers, if the task repeats a few; see `umbra.evaluation.likelihood`.

    Args:
        base: The bare base.
        task: The task.
        tokenizer: The tokenizer.
        request: The request of the run.

    Returns:
        A score as from `score_task`; None for a task with open answers.
    """
    answers = closed_answers(task.test) if task.options.head == "generate" and task.metric != LOSS else []
    if not answers:
        return None
    formatter = ChatFormatter(tokenizer, request["chat_template"])
    replies = choose(base.eval(), formatter, task.test, answers, request["batch_size"])
    items = [round(next(iter(task.score(r["reply"], t).values())), 4) for r, t in zip(replies, task.test, strict=True)]
    return {"metric": task.metric, "value": sum(items) / len(items), "items": items}


@torch.no_grad()
def loss_of(
    runner: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, examples: list[Record], labels: Labels | None,
    chat_template: bool,
) -> tuple[float, list[float]]:  # fmt: skip
    """Compute the loss of a model on records, truncated as in training. Records without a remaining label are skipped.

    Args:
        runner: A causal language model or a classifier.
        tokenizer: Its tokenizer.
        task: The task, for its maximum length and its name.
        examples: The records.
        labels: The classes of a classifier; None for a language model.
        chat_template: Whether the chat template is applied.

    Returns:
        The mean over all labelled tokens (nats/token), or over all records of a classifier; and the mean of every record.
    """
    runner.eval()
    encoded = encode_all(
        examples,
        tokenizer,
        max_length=task.options.max_length,
        chat_template=chat_template,
        labels=labels,
        name=task.name,
    )
    collate, device = Collator(cast(int, tokenizer.pad_token_id)), next(runner.parameters()).device
    sums, counts = [], []
    for start in tqdm(range(0, len(encoded), 8), desc="loss", disable=None, leave=False):
        batch = {k: v.to(device) for k, v in collate(encoded[start : start + 8]).items()}
        targets = batch.pop("labels")
        for logits, target in zip(runner(**batch).logits, targets, strict=True):
            if labels is None:
                logits = logits[-len(target) :]  # virtual tokens of PEFT's prompt methods stand before the text
                logits, target = logits[:-1], target[1:]
            else:
                logits, target = logits[None], target[None]
            sums.append(float(F.cross_entropy(logits.float(), target, reduction="sum", ignore_index=IGNORED)))
            counts.append(int((target != IGNORED).sum()))
    return sum(sums) / sum(counts), [round(s / n, 5) for s, n in zip(sums, counts, strict=True)]
