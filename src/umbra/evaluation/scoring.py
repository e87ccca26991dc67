"""Accuracy of the base, the attached and the detached model on a held-out set, with counts and 95 % intervals.

For a shadow that escalates requests, the number of escalated requests and the accuracy on the others are reported too. The row
`CASCADE` combines both models: the detached model answers, and the attached model answers what it escalates.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.base import architectures
from umbra.data import (
    ChatFormatter,
    Record,
    Rows,
    class_name,
    encode_plain,
    end_tokens,
    local_files,
    read_records,
    record_kind,
)
from umbra.data.reasoning import END_OF_THOUGHT
from umbra.deploy.opening import MODES, Opened, open_model
from umbra.errors import ConfigError, DataError
from umbra.evaluation.likelihood import closed_answers, score_likelihood
from umbra.evaluation.scores import CASCADE, LIKELIHOOD, Score, escalates
from umbra.model.shadow_model import ShadowModel
from umbra.options import EvalOptions, check_dtype, listed

# One sequence of tokens for each prompt and nothing else, regardless of the base's generation config.
PLAIN: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
GREEDY: dict[str, Any] = {**PLAIN, "do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def on_accelerator(model: PreTrainedModel) -> None:
    """Move the model to the GPU if it fits there and is not placed explicitly."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fits = torch.cuda.is_available() and size < torch.cuda.mem_get_info()[0]
    if fits and not architectures.is_placed(model.base if isinstance(model, ShadowModel) else model):
        model.to("cuda")  # type: ignore[arg-type]


@contextmanager
def in_mode(model: PreTrainedModel, mode: str) -> Iterator[PreTrainedModel]:
    """Enter a mode and return the model that answers in it.

    Args:
        model: an attached model; or a stock model, which has no other mode than detached.
        mode: attached, base (the bare base) or detached (the shadow alone).

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown mode {mode!r}: choose from {', '.join(MODES)}.")
    if not isinstance(model, ShadowModel):
        assert mode == "detached", mode
        yield model
    elif mode == "detached":
        yield model.detached()
    elif mode == "base":
        with model.disable_adapter():
            yield model
    else:
        yield model


def count_parameters(model: PreTrainedModel, mode: str, runner: PreTrainedModel) -> int:
    """Return the number of parameters that run in a mode."""
    counted = model.base if mode == "base" and isinstance(model, ShadowModel) else runner
    return sum(p.numel() for p in counted.parameters())


def answer_of(text: str, pattern: str | None) -> str:
    """Return the answer in a text, after its reasoning.

    Args:
        text: the text.
        pattern: regular expression whose last match is the answer (the first group that matched, if any); None for the whole text.
    """
    text = text.rpartition(END_OF_THOUGHT)[2]
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return ""
    return next((group for group in matches[-1].groups() if group is not None), matches[-1].group()).strip()


def reference_of(record: Record) -> str:
    """Return the text of a record's last answer, as written in the data."""
    last = record["completion"] if "completion" in record else record["messages"]
    content = last if isinstance(last, str) else last[-1].get("content") or ""
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text", "")) for part in content)
    return str(content)


def _check_references(records: Rows, options: EvalOptions) -> None:
    """Raise a DataError if the answer pattern does not match a reference answer, to which replies are compared."""
    for i, record in enumerate(records):
        if options.answer_pattern is None or record_kind(record, records.where(i)) not in ("completion", "messages"):
            return
        if not answer_of(reference_of(record), options.answer_pattern):
            raise DataError(
                f"{records.where(i)}: answer_pattern={options.answer_pattern!r} does not match the answer "
                f"{reference_of(record)!r:.200}."
            )


@torch.no_grad()
def score_generation(
    runner: PreTrainedModel, formatter: ChatFormatter, records: list[Record], *, batch_size: int = 16,
    max_new_tokens: int = 64, answer_pattern: str | None = None, name: str = "",
) -> tuple[list[dict[str, Any]], float, int]:  # fmt: skip
    """Generate a greedy answer to every record, and compare it with the record's by exact match.

    Args:
        runner: the model.
        formatter: formats the records.
        records: the records.
        batch_size: records generated together.
        max_new_tokens: length of an answer.
        answer_pattern: see `answer_of`.
        name: the mode, for the progress bar.

    Returns:
        The replies as [{prompt, reply, reference, correct}], seconds spent in generation, and number of generated tokens.

    Raises:
        DataError: an empty prompt, or one as long as the model's positions.
    """
    replies, seconds, num_tokens = [], 0.0, 0
    ends = end_tokens(runner, formatter) or None
    runner.eval()
    for start in tqdm(range(0, len(records), batch_size), desc=f"score {name}", disable=None, leave=False):
        part = records[start : start + batch_size]
        prompts = [formatter.prompt(r) for r in part]
        rows = [formatter.tokens(p, formatter.is_plain(r)) for p, r in zip(prompts, part, strict=True)]
        if [] in rows:
            raise DataError(f"Record {start + rows.index([]) + 1} has an empty prompt: there is nothing to answer.")
        began = time.perf_counter()
        texts, count = generate_replies(runner, formatter, rows, max_new_tokens, ends)
        seconds += time.perf_counter() - began
        num_tokens += count
        for record, prompt, text in zip(part, prompts, texts, strict=True):
            reference = formatter.reference(record)
            right = answer_of(text, answer_pattern) == answer_of(reference, answer_pattern)
            replies.append({"prompt": prompt, "reply": text, "reference": reference, "correct": right})
    return replies, seconds, num_tokens


@torch.no_grad()
def generate_replies(
    runner: PreTrainedModel, formatter: ChatFormatter, prompts: list[list[int]], new: int, ends: list[int] | None
) -> tuple[list[str], int]:
    """Return the greedy answers to prompts, generated in one batch, and the number of their tokens.

    Args:
        runner: the model.
        formatter: has its tokenizer.
        prompts: token ids.
        new: maximum number of tokens of an answer.
        ends: tokens that end an answer.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    tokenizer, generate = formatter.tokenizer, cast("Callable[..., torch.Tensor]", runner.generate)
    pad = cast(int, tokenizer.pad_token_id)
    batch = left_padded(prompts, pad, runner.device)
    width = batch["input_ids"].shape[1]
    out = generate(
        **batch, max_new_tokens=room(runner, width, new), pad_token_id=pad, eos_token_id=ends, tokenizer=tokenizer, **GREEDY
    )  # fmt: skip
    answers = out[:, width:]
    return tokenizer.batch_decode(answers, skip_special_tokens=True), int((answers != pad).sum())


def room(runner: PreTrainedModel, length: int, new: int) -> int:
    """Return the number of tokens, at most ``new``, that can follow a prompt of ``length`` tokens.

    Raises:
        DataError: no token can follow.
    """
    limit = architectures.positions(runner.config)
    if limit is None or length < limit:
        return new if limit is None else min(new, limit - length)
    raise DataError(
        f"A prompt has {length} tokens, but the model has positions for {limit}, including the answer: shorten the prompt."
    )


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (B, T) of rows of token ids, with padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def score_classes(
    runner: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    name: str = "",
) -> tuple[list[dict[str, Any]], float]:
    """Predict the class of every record: that of the largest logit, or with several labels those of all positive logits.

    Args:
        runner: the model.
        tokenizer: the tokenizer.
        records: the records.
        batch_size: records in a forward pass.
        max_length: number of tokens to which texts are cut; None for all.
        name: the mode, for the progress bar.

    Returns:
        The replies as [{prompt, reply, reference, correct}], and seconds spent in the model.

    Raises:
        DataError: a regression model, or a label that the model does not have.
    """
    config = runner.config
    if config.problem_type == "regression" or config.num_labels == 1:
        raise DataError(
            "Accuracy needs classes, but this model was trained for regression: see eval_loss in its training log."
        )
    names, known = cast("dict[int, str]", config.id2label), cast("dict[str, int]", config.label2id)
    several = config.problem_type == "multi_label_classification"
    replies, seconds = [], 0.0
    runner.eval()
    for start in tqdm(range(0, len(records), batch_size), desc=f"score {name}", disable=None, leave=False):
        part = records[start : start + batch_size]
        rows = [encode_plain(tokenizer, r["text"])[:max_length] for r in part]
        if [] in rows:
            raise DataError(f"Record {start + rows.index([]) + 1} has an empty text: there is nothing to classify.")
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        began = time.perf_counter()
        batch = batch.to(runner.device)
        logits = runner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.cpu()
        seconds += time.perf_counter() - began
        if not logits.isfinite().all():
            raise DataError(f"{name}: the model's logits are not finite, so no class can be predicted.")
        for record, row in zip(part, logits, strict=True):
            reply, is_right = _classify(row, record["label"], several, names, known)
            replies.append(
                {"prompt": record["text"], "reply": reply, "reference": record["label"], "correct": is_right}
            )
    return replies, seconds


def _classify(
    row: torch.Tensor, label: object, several: bool, names: dict[int, str], known: Collection[str]
) -> tuple[str | list[str], bool]:
    """Return the predicted class or classes of logits (C,), and whether they equal the label."""
    if isinstance(label, list) != several:
        kind = "a list of classes" if several else "one class"
        raise DataError(f"The label must be {kind}, as in the model's training data, got {label!r}.")
    if isinstance(label, list):
        replies = [names[i] for i in range(len(names)) if row[i] > 0]
        return replies, sorted(replies) == sorted(map(class_name, _label_names(label, names)))
    if class_name(label) not in known:
        raise DataError(f"The label {label!r} is not one of the model's: {', '.join(known)}.")
    reply = names[int(row.argmax())]
    return reply, reply == class_name(label)


def _label_names(label: list, names: dict[int, str]) -> list[str]:
    """Return the classes of a label, which lists their names or a 0 or 1 for each."""
    if all(isinstance(x, int | float) for x in label):
        return [names[i] for i, x in enumerate(label) if x]
    return label


def score(opened: Opened, records: list[Record], mode: str, options: EvalOptions) -> tuple[Score, list[dict[str, Any]]]:
    """Return one mode's score and its replies."""
    tokens: int | None = None
    model, formatter, escalation = opened.model, opened.formatter, opened.escalation
    new = options.max_new_tokens
    if escalation is not None and mode == "detached":  # an answer must have room for it
        new = max(new, len(formatter.tokens(escalation)) + 1)
    with in_mode(model, mode) as runner:
        if model.can_generate():
            replies, seconds, tokens = score_generation(
                runner, formatter, records, batch_size=options.batch_size, max_new_tokens=new,
                answer_pattern=options.answer_pattern, name=mode,
            )  # fmt: skip
        else:
            replies, seconds = score_classes(
                runner, formatter.tokenizer, records, batch_size=options.batch_size,
                max_length=architectures.positions(runner.config), name=mode,
            )  # fmt: skip
        parameters = count_parameters(model, mode, runner)
    return Score.of(mode, replies, parameters, seconds, tokens, escalation), replies


def cascade(opened: Opened, replies: dict[str, list[dict[str, Any]]]) -> Score | None:
    """Return the score of the detached model with the attached model for escalated records; None if it cannot be computed."""
    escalation = opened.escalation
    if escalation is None or not {"attached", "detached"} <= replies.keys():
        return None
    pairs = zip(replies["detached"], replies["attached"], strict=True)
    chosen = [pair if escalates(alone, escalation) else alone for alone, pair in pairs]
    return Score.of(CASCADE, chosen, count_parameters(opened.model, "attached", opened.model), None)


Replies = dict[str, list[dict[str, Any]]]  # of each mode


def score_adapter(options: EvalOptions) -> list[Score]:
    """Run ``umbra eval``. If the file for the replies cannot be written, report that on stderr and return the scores.

    Raises:
        ConfigError, DataError, CheckpointError, BaseModelError: see `score_modes`.
    """
    scores, replies = score_modes(options)
    try:
        write_replies(options.output, replies)
    except ConfigError as error:
        print(error, file=sys.stderr)
    return scores


def write_replies(output: str | None, replies: Replies) -> None:
    """Write every reply as a line of JSON, if an output file is given.

    Raises:
        ConfigError: the file cannot be written.
    """
    if not output:
        return
    lines = [json.dumps({"mode": m, **reply}, ensure_ascii=False) for m, listed in replies.items() for reply in listed]
    try:
        with open(output, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"output={output} could not be written: {error}. The scores are complete.") from error


def score_modes(options: EvalOptions) -> tuple[list[Score], Replies]:
    """Score the requested modes, and the cascade.

    Raises:
        ConfigError, DataError: unusable options or data, before any model is loaded.
        CheckpointError, BaseModelError: see `umbra.load`.
    """
    modes = _parse_modes(options.modes)
    if options.answer_pattern is not None:
        try:
            re.compile(options.answer_pattern)
        except re.error as error:
            raise ConfigError(f"answer_pattern is not a valid regular expression: {error}") from error
    check_dtype(options.dtype)
    _check_output(options.output, options.data)
    records = read_records(options.data, options.split, listed(options.ignore_columns))[: options.limit]
    kind = record_kind(records[0], records.where(0))
    _check_references(records, options)
    opened = open_model(
        options.adapter, options.base, dtype=options.dtype, chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
    )  # fmt: skip
    on_accelerator(opened.model)
    expected = ("completion", "messages") if opened.model.can_generate() else ("label",)
    if kind not in expected:
        raise DataError(f"{options.data} holds {kind} records; this adapter is scored on {' or '.join(expected)}.")
    scores: list[Score] = []
    replies: Replies = {}
    for mode in _possible_modes(opened, modes):
        result, replies[mode] = score(opened, records, mode, options)
        scores.append(result)
        if mode == "base" and (answers := closed_answers(records)):
            result, replies[LIKELIHOOD] = score_likelihood(opened, records, answers, options.batch_size)
            scores.append(result)
    both = cascade(opened, replies)
    scores += [both] if both else []
    return scores, replies


def _parse_modes(text: str | None) -> list[str] | None:
    """Return the modes that are asked for; None for all that are possible."""
    if text is None:
        return None
    modes = [m.strip() for m in text.split(",") if m.strip()]
    if not modes:
        raise ConfigError(f"modes is empty: choose from {', '.join(MODES)}.")
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"Unknown mode {mode!r}: choose from {', '.join(MODES)}.")
    return modes


def _possible_modes(opened: Opened, modes: list[str] | None) -> list[str]:
    """Return the modes to score; by default all of the folder, without a base whose head was never trained.

    Raises:
        ConfigError: a mode that the folder cannot run.
    """
    if modes is not None:
        return [opened.mode(mode) for mode in modes]
    if opened.has_untrained_head:
        print(
            "umbra: no row for the base: its classification head has random weights, so its accuracy means nothing "
            "(--modes base,attached,detached scores it).",
            file=sys.stderr,
        )
        return [mode for mode in opened.modes if mode != "base"]
    return list(opened.modes)


def _check_output(name: str | None, data: str | list[str]) -> None:
    """Raise a ConfigError, before any reply is generated, if the output cannot be written or would overwrite the data."""
    if name is None:
        return
    file = Path(name)
    if file.exists() and any(file.samefile(part) for part in local_files(data)):
        raise ConfigError(f"output={name} is the data that is scored: name another file.")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"output={name} lies in a folder that does not exist.")
    is_new = not file.exists() and not file.is_symlink()  # a link without a target does not exist either
    is_writable = os.access(file.absolute().parent if is_new else file, os.W_OK)
    if not is_writable or not (is_new or file.is_file() or file.is_char_device()):
        raise ConfigError(f"output={name} is not a writable file: name a regular file.")
