"""Scores of base, attached and detached on a held-out set, with counts and 95 % intervals.

A shadow that was taught to pass requests on is also told how often it does, and how it answers the others; the row
`CASCADE` is both together, the detached model and, for what it passes on, the pair.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.adapters.prompting import open_formatter
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
from umbra.data.chat import END_OF_THOUGHT
from umbra.errors import ConfigError, DataError
from umbra.model.loading import load
from umbra.model.shadow_model import ShadowModel
from umbra.options import EvalOptions, check_dtype, listed

MODES = ("base", "attached", "detached")
CASCADE = "cascade"
# Whatever the base's own generation config asks for: one sequence of tokens for each prompt, and nothing else.
PLAIN: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False,
    "output_logits": False, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
GREEDY: dict[str, Any] = {**PLAIN, "do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Score:
    """One mode's result on ``total`` records; ``low`` and ``high`` bound the accuracy at 95 % (Wilson).

    ``escalated`` records were passed on; of the others it has ``kept_accuracy``, between ``kept_low`` and ``kept_high``.
    """

    mode: str
    correct: int
    total: int
    accuracy: float
    low: float
    high: float
    parameters: int
    seconds: float | None
    tokens_per_second: float | None
    escalated: int | None = None
    kept_accuracy: float | None = None
    kept_low: float | None = None
    kept_high: float | None = None

    @classmethod
    def of(
        cls, mode: str, replies: list[dict[str, Any]], parameters: int, seconds: float | None, tokens: int | None = None,
        escalation: str | None = None,
    ) -> "Score":  # fmt: skip
        """The score of these replies, which took ``seconds`` and have ``tokens``."""
        correct, total = sum(r["correct"] for r in replies), len(replies)
        speed = tokens / seconds if tokens is not None and seconds else None
        told: dict[str, Any] = {}
        if escalation is not None:
            kept = [r for r in replies if not _escalates(r, escalation)]
            right = sum(r["correct"] for r in kept)
            told["escalated"] = total - len(kept)
            if kept:
                told["kept_accuracy"] = right / len(kept)
                told["kept_low"], told["kept_high"] = wilson(right, len(kept))
        return cls(mode, correct, total, correct / total, *wilson(correct, total), parameters, seconds, speed, **told)


def _escalates(reply: dict[str, Any], escalation: str) -> bool:
    return str(reply["reply"]).strip().startswith(escalation.strip())


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default."""
    p, zz = correct / total, z * z / total
    centre, spread = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / total + zz / total / 4) / (1 + zz)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def on_accelerator(model: ShadowModel) -> ShadowModel:
    """The model on the GPU, if there is one with room for it and nobody has put the base elsewhere on purpose."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fits = torch.cuda.is_available() and size < torch.cuda.mem_get_info()[0]
    if fits and not architectures.is_placed(model.base):
        model.to("cuda")  # type: ignore[arg-type]
    return model


@contextmanager
def in_mode(model: ShadowModel, mode: str) -> Iterator[PreTrainedModel]:
    """The model that answers in a mode: the pair, the bare base, or the shadow alone.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown mode {mode!r}: choose from {', '.join(MODES)}.")
    if mode == "detached":
        yield model.detached()
    elif mode == "base":
        with model.disable_adapter():
            yield model
    else:
        yield model


def count_parameters(model: ShadowModel, mode: str, runner: PreTrainedModel) -> int:
    """Parameters that run in a mode."""
    return sum(p.numel() for p in (model.base if mode == "base" else runner).parameters())


def answer_of(text: str, pattern: str | None) -> str:
    """The answer in a text, after its reasoning: the last match of the pattern (its first group that matched, if any has), or all
    of it."""
    text = text.rpartition(END_OF_THOUGHT)[2]
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return ""
    return next((group for group in matches[-1].groups() if group is not None), matches[-1].group()).strip()


def reference_of(record: Record) -> str:
    """The text of a record's answer, as it is written."""
    last = record["completion"] if "completion" in record else record["messages"]
    content = last if isinstance(last, str) else last[-1].get("content") or ""
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text", "")) for part in content)
    return str(content)


def _check_references(records: Rows, options: EvalOptions) -> None:
    """Raise a DataError for an answer in which the pattern finds none: every reply would be held to nothing."""
    for i, record in enumerate(records):
        if options.answer_pattern is None or record_kind(record, records.where(i)) not in ("completion", "messages"):
            return
        if not answer_of(reference_of(record), options.answer_pattern):
            raise DataError(
                f"{records.where(i)}: answer_pattern={options.answer_pattern!r} finds no answer in "
                f"{reference_of(record)!r:.200}."
            )


@torch.no_grad()
def score_generation(
    runner: PreTrainedModel, writer: ChatFormatter, records: list[Record], *, batch_size: int = 16,
    max_new_tokens: int = 64, answer_pattern: str | None = None, name: str = "",
) -> tuple[list[dict[str, Any]], float, int]:  # fmt: skip
    """Greedy answers to every record, compared by exact match of the answers.

    Returns:
        The replies as [{prompt, reply, reference, correct}], seconds spent in generation, and tokens generated.
    """
    tokenizer, replies, seconds, made = writer.tokenizer, [], 0.0, 0
    ends = end_tokens(runner, writer) or None
    runner.eval()
    for start in tqdm(range(0, len(records), batch_size), desc=f"score {name}", disable=None, leave=False):
        part = records[start : start + batch_size]
        prompts = [writer.prompt(r) for r in part]
        rows = [writer.tokens(p, writer.is_plain(r)) for p, r in zip(prompts, part, strict=True)]
        if [] in rows:
            raise DataError(f"Record {start + rows.index([]) + 1} has an empty prompt: there is nothing to answer.")
        batch = left_padded(rows, int(tokenizer.pad_token_id), runner.device)  # type: ignore[arg-type]
        new_tokens = room(runner, batch["input_ids"].shape[1], max_new_tokens)
        began = time.perf_counter()
        out = runner.generate(  # type: ignore[operator]
            **batch, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends,
            tokenizer=tokenizer, **GREEDY,
        )  # fmt: skip
        seconds += time.perf_counter() - began
        new = out[:, batch["input_ids"].shape[1] :]
        made += int((new != tokenizer.pad_token_id).sum())
        for record, prompt, text in zip(
            part, prompts, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            reference = writer.reference(record)
            right = answer_of(text, answer_pattern) == answer_of(reference, answer_pattern)
            replies.append({"prompt": prompt, "reply": text, "reference": reference, "correct": right})
    return replies, seconds, made


def room(runner: PreTrainedModel, length: int, new: int) -> int:
    """How many tokens can follow a prompt of ``length`` (T), ``new`` at most.

    Raises:
        DataError: none can.
    """
    most = architectures.positions(runner.config)
    if most is None or length < most:
        return new if most is None else min(new, most - length)
    raise DataError(f"A prompt has {length} tokens, but the model is made for {most}, the answer's among them.")


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) with padding on the left."""
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
    """The class of every record: the largest logit, or for several labels at once all above zero.

    Args:
        max_length: tokens of a text at most; None for all of it.

    Raises:
        DataError: a regression model, or a label that the model does not have.
    """
    config: Any = runner.config
    if config.problem_type == "regression" or config.num_labels == 1:
        raise DataError(
            "Accuracy needs classes, but this model was trained for regression; its eval_loss is in training."
        )
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
        logits = runner(
            input_ids=batch["input_ids"].to(runner.device),
            attention_mask=batch["attention_mask"].to(runner.device),  # type: ignore[union-attr]
        ).logits.cpu()
        seconds += time.perf_counter() - began
        if not logits.isfinite().all():
            raise DataError(f"{name}: the model's logits are not finite, so they name no class.")
        for record, row in zip(part, logits, strict=True):
            label = record["label"]
            if isinstance(label, list) != several:
                kind = "a list of classes" if several else "one class"
                raise DataError(f"The label must be {kind}, as in the model's training data, got {label!r}.")
            if several:
                reply: Any = [config.id2label[i] for i in range(config.num_labels) if row[i] > 0]
                right = sorted(reply) == sorted(map(class_name, _label_names(label, config)))
            else:
                reply = config.id2label[int(row.argmax())]
                if class_name(label) not in config.label2id:
                    raise DataError(f"The label {label!r} is none of the model's: {', '.join(config.label2id)}.")
                right = reply == class_name(label)
            replies.append({"prompt": record["text"], "reply": reply, "reference": label, "correct": right})
    return replies, seconds


def _label_names(label: list, config: Any) -> list[str]:
    if all(isinstance(x, int | float) for x in label):
        return [config.id2label[i] for i, x in enumerate(label) if x]
    return label


def score(
    model: ShadowModel, writer: ChatFormatter, records: list[Record], mode: str, options: EvalOptions
) -> tuple[Score, list[dict[str, Any]]]:
    """One mode's score and its replies."""
    tokens: int | None = None
    escalation = model.shadow_config.escalation if model.can_generate() else None
    new = options.max_new_tokens
    if escalation is not None and mode == "detached":  # which is to have said it before it is cut off
        new = max(new, len(writer.tokens(escalation)) + 1)
    with in_mode(model, mode) as runner:
        if model.can_generate():
            replies, seconds, tokens = score_generation(
                runner, writer, records, batch_size=options.batch_size, max_new_tokens=new,
                answer_pattern=options.answer_pattern, name=mode,
            )  # fmt: skip
        else:
            replies, seconds = score_classes(
                runner, writer.tokenizer, records, batch_size=options.batch_size,
                max_length=architectures.positions(runner.config), name=mode,
            )  # fmt: skip
        parameters = count_parameters(model, mode, runner)
    return Score.of(mode, replies, parameters, seconds, tokens, escalation), replies


def cascade(model: ShadowModel, replies: dict[str, list[dict[str, Any]]]) -> Score | None:
    """The detached model and, for what it passes on, the pair; None where it passes nothing on or they were not scored."""
    escalation = model.shadow_config.escalation
    if escalation is None or not {"attached", "detached"} <= replies.keys():
        return None
    pairs = zip(replies["detached"], replies["attached"], strict=True)
    chosen = [pair if _escalates(alone, escalation) else alone for alone, pair in pairs]
    return Score.of(CASCADE, chosen, count_parameters(model, "attached", model), None)


Replies = dict[str, list[dict[str, Any]]]  # of each mode


def score_adapter(options: EvalOptions) -> list[Score]:
    """Run ``umbra eval``; a file for the replies that cannot be written costs a line on standard error, not the scores.

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
        ConfigError: it cannot be written.
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
    """Score every mode that is asked for, and the cascade.

    Raises:
        ConfigError, DataError: unusable options or data, before any model is loaded.
        CheckpointError, BaseModelError: see `umbra.load`.
    """
    modes = [m.strip() for m in options.modes.split(",") if m.strip()]
    if not modes:
        raise ConfigError(f"modes is empty: choose from {', '.join(MODES)}.")
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"Unknown mode {mode!r}: choose from {', '.join(MODES)}.")
    if options.answer_pattern is not None:
        try:
            re.compile(options.answer_pattern)
        except re.error as error:
            raise ConfigError(f"answer_pattern is no regular expression: {error}") from error
    check_dtype(options.dtype)
    _check_output(options.output, options.data)
    records = read_records(options.data, options.split, listed(options.ignore_columns))[: options.limit]
    kind = record_kind(records[0], records.where(0))
    _check_references(records, options)
    model = on_accelerator(load(options.adapter, options.base, dtype=options.dtype).eval())
    expected = ("completion", "messages") if model.can_generate() else ("label",)
    if kind not in expected:
        raise DataError(f"{options.data} holds {kind} records; this adapter is scored on {' or '.join(expected)}.")
    writer = open_formatter(model, options.chat_template, options.chat_template_kwargs)
    scores: list[Score] = []
    replies: Replies = {}
    for mode in modes:
        result, replies[mode] = score(model, writer, records, mode, options)
        scores.append(result)
    both = cascade(model, replies)
    scores += [both] if both else []
    return scores, replies


def _check_output(name: str | None, data: str | list[str]) -> None:
    """Refuse a file for the replies that cannot be written or that holds the data, before they are made."""
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
        raise ConfigError(f"output={name} is no file that can be written: name a regular file.")


def table(scores: list[Score]) -> str:
    """A Markdown table of scores."""
    escalates = any(s.escalated is not None for s in scores)
    more = " passed on | accuracy on the rest |" if escalates else ""
    rule = "|---|---:|---:|---:|---:|---:|" + ("---:|---:|" if escalates else "")
    head = f"| | accuracy | 95 % interval | correct | parameters | tokens/s |{more}\n{rule}"
    rows = []
    for s in scores:
        speed = "–" if s.tokens_per_second is None else f"{s.tokens_per_second:.0f}"
        rows.append(
            f"| {s.mode} | {100 * s.accuracy:.1f} % | {100 * s.low:.1f} – {100 * s.high:.1f} % "
            f"| {s.correct}/{s.total} | {s.parameters / 1e6:.1f} M | {speed} |" + (_kept(s) if escalates else "")
        )
    return "\n".join([head, *rows])


def _kept(s: Score) -> str:
    if s.kept_accuracy is None or s.kept_low is None or s.kept_high is None:
        return f" {'–' if s.escalated is None else s.escalated} | – |"
    return f" {s.escalated} | {100 * s.kept_accuracy:.1f} % ({100 * s.kept_low:.1f} – {100 * s.kept_high:.1f}) |"


def as_json(scores: list[Score]) -> list[dict[str, Any]]:
    """Plain values for JSON."""
    return [asdict(s) for s in scores]
