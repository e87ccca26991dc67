"""Records to token batches: prompt/completion, messages, text with or without a label; only answers carry labels.

A language-model record becomes segments of text, each trained on or not; each segment is tokenised by itself, so
that a prompt has the same tokens in training as when it is asked later. A record marked ``escalate: true`` is beyond the
shadow: the pair learns its answer, the shadow to pass it on.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .core import IGNORED
from .errors import DataError
from .options import speaks

Record = dict[str, Any]
COLUMNS = "`prompt` and `completion`, `messages`, `text` and `label`, or `text`"
MARK = "escalate"  # the column that marks what is beyond the shadow
ESCALATION = "[REMOTE]"  # what it then says, by default
TABLES = (".parquet", ".csv")  # files that datasets reads as they are


def read_records(source: str, split: str = "train") -> list[Record]:
    """All records of a .jsonl or .jsonl.gz file, or of a split of a ``datasets`` hub id.

    Raises:
        DataError: see `read_rows`; or a column that is missing or of the wrong type.
    """
    records = read_rows(source, split)
    kind = record_kind(records[0], f"{source}, record 1")
    for number, record in enumerate(records, start=1):
        _check(record, kind, f"{source}, record {number}")
    return records


def read_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """As `read_records`, whatever the columns.

    Raises:
        DataError: no such file, a line that is not a JSON object (file and line are named), or no record at all.
    """
    if not source:
        raise DataError("No data given: name a .jsonl file or a datasets hub id.")
    ending = Path(source).suffix.lower()
    if ending in TABLES and Path(source).is_file():
        rows = read_hub(ending[1:], split="train", data_files=source)
    elif ending in (".jsonl", ".gz", ".json") or Path(source).is_file():
        rows = _read_lines(Path(source))
    elif Path(source).exists():
        rows = read_hub(source, split=split)
    else:
        name, _, configuration = source.partition(":")
        rows = read_hub(*filter(None, (name, configuration)), split=split)
    if not rows:
        raise DataError(f"{source} holds no record.")
    return rows


def _read_lines(path: Path) -> list[Record]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    records = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # also numbers that are too long, and what is nested too deep
                    raise DataError(
                        f"{path}:{number} is not JSON: {error}. Each line must be one JSON object."
                    ) from None
                if "\\ud" in line.lower() and not _is_text(record):
                    raise DataError(
                        f"{path}:{number} holds half of a character (a lone surrogate): mend or leave it out."
                    )
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number} is a JSON {type(record).__name__}, not an object with columns.")
                records.append(record)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return records


def _is_text(value: Any) -> bool:
    """Whether all strings in it can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_hub(*source: str, split: str, **more: Any) -> list[Record]:
    """The rows of a data set: its id, and its configuration if it has several; or the folder that one was saved to.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        if (Path(source[0]) / "state.json").is_file():  # of one split
            return list(datasets.load_from_disk(source[0]))  # type: ignore[arg-type]
        return list(datasets.load_dataset(*source, split=split, **more))  # type: ignore[arg-type]
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(
            f"{'/'.join(source)!r} is neither a .jsonl file nor a data set that can be loaded: {error!s:.300}"
        ) from error


def record_kind(record: Record, where: str) -> str:
    """Which form a record has: completion, messages, label or text."""
    keys = record.keys()
    if {"prompt", "completion"} <= keys:
        return "completion"
    if "messages" in keys:
        return "messages"
    if {"text", "label"} <= keys:
        return "label"
    if "text" in keys and "prompt" not in keys:
        return "text"
    raise DataError(f"{where} has the columns {', '.join(map(repr, keys)) or 'none'}; needed are {COLUMNS}.")


def _check(record: Record, kind: str, where: str) -> None:
    columns = {"completion": ("prompt", "completion"), "messages": ("messages",), "label": ("text", "label")}
    for column in columns.get(kind, ("text",)):
        value = record.get(column)
        if value is None:
            raise DataError(f"{where} lacks the column {column!r}, which the first record has.")
        if column == "messages" or (column in ("prompt", "completion") and isinstance(value, list)):
            _check_messages(value, f"{where}, {column}")
        elif column != "label" and not isinstance(value, str):
            raise DataError(f"{where}: {column!r} must be a string, got {type(value).__name__}.")
    _check_mark(record, kind, where)


def _check_mark(record: Record, kind: str, where: str) -> None:
    mark = record.get(MARK)
    if not isinstance(mark, bool | None):
        raise DataError(f"{where}: {MARK!r} must be true or false, got {mark!r:.80}.")
    if mark and kind not in ("completion", "messages"):
        raise DataError(f"{where} is marked {MARK!r}, which needs an answer: `prompt` and `completion`, or `messages`.")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} must be a list of messages, got {messages!r}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where} holds {message!r}; a message has a `role` and a `content`.")


# -- language modelling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Turns records into text segments and tokens, with or without the tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool = True

    @property
    def chats(self) -> bool:
        """Whether the tokenizer's chat template is used."""
        return self.chat_template and self.tokenizer.chat_template is not None

    def segments(self, record: Record) -> list[tuple[str, bool]]:
        """[(text, whether it is trained on)], in order.

        Raises:
            DataError: messages for a tokenizer without a chat template, or none by the assistant.
        """
        kind = record_kind(record, "the record")
        if kind in ("text", "label"):
            return [(record["text"], True)]
        if kind == "messages":
            return self._chat(record["messages"])
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and not self.chats:
            return [(prompt, False), (completion + (self.tokenizer.eos_token or ""), True)]
        return self._chat([*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")])

    def _chat(self, messages: list[dict]) -> list[tuple[str, bool]]:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The data holds messages, but the tokenizer has no chat template: use `prompt` and `completion`."
            )
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"The last message is the {messages[-1]['role']}'s: it must be the assistant's, to be learned."
            )
        whole, segments, done = self._render(messages), [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:  # nothing was asked yet
                continue
            before, after = self._render(messages[:i], answer=True), self._render(messages[: i + 1])
            # Templates that rewrite earlier turns (dropping their reasoning) leave only the last answer to train on.
            if before.startswith(done) and after.startswith(before) and whole.startswith(after):
                segments += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        if not segments:
            raise DataError(
                "The chat template renders a conversation and its beginning differently; no answer can be told apart."
            )
        return segments

    def _render(self, messages: list[dict], answer: bool = False) -> str:
        try:
            # Of a template that lets the model think before it answers, its empty thoughts are then the prompt's.
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, enable_thinking=False
            )
        except Exception as error:  # templates raise what they like, about roles that they do not have too
            raise DataError(f"The chat template refuses {str(messages)[:200]}: {error!s:.200}") from error
        assert isinstance(text, str)
        return text

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer as it is learned: the tokenizer's own, and what the chat template puts there."""
        found: list[Any] = [self.tokenizer.eos_token_id]
        if self.tokenizer.chat_template is not None:
            asked, said = {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}
            with suppress(DataError):  # of a template that asks for more turns than these
                before, whole = self._render([asked], answer=True), self._render([asked, said])
                after = whole[len(before) :].partition("Done")[2].lstrip() if whole.startswith(before) else ""
                first: Any = self.tokenizer(after, add_special_tokens=False)["input_ids"][:1]  # type: ignore[index]
                found += [i for i in first if i in self.tokenizer.added_tokens_decoder]
        return list(dict.fromkeys(i for i in found if i is not None))

    def prompt(self, record: Record) -> str:
        """The text up to the last answer."""
        if record_kind(record, "the record") in ("text", "label"):
            return record["text"]
        return "".join(text for text, _ in self.segments(record)[:-1])

    def ask(self, prompt: str) -> str:
        """A bare question as the model is asked it."""
        return self._render([{"role": "user", "content": prompt}], answer=True) if self.chats else prompt

    def is_plain(self, record: Record) -> bool:
        """Whether a record's text is read as it is, and not written by the chat template, which brings its special tokens."""
        kind = record_kind(record, "the record")
        return kind in ("text", "label") or (
            kind == "completion" and isinstance(record["prompt"], str) and not self.chats
        )

    def tokens(self, text: str, plain: bool | None = None) -> list[int]:
        """Token ids; special tokens only where a plain text begins.

        Args:
            plain: whether that is here; None for what `ask` has written.
        """
        plain = not self.chats if plain is None else plain
        return self.tokenizer(text, add_special_tokens=plain)["input_ids"]  # type: ignore[return-value]

    def encode(self, record: Record) -> dict[str, np.ndarray]:
        """``input_ids`` (T,) and ``labels`` (T,), the latter `IGNORED` where nothing is learned."""
        ids: list[int] = []
        labels: list[int] = []
        plain = self.is_plain(record)
        for text, trained in self.segments(record):
            piece = self.tokens(text, plain and not ids)
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
        return {"input_ids": np.asarray(ids, np.int32), "labels": np.asarray(labels, np.int32)}

    def encode_escalated(self, record: Record, instead: str) -> list[dict[str, np.ndarray]]:
        """As `encode`, two examples with ``shadow_targets`` (T,) beside ``labels``: the pair learns all answers of the record,
        the shadow all but the last, and ``instead`` of that."""
        whole, passed = self.encode(record), self.encode(_with_answer(record, instead))
        starts = [1 + max(np.flatnonzero(e["labels"] == IGNORED), default=-1) for e in (whole, passed)]
        whole["shadow_targets"] = np.where(np.arange(len(whole["labels"])) < starts[0], whole["labels"], IGNORED)
        passed["shadow_targets"] = np.where(np.arange(len(passed["labels"])) < starts[1], IGNORED, passed["labels"])
        passed["labels"] = np.full_like(passed["labels"], IGNORED)
        return [whole, passed]


def _with_answer(record: Record, answer: str) -> Record:
    """The record with another last answer."""
    if "messages" in record:
        return {**record, "messages": [*record["messages"][:-1], {**record["messages"][-1], "content": answer}]}
    completion = record["completion"]
    if isinstance(completion, str):
        return {**record, "completion": answer}
    return {**record, "completion": [*completion[:-1], {**completion[-1], "content": answer}]}


def _as_messages(value: Any, role: str) -> list[dict]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def end_tokens(model: Any, writer: Writer) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, and those by which answers are learned to end."""
    told: Any = model.generation_config.eos_token_id
    told = told.flatten().tolist() if isinstance(told, torch.Tensor) else told
    return list(dict.fromkeys([*(told if isinstance(told, list) else [] if told is None else [told]), *writer.ends]))


# -- classification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """How labels become numbers: ``names`` of the classes, or none for regression."""

    problem_type: str
    names: tuple[str, ...]
    width: int

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Labels":
        """Read off the training labels: strings, integers or booleans are classes, floats are regression targets,
        lists of strings are several classes at once, lists of 0 and 1 likewise.

        Raises:
            DataError: labels of different kinds, or a single class.
        """
        values = list(values)
        for value in values:
            for x in value if isinstance(value, list) else [value]:
                if not isinstance(x, str | int | float) or (isinstance(x, float) and not math.isfinite(x)):
                    raise DataError(f"The label {value!r:.80} is neither a name nor a number, nor a list of those.")
        lists = [isinstance(v, list) for v in values]
        if any(lists) and not all(lists):
            raise DataError("Some labels are lists and some are not.")
        if all(lists):
            flat = [x for v in values for x in v]
            if flat and all(isinstance(x, str) for x in flat):
                names = tuple(sorted(set(flat)))
                return cls("multi_label_classification", names, len(names))
            widths = {len(v) for v in values}
            if len(widths) != 1 or not all(isinstance(x, int | float) for x in flat):
                raise DataError("List labels must all be class names, or all numbers of one length.")
            width = widths.pop()
            if set(flat) <= {0, 1}:
                return cls("multi_label_classification", tuple(f"LABEL_{i}" for i in range(width)), width)
            return cls("regression", (), width)
        if any(isinstance(v, float) for v in values):
            if not all(isinstance(v, int | float) for v in values):
                raise DataError("Some labels are numbers and some are not.")
            return cls("regression", (), 1)
        distinct = set(values)
        names = sorted(distinct) if len({type(v) for v in distinct}) == 1 else sorted(distinct, key=str)
        if len(names) < 2:
            raise DataError(f"All labels are {values[0]!r}: a classifier needs at least two classes.")
        return cls("single_label_classification", tuple(map(str, names)), len(names))

    def encode(self, value: Any) -> Any:
        """The number, or numbers, of one label.

        Raises:
            DataError: a class that the training data does not have.
        """
        if self.problem_type == "regression":
            return [float(x) for x in value] if isinstance(value, list) else float(value)
        if isinstance(value, list):
            if all(isinstance(x, int | float) for x in value) and len(value) == self.width:
                return [float(x) for x in value]
            for x in value:
                self._index(x)
            return [float(name in value) for name in self.names]
        return self._index(value)

    def _index(self, value: Any) -> int:
        if str(value) not in self.names:
            raise DataError(f"The label {value!r} is none of the training data's: {', '.join(self.names)}.")
        return self.names.index(str(value))

    def config(self) -> dict[str, Any]:
        """The fields of a transformers configuration that say the same."""
        names = self.names or tuple(f"LABEL_{i}" for i in range(self.width))
        return {
            "num_labels": self.width,
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
            "problem_type": self.problem_type,
        }


# -- batches -----------------------------------------------------------------------------------------------------------


def encode_all(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int, chat_template: bool = True,
    labels: Labels | None = None, name: str = "data", escalation: str = ESCALATION,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tokenise records, cut at ``max_length``; examples left without a label are dropped, and said so.

    Args:
        escalation: what the shadow answers to records that are marked for it.

    Raises:
        DataError: no example is left.
    """
    writer, examples, cut, dropped = Writer(tokenizer, chat_template), [], 0, 0
    for record in tqdm(records, desc=f"tokenise {name}", disable=None if speaks() else True, leave=False):
        if labels is not None:
            ids = np.asarray(tokenizer(record["text"])["input_ids"], np.int32)
            cut += len(ids) > max_length
            examples.append({"input_ids": ids[:max_length], "labels": labels.encode(record["label"])})
            continue
        found = writer.encode_escalated(record, escalation) if record.get(MARK) else [writer.encode(record)]
        cut += len(found[0]["input_ids"]) > max_length
        found = [{k: v[:max_length] for k, v in example.items()} for example in found]
        kept = [e for e in found if any((v[1:] != IGNORED).any() for k, v in e.items() if k != "input_ids")]
        examples += kept
        dropped += not kept
    if (cut or dropped) and speaks():
        tqdm.write(
            f"{name}: {cut} of {len(records)} records cut at {max_length} tokens, {dropped} without an answer dropped"
        )
    if not examples:
        raise DataError(f"No record of {name} has an answer within max_length={max_length} tokens: raise it.")
    return examples


def shadows_own(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the examples the shadow learns, with its targets as the labels."""
    own = [{"input_ids": e["input_ids"], "labels": e.get("shadow_targets", e["labels"])} for e in examples]
    return [e for e in own if not isinstance(e["labels"], np.ndarray) or (e["labels"][1:] != IGNORED).any()]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into a batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T), or (B, …)."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [e["input_ids"] for e in examples]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([np.ones(len(x), np.int64) for x in ids], 0),
        }
        labels = [e["labels"] for e in examples]
        is_language = isinstance(labels[0], np.ndarray)
        batch["labels"] = _pad(labels, IGNORED) if is_language else torch.tensor(labels)
        if any("shadow_targets" in e for e in examples):
            batch["shadow_targets"] = _pad([e.get("shadow_targets", e["labels"]) for e in examples], IGNORED)
        return batch


def _pad(rows: list[np.ndarray], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out
