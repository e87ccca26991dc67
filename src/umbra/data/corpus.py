"""Text to pretrain on: local files, hub data sets and what the base writes by itself; deduplicated, mixed and packed.

A document is the text of one record, ended by the end-of-text token. Documents of a source follow one another without
padding and are cut into blocks of equal length; a mixture draws blocks of its sources by weight.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from umbra.base import architectures
from umbra.data.chat import ChatFormatter, end_tokens
from umbra.data.readers import read_records, read_rows
from umbra.data.sources import text_files
from umbra.data.text_files import read_text, text_lines
from umbra.errors import DataError, shown
from umbra.method.losses import IGNORED
from umbra.options import speaks

SPACES = re.compile(r"\s+")
HELD_OUT = 0.1  # of all blocks at most
# Samples of the distribution that is learned, whatever the base's own generation config asks for.
PLAIN: dict[str, Any] = {
    "do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip


class Documents(NamedTuple):
    """Texts of one source.

    Args:
        plain: whether they are read as they are: what a chat template has written brings its special tokens.
        ended: whether they end as they shall: what a model has written ends where it did, or was cut off.
    """

    texts: list[str]
    plain: bool = True
    ended: bool = False


def read_documents(source: str, split: str, writer: ChatFormatter) -> Documents:
    """The documents of text files (paragraphs, separated by blank lines) or of records, as `read_records` reads them.

    Raises:
        DataError: nothing there that can be read.
    """
    if files := text_files(source):
        texts = map(read_text, files)
        documents, plain = [part.strip() for text in texts for part in re.split(r"\n\s*\n", text)], True
    else:
        records = read_records(source, split)
        documents = ["".join(part for part, _ in writer.segments(record)) for record in records]
        plain = writer.is_plain(records[0])
    documents = [d for d in documents if d]
    if not documents:
        raise DataError(f"{source} holds no text.")
    return Documents(documents, plain)


def without_copies(sources: Sequence[list[str]]) -> tuple[list[list[str]], int]:
    """The documents of each source that no earlier one equals, but for case and white space; and how many are left out."""
    seen: set[bytes] = set()
    kept: list[list[str]] = []
    for documents in sources:
        kept.append([])
        for text in documents:
            digest = hashlib.blake2b(SPACES.sub(" ", text).strip().casefold().encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kept[-1].append(text)
    return kept, sum(map(len, sources)) - sum(map(len, kept))


def pack(documents: Documents, writer: ChatFormatter, length: int, name: str) -> np.ndarray:
    """(N, length) tokens: the documents one after another, each ended; the rest that fills no block is left out.

    Raises:
        DataError: fewer tokens than one block.
    """
    end, rows = writer.tokenizer.eos_token_id, []
    for text in tqdm(documents.texts, desc=f"tokenise {name}", disable=None if speaks() else True, leave=False):
        ids = writer.tokens(text, documents.plain)
        is_ended = documents.ended or end is None or ids[-1:] == [end]
        rows.append(np.asarray(ids if is_ended else [*ids, end], np.int32))
    tokens = np.concatenate(rows)
    if len(tokens) < length:
        raise DataError(
            f"{name} holds {len(tokens)} tokens, copies left out, fewer than one block of max_length={length}: lower it."
        )
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def hold_out(blocks: list[np.ndarray], count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The blocks (N_k, T) of each source without its last ones, and those (M, T): about ``count``, by the sources' sizes.

    No more than `HELD_OUT` of them, but one at least of each source that has two.

    Raises:
        DataError: the sources have too few blocks for that.
    """
    share = min(count / sum(map(len, blocks)), HELD_OUT)
    taken = [min(len(b) - 1, max(1, round(share * len(b)))) for b in blocks]
    if not any(taken):
        raise DataError(
            "Each source fills one block alone, and none can be held out: give more text, or lower max_length."
        )
    rest = [b[: len(b) - n] for b, n in zip(blocks, taken, strict=True)]
    return rest, np.concatenate([b[len(b) - n :] for b, n in zip(blocks, taken, strict=True)])


@dataclass
class Mixture(Dataset):
    """Blocks of several sources, drawn by weight; ``block`` is the number of one among all.

    Item i is the same in every run of one seed, so that a killed run goes on with what it has not seen. Each source
    is gone through in an order of its own, again and again, before a block comes twice as often as another.

    Args:
        blocks: (N_k, T) tokens of each source k.
        weights: how much each counts.
        size: items in all.
    """

    blocks: list[np.ndarray]
    weights: list[float]
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        share = np.asarray(self.weights, float) / max(self.weights)
        share /= share.sum()
        self.source = generator.choice(len(self.blocks), self.size, p=share)
        self.row = np.empty(self.size, np.int64)
        for k, blocks in enumerate(self.blocks):
            mine = np.flatnonzero(self.source == k)
            rounds = [generator.permutation(len(blocks)) for _ in range(-(-len(mine) // len(blocks)))]
            self.row[mine] = np.concatenate([*rounds, np.empty(0, np.int64)])[: len(mine)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(self.blocks[self.source[i]][self.row[i]], dtype=torch.long)
        labels = ids.clone()
        labels[0] = IGNORED  # nothing predicts it, and the trainer counts labels
        block = sum(map(len, self.blocks[: self.source[i]])) + self.row[i]
        return {"input_ids": ids, "labels": labels, "block": torch.as_tensor(block)}


# -- what the base writes ----------------------------------------------------------------------------------------------


def read_prompts(source: str | list[str]) -> list[str]:
    """A prompt a line of text files, blank lines skipped; or the `prompt`, or else the `text`, of each record.

    Raises:
        DataError: none, or a record without one.
    """
    if files := text_files(source):
        prompts = [prompt for file in files for _, prompt in text_lines(file)]
    else:
        rows = read_rows(source)
        prompts = [_prompt(row, rows.where(i)) for i, row in enumerate(rows)]
    if not prompts:
        raise DataError(f"{source} holds no prompt.")
    return prompts


def _prompt(row: dict[str, Any], where: str) -> str:
    column = "text" if row.get("prompt") is None else "prompt"
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has no prompt: `prompt`, or else `text`, must be a string of some words, got {shown(value)}."
        )
    return value


@torch.no_grad()
def write_own(
    base: Any, writer: ChatFormatter, prompts: list[str], out: Path, *, count: int, batch_size: int, new: int,
    temperature: float, seed: int,
) -> list[str]:  # fmt: skip
    """``count`` documents that the base samples after the prompts, in turn, with the special tokens that it says, up to the one
    that ends its answer; kept in ``out``, a batch at a time.

    A killed call goes on where it was: documents that are in ``out`` already are not written again.
    """
    done = _own_lines(out, [writer.ask(p) for p in prompts], count, batch_size)
    ends = end_tokens(base, writer)
    base.eval()
    most = architectures.positions(base.config) or sys.maxsize
    bar = tqdm(total=count, initial=len(done), desc="the base writes", disable=None if speaks() else True)
    tokenizer = writer.tokenizer
    with bar, out.open("a", encoding="utf-8") as file:
        for batch in _batches(prompts, len(done), count, batch_size):
            torch.manual_seed(seed + len(done))
            asked = [writer.ask(p) for p in batch]
            tokens: Any = tokenizer(
                asked, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not writer.chats
            )
            ids = tokens["input_ids"].to(base.device)
            room = most - ids.shape[1]
            if room < 1:
                raise DataError(
                    f"A prompt has {ids.shape[1]} tokens of the {most} that the base is made for: shorten it."
                )
            written = base.generate(
                ids, attention_mask=tokens["attention_mask"].to(base.device), max_new_tokens=min(new, room),
                pad_token_id=tokenizer.pad_token_id, eos_token_id=ends or None, **PLAIN, temperature=temperature,
            )  # fmt: skip
            answers = [str(tokenizer.decode(_until(row, ends))) for row in written[:, ids.shape[1] :].tolist()]
            texts = [question + answer for question, answer in zip(asked, answers, strict=True)]
            file.write("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
            file.flush()
            done += texts
            bar.update(len(texts))
    return done


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first token that ends an answer, with it."""
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


def _own_lines(out: Path, asked: list[str], count: int, batch_size: int) -> list[str]:
    """What was written before to the same prompts, in whole batches, whose seeds are those of their first document.

    A line that is cut off or damaged is taken out of the file, as is an answer to another prompt, with all that follows.
    """
    if not out.exists():
        return []
    kept, sizes = [], [0]
    for line in out.read_bytes().splitlines(keepends=True):
        try:
            text = json.loads(line)["text"] if line.endswith(b"\n") else ""
        except (ValueError, LookupError, TypeError):
            break
        if not line.endswith(b"\n") or not text.startswith(asked[len(kept) % len(asked)]):
            break
        kept.append(text)
        sizes.append(sizes[-1] + len(line))
    whole = len(kept) if len(kept) >= count else len(kept) // batch_size * batch_size
    os.truncate(out, sizes[whole])
    return kept[:whole]


def _batches(prompts: list[str], start: int, end: int, size: int) -> Iterator[list[str]]:
    for first in range(start, end, size):
        yield [prompts[i % len(prompts)] for i in range(first, min(first + size, end))]
