"""Tokenised examples and padded batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..core import IGNORED
from ..errors import DataError
from ..options import speaks
from .chat import ChatFormatter
from .labels import Labels
from .records import ESCALATION, MARK, Record


def encode_all(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int, chat_template: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None, labels: Labels | None = None, name: str = "data",
    escalation: str = ESCALATION,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tokenise records, cut at ``max_length``; examples left without a label are dropped, and said so.

    Args:
        escalation: what the shadow answers to records that are marked for it.

    Raises:
        DataError: no example is left.
    """
    writer, examples, cut, dropped = ChatFormatter(tokenizer, chat_template, chat_template_kwargs or {}), [], 0, 0
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
