"""Text that the base generates for its shadow to be pretrained on."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.data.chat import ChatFormatter, end_tokens
from umbra.data.readers import read_rows
from umbra.data.sources import text_files
from umbra.data.text_files import text_lines
from umbra.errors import DataError, shown
from umbra.options import is_main_process

# Sampling from the distribution that is learned, regardless of the base's generation config.
SAMPLING: dict[str, Any] = {
    "do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip


def read_prompts(source: str | list[str]) -> list[str]:
    """Return the prompts of a source.

    Args:
        source: text files with one prompt per line, of which blank lines are skipped; or records with a `prompt` or else a `text`.

    Raises:
        DataError: no prompt, or a record without one.
    """
    if files := text_files(source):
        prompts = [prompt for file in files for _, prompt in text_lines(file)]
    else:
        rows = read_rows(source)
        prompts = [_prompt(row, rows.where(i)) for i, row in enumerate(rows)]
    if not prompts:
        raise DataError(f"{source} contains no prompt: add one.")
    return prompts


def _prompt(row: dict[str, Any], where: str) -> str:
    column = "text" if row.get("prompt") is None else "prompt"
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has no prompt: `prompt`, or else `text`, must be a string that is not blank, got {shown(value)}."
        )
    return value


@torch.no_grad()
def generate_documents(
    base: PreTrainedModel, formatter: ChatFormatter, prompts: list[str], out: Path, *, count: int, batch_size: int,
    max_new_tokens: int, temperature: float, seed: int,
) -> list[str]:  # fmt: skip
    """Return documents that the base samples: prompt and answer, with special tokens, up to the token that ends the answer.

    They are written to ``out`` after each batch. A killed call continues where it stopped.

    Args:
        base: the model.
        formatter: formats the prompts.
        prompts: the prompts, which are used in turn.
        out: the file, one JSON object per line.
        count: number of documents.
        batch_size: documents generated together.
        max_new_tokens: length of an answer, if no end token ends it before.
        temperature: of sampling.
        seed: of sampling; each batch adds the number of documents before it.

    Raises:
        DataError: a prompt as long as the base's positions.
    """
    done = _written_before(out, [formatter.ask(p) for p in prompts], count, batch_size)
    ends = end_tokens(base, formatter)
    base.eval()
    generate, limit = cast(Callable[..., Tensor], base.generate), architectures.positions(base.config) or sys.maxsize
    bar = tqdm(total=count, initial=len(done), desc="generate text", disable=None if is_main_process() else True)
    tokenizer = formatter.tokenizer
    with bar, out.open("a", encoding="utf-8") as file:
        for batch in _batches(prompts, len(done), count, batch_size):
            torch.manual_seed(seed + len(done))
            inputs = [formatter.ask(p) for p in batch]
            tokens = tokenizer(
                inputs, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not formatter.chats
            ).to(base.device)
            length = tokens["input_ids"].shape[1]
            if length >= limit:
                raise DataError(
                    f"A prompt has {length} tokens, but the base has {limit} positions: shorten the prompt."
                )
            output = generate(
                tokens["input_ids"], attention_mask=tokens["attention_mask"],
                max_new_tokens=min(max_new_tokens, limit - length), pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends or None, **SAMPLING, temperature=temperature,
            )  # fmt: skip
            answers = [str(tokenizer.decode(_until_end(row, ends))) for row in output[:, length:].tolist()]
            texts = [prompt + answer for prompt, answer in zip(inputs, answers, strict=True)]
            file.write("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
            file.flush()
            done += texts
            bar.update(len(texts))
    return done


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Return the tokens up to and including the first that ends an answer."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _written_before(out: Path, inputs: list[str], count: int, batch_size: int) -> list[str]:
    """Return the documents that an earlier call wrote for the same prompts, in complete batches, which share a seed.

    The file is truncated at the first line that is cut off, damaged, or an answer to another prompt.
    """
    if not out.exists():
        return []
    texts, sizes = [], [0]
    for line in out.read_bytes().splitlines(keepends=True):
        try:
            text = json.loads(line)["text"] if line.endswith(b"\n") else ""
        except (ValueError, LookupError, TypeError):
            break
        if not line.endswith(b"\n") or not text.startswith(inputs[len(texts) % len(inputs)]):
            break
        texts.append(text)
        sizes.append(sizes[-1] + len(line))
    whole = len(texts) if len(texts) >= count else len(texts) // batch_size * batch_size
    os.truncate(out, sizes[whole])
    return texts[:whole]


def _batches(prompts: list[str], start: int, end: int, size: int) -> Iterator[list[str]]:
    """Yield the prompts of documents ``start`` to ``end``, ``size`` at a time."""
    for first in range(start, end, size):
        yield [prompts[i % len(prompts)] for i in range(first, min(first + size, end))]
