"""Tokenised examples and padded batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from umbra.data.chat import ChatFormatter
from umbra.data.labels import Labels
from umbra.data.records import ESCALATION, MARK, Record
from umbra.data.rows import Rows
from umbra.data.tokens import encode_plain
from umbra.errors import DataError
from umbra.method.losses import IGNORED
from umbra.options import is_main_process

# "input_ids" and "labels", and with escalation "shadow_targets", each (T,) int32; labels of classifiers are numbers.
Example = dict[str, Any]


def encode_all(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int, chat_template: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None, labels: Labels | None = None, name: str = "data",
    escalation: str = ESCALATION,
) -> list[Example]:  # fmt: skip
    """Tokenise records and cut them at ``max_length``. Examples without a label are dropped, and counted in a message.

    Args:
        records: the records.
        tokenizer: the tokenizer.
        max_length: number of tokens to which examples are cut.
        chat_template: see `ChatFormatter`.
        chat_template_kwargs: see `ChatFormatter`.
        labels: classes or regression targets; None for a language model.
        name: the name of the data, for messages.
        escalation: the shadow's answer to records that are marked for escalation.

    Returns:
        The examples; a record may give several.

    Raises:
        DataError: a record that cannot be rendered or has an unknown label, with its place; or no example remains.
    """
    formatter, examples, cut, dropped, split = (
        ChatFormatter(tokenizer, chat_template, chat_template_kwargs or {}),
        [],
        0,
        0,
        0,
    )
    place = records.where if isinstance(records, Rows) else lambda i: f"{name}, record {i + 1}"
    for i, record in enumerate(
        tqdm(records, desc=f"tokenise {name}", disable=None if is_main_process() else True, leave=False)
    ):
        try:
            encoded = _encode(record, formatter, labels, escalation, max_length)
        except DataError as error:
            raise DataError(f"{place(i)}: {error}") from error
        cut += any(len(e["input_ids"]) > max_length for e in encoded)
        split += len(encoded) - 1 - bool(record.get(MARK)) > 0
        short = [{k: v[:max_length] if isinstance(v, np.ndarray) else v for k, v in e.items()} for e in encoded]
        learned = [e for e in short if labels is not None or _is_learned(e)]
        examples += learned
        dropped += not learned
    if is_main_process():
        for line in _report(name, len(records), cut, dropped, split, max_length):
            tqdm.write(line)
    if not examples:
        raise DataError(f"No record of {name} has an answer within max_length={max_length} tokens: raise it.")
    return examples


def _encode(
    record: Record, formatter: ChatFormatter, labels: Labels | None, escalation: str, max_length: int
) -> list[Example]:
    if labels is not None:
        ids = np.asarray(encode_plain(formatter.tokenizer, record["text"]) if record["text"] else [], np.int32)
        if not ids.size:
            raise DataError("'text' is empty, so there is nothing to classify: leave the record out.")
        return [{"input_ids": ids, "labels": labels.encode(record["label"])}]
    return (
        formatter.encode_escalated(record, escalation)
        if record.get(MARK)
        else formatter.encode_examples(record, max_length)
    )


def _is_learned(example: dict[str, Any]) -> bool:
    return any((v[1:] != IGNORED).any() for k, v in example.items() if k != "input_ids")


def _report(name: str, total: int, cut: int, dropped: int, split: int, max_length: int) -> list[str]:
    lines = []
    if cut or dropped:
        lines.append(
            f"{name}: {cut} of {total} records cut at {max_length} tokens, {dropped} without an answer dropped"
        )
    if split:
        lines.append(
            f"{name}: the chat template renders earlier turns differently once a conversation goes on; {split} of {total} "
            "conversations are learned turn by turn, each with the prompt of inference"
        )
    return lines


def for_shadow_alone(examples: list[Example]) -> list[Example]:
    """Return the examples that the shadow learns, with its targets as the labels."""
    targets = [{"input_ids": e["input_ids"], "labels": e.get("shadow_targets", e["labels"])} for e in examples]
    return [e for e in targets if not isinstance(e["labels"], np.ndarray) or (e["labels"][1:] != IGNORED).any()]


@dataclass(frozen=True)
class Collator:
    """Collate examples, padded on the right, into ``input_ids``, ``attention_mask`` (B, T) and ``labels`` (B, T) or (B, …)."""

    pad_token_id: int

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """Return the batch of these examples."""
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
