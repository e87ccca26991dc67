"""Text for pretraining: documents of several sources, deduplicated, packed into blocks and mixed.

A document is the text of one record, followed by the end-of-text token. The documents of a source are concatenated without padding
and cut into blocks of equal length; a mixture draws blocks of its sources by weight.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from umbra.data.chat import ChatFormatter
from umbra.data.readers import read_records
from umbra.data.sources import text_files
from umbra.data.text_files import read_text
from umbra.errors import DataError
from umbra.method.losses import IGNORED
from umbra.options import is_main_process

SPACES = re.compile(r"\s+")
HELD_OUT = 0.1  # of all blocks at most


class Documents(NamedTuple):
    """Texts of one source.

    Args:
        texts: the documents.
        plain: whether special tokens are added; text rendered by a chat template contains its own.
        ended: whether no end token is added; generated text contains it, unless it was cut off.
    """

    texts: list[str]
    plain: bool = True
    ended: bool = False


def read_documents(source: str, split: str, formatter: ChatFormatter) -> Documents:
    """Return the documents of a source.

    Args:
        source: text files, whose paragraphs are separated by blank lines; or records, see `read_records`.
        split: the split of records.
        formatter: formats records.

    Raises:
        DataError: the source cannot be read, or contains no text.
    """
    if files := text_files(source):
        texts = map(read_text, files)
        documents, plain = [part.strip() for text in texts for part in re.split(r"\n\s*\n", text)], True
    else:
        records = read_records(source, split)
        documents = ["".join(part for part, _ in formatter.segments(record)) for record in records]
        plain = formatter.is_plain(records[0])
    documents = [d for d in documents if d]
    if not documents:
        raise DataError(f"{source} contains no text: leave it out.")
    return Documents(documents, plain)


def without_copies(sources: Sequence[list[str]]) -> tuple[list[list[str]], int]:
    """Remove documents that equal an earlier one of any source, except for case and white space.

    Returns:
        The remaining documents of each source, and the number of removed ones.
    """
    seen: set[bytes] = set()
    distinct: list[list[str]] = []
    for documents in sources:
        distinct.append([])
        for text in documents:
            digest = hashlib.blake2b(SPACES.sub(" ", text).strip().casefold().encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                distinct[-1].append(text)
    return distinct, sum(map(len, sources)) - sum(map(len, distinct))


def pack(documents: Documents, formatter: ChatFormatter, length: int, name: str) -> np.ndarray:
    """Concatenate documents and cut them into blocks; an incomplete last block is dropped.

    TRL's packing is not used: TRL is an optional dependency, adds no end tokens and keeps the incomplete block.

    Args:
        documents: the documents.
        formatter: tokenises them.
        length: tokens in a block.
        name: the source, for messages.

    Returns:
        (N, length) token ids, int32.

    Raises:
        DataError: fewer tokens than one block.
    """
    end, rows = formatter.tokenizer.eos_token_id, []
    for text in tqdm(
        documents.texts, desc=f"tokenise {name}", disable=None if is_main_process() else True, leave=False
    ):
        ids = formatter.tokens(text, documents.plain)
        is_ended = documents.ended or end is None or ids[-1:] == [end]
        rows.append(np.asarray(ids if is_ended else [*ids, end], np.int32))
    tokens = np.concatenate(rows)
    if len(tokens) < length:
        raise DataError(
            f"{name} has {len(tokens)} tokens without duplicates, fewer than one block of max_length={length}: lower it."
        )
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def hold_out(blocks: list[np.ndarray], count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Hold out the last blocks of each source.

    Args:
        blocks: (N_k, T) blocks of each source k.
        count: number of blocks to hold out, divided among the sources by size: at most a share of `HELD_OUT`, but at least one of
            each source that has two.

    Returns:
        The remaining blocks of each source, and the held-out blocks (M, T).

    Raises:
        DataError: no source has two blocks.
    """
    share = min(count / sum(map(len, blocks)), HELD_OUT)
    sizes = [min(len(b) - 1, max(1, round(share * len(b)))) for b in blocks]
    if not any(sizes):
        raise DataError("Each source fills only one block, so none can be held out: add text, or lower max_length.")
    remaining = [b[: len(b) - n] for b, n in zip(blocks, sizes, strict=True)]
    return remaining, np.concatenate([b[len(b) - n :] for b, n in zip(blocks, sizes, strict=True)])


@dataclass
class Mixture(Dataset):
    """Blocks of several sources, drawn by weight; ``block`` is the index of an item's block among all blocks.

    Item i depends on the seed only, so that a killed run resumes with blocks that it has not seen. Each source is traversed in a
    random order, and again in another one. datasets.interleave_datasets is not used: it repeats a source in the same order and
    ends with the sources instead of at a given size.

    Args:
        blocks: (N_k, T) token ids of each source k.
        weights: relative frequency of each source.
        size: number of items.
        seed: of the order.
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
            items = np.flatnonzero(self.source == k)
            rounds = [generator.permutation(len(blocks)) for _ in range(-(-len(items) // len(blocks)))]
            self.row[items] = np.concatenate([*rounds, np.empty(0, np.int64)])[: len(items)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(self.blocks[self.source[i]][self.row[i]], dtype=torch.long)
        labels = ids.clone()
        labels[0] = IGNORED  # nothing predicts it, and the trainer counts labels
        block = sum(map(len, self.blocks[: self.source[i]])) + self.row[i]
        return {"input_ids": ids, "labels": labels, "block": torch.as_tensor(block)}
