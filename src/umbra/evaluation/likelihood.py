"""The base's choice among a closed set of answers: the one to which it gives the largest likelihood.

A base that was not trained on a task rarely writes an answer in the task's exact words, so exact match scores it near 0 %.
Its likelihoods show whether it knows the answer.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from umbra.data import ChatFormatter, Record
from umbra.deploy.opening import Opened
from umbra.evaluation.scores import LIKELIHOOD, Score
from umbra.method.losses import IGNORED
from umbra.model.shadow_model import ShadowModel

MOST_ANSWERS = 24  # a set of more distinct answers is not taken for a closed one
LEAST_REPETITION = 5  # records per distinct answer, at least


def closed_answers(records: Sequence[Record]) -> list[str]:
    """Return the allowed answers of a task, sorted, if its records repeat a few; otherwise none.

    Args:
        records: the records, all of one kind.
    """
    if not all(isinstance(r.get("completion"), str) for r in records):
        return []
    answers = sorted({r["completion"] for r in records})
    return answers if 2 <= len(answers) <= min(MOST_ANSWERS, len(records) // LEAST_REPETITION) else []


def score_likelihood(
    opened: Opened, records: list[Record], answers: list[str], batch_size: int
) -> tuple[Score, list[dict[str, Any]]]:
    """Return the base's score by likelihood, and its replies.

    Args:
        opened: an adapter.
        records: records with a prompt and a completion.
        answers: see `closed_answers`.
        batch_size: number of texts per forward.
    """
    assert isinstance(opened.model, ShadowModel)
    began = time.perf_counter()
    with opened.model.disable_adapter():
        replies = choose(opened.model, opened.formatter, records, answers, batch_size)
    parameters = sum(p.numel() for p in opened.model.base.parameters())
    return Score.of(LIKELIHOOD, replies, parameters, time.perf_counter() - began), replies


@torch.no_grad()
def choose(
    runner: PreTrainedModel, formatter: ChatFormatter, records: list[Record], answers: list[str], batch_size: int
) -> list[dict[str, Any]]:
    """Return the likeliest answer to each record: that of the largest Σ log p(token) over its tokens and its end.

    Args:
        runner: a language model.
        formatter: formats the records.
        records: records with a prompt and a completion.
        answers: the answers to choose from.
        batch_size: number of texts per forward.

    Returns:
        The replies as [{prompt, reply, reference, correct}].
    """
    replies = []
    for record in tqdm(records, desc="likelihood", disable=None, leave=False):
        encoded = [formatter.encode({**record, "completion": answer}) for answer in answers]
        scores: list[float] = []
        for start in range(0, len(encoded), batch_size):
            scores += _log_likelihoods(runner, encoded[start : start + batch_size])
        reply = answers[int(np.argmax(scores))]
        right = reply == record["completion"]
        reference = formatter.reference(record)
        replies.append({"prompt": formatter.prompt(record), "reply": reply, "reference": reference, "correct": right})
    return replies


def _log_likelihoods(runner: PreTrainedModel, encoded: list[dict[str, np.ndarray]]) -> list[float]:
    """Return the sum of log p over the labelled tokens of each text."""
    width = max(len(text["input_ids"]) for text in encoded)
    ids, labels = np.zeros((len(encoded), width), np.int64), np.full((len(encoded), width), IGNORED, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(encoded):
        length = len(text["input_ids"])
        ids[row, :length], labels[row, :length], mask[row, :length] = text["input_ids"], text["labels"], 1
    device = runner.device
    logits = runner(
        input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
    ).logits[:, :-1]
    targets = torch.from_numpy(labels).to(device)[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return (-losses.sum(1)).tolist()
