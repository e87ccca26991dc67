"""Trim a byte-level BPE vocabulary to the tokens that given texts need.

Such a text is tokenised as before. BPE merges the pair of lowest rank first and never splits a merged token again: every merge
on the way to a remaining token remains too, in its order, and a removed pair was never the next to be merged. Any other text
can still be represented by single bytes.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from umbra.base.private_transformers import build_from_config, mark_changed
from umbra.data import ChatFormatter, read_records
from umbra.data.sources import named_sources, text_files
from umbra.data.text_files import read_text
from umbra.errors import DataError, ExportError

TOKEN_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def read_texts(names: str, writer: ChatFormatter) -> list[str]:
    """Return the texts of files, each to be tokenised separately: whole .txt and .md files, and the segments of records.

    Args:
        names: files or data sets, separated by commas.
        writer: formats records.

    Raises:
        DataError: a file cannot be read, or there is no text.
    """
    texts: list[str] = []
    for name in named_sources(names):
        if files := text_files(name):
            texts += map(read_text, files)
        else:
            texts += [text for record in read_records(name) for text, _ in writer.segments(record)]
    if not texts:
        raise DataError(f"vocabulary={names!r} has no text: give files of text or records, separated by commas.")
    return texts


def read_specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a tokenizer's tokenizer.json.

    Raises:
        ExportError: it is no byte-level BPE.
    """
    if not tokenizer.is_fast:
        raise ExportError(f"A {type(tokenizer).__name__} has no tokenizer.json: leave out --vocabulary.")
    specification = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[union-attr]
    splits = specification["pre_tokenizer"] or {}
    types = {part["type"] for part in [splits, *splits.get("pretokenizers", ())] if part}
    model = specification["model"]
    if model["type"] != "BPE" or "ByteLevel" not in types or model.get("byte_fallback"):
        raise ExportError(
            f"Only a byte-level BPE vocabulary can be trimmed; this tokenizer is a {model['type']}"
            f"{' without bytes' if model['type'] == 'BPE' else ''}: leave out --vocabulary."
        )
    return specification


def needed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], ids: Iterable[int] = ()) -> list[int]:
    """Return the token ids that a trimmed vocabulary needs, in order.

    Args:
        tokenizer: the whole tokenizer.
        texts: all tokens of these, and all that BPE merges into them, besides single bytes and added tokens.
        ids: further tokens.

    Raises:
        ExportError: see `read_specification`.
    """
    specification = read_specification(tokenizer)
    vocabulary: dict[str, int] = specification["model"]["vocab"]
    names = {i: name for name, i in vocabulary.items()}
    ranks = {pair: rank for rank, pair in enumerate(_pairs(specification))}
    needed_ids = {token["id"] for token in specification["added_tokens"]} | set(ids)
    needed_ids |= {vocabulary[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    for text in texts:
        needed_ids |= set(tokenizer.encode(text, add_special_tokens=False))
    for i in list(needed_ids):
        needed_ids |= {vocabulary[part] for part in _merged_from(names.get(i, ""), ranks)}
    return sorted(needed_ids)


def _pairs(specification: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer, in order of rank."""
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in specification["model"]["merges"]]
    return [(left, right) for left, right in merges]


def _merged_from(token: str, ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """The tokens that BPE merges on the way to a token, itself included."""
    parts = list(token)
    while True:
        yield from (p for p in parts if len(p) > 1)
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the tokens ``ids`` alone, renumbered in this order."""
    new = {old: i for i, old in enumerate(ids)}
    specification = read_specification(tokenizer)
    model = specification["model"]
    model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    model["merges"] = [
        list(pair) for pair in _pairs(specification) if all(p in model["vocab"] for p in (*pair, "".join(pair)))
    ]
    for token in specification["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(specification["post_processor"], new)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(specification, ensure_ascii=False), encoding="utf-8")
        file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # under their old ids; tokenizer.json lists them too
        file.write_text(json.dumps(settings), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _renumber(value: object, new: dict[int, int]) -> None:
    """Replace the ids of special tokens within a post-processor, in place."""
    if isinstance(value, dict):
        if isinstance(value.get("ids"), list):
            value["ids"] = [new[i] for i in value["ids"]]
        for name in ("cls", "sep"):
            if isinstance(value.get(name), list):
                value[name][1] = new[value[name][1]]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _renumber(inner, new)


@torch.no_grad()
def trim_model(model: PreTrainedModel, ids: list[int]) -> PreTrainedModel:
    """Return a stock model with the rows ``ids`` of embeddings and head; the logits of these tokens do not change.

    Args:
        model: a stock model.
        ids: the remaining tokens, in ascending order; they are renumbered in this order.

    Raises:
        ExportError: the model has further tables with a row for each token, or lacks rows.
    """
    new = {old: i for i, old in enumerate(ids)}
    table, head = _table(model), model.get_output_embeddings()
    if ids[-1] >= len(table):
        raise ExportError(
            f"The tokenizer has tokens from id {len(table)} on, for which the model has no embeddings: leave out --vocabulary."
        )
    by_token = [table, *(() if head is None else head.parameters())]
    state, rows = {}, len(table)
    for name, value in {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}.items():
        is_trimmed = any(value is t for t in by_token)
        if not is_trimmed and value.dim() and len(value) == rows and "embed" in name:
            raise ExportError(
                f"A {model.config.model_type} has further tables with a row for each token ({name}): leave out --vocabulary."
            )
        state[name] = value[ids] if is_trimmed else value
    config = copy.deepcopy(model.config)
    generation = copy.deepcopy(model.generation_config)
    for settings in {id(c): c for c in (config, config.get_text_config(), generation)}.values():
        for field, value in settings.to_dict().items():
            if field in TOKEN_FIELDS and value is not None:
                setattr(settings, field, _mapped(value, new))
    mark_changed(generation, is_read_back=False)
    config.get_text_config().vocab_size = len(ids)
    trimmed = build_from_config(type(model), config, model.dtype)
    trimmed.load_state_dict({k: v for k, v in state.items() if k in trimmed.state_dict()})
    trimmed.tie_weights()
    trimmed.generation_config = generation
    return trimmed.eval()


def _mapped(value: int | list[int], new: dict[int, int]) -> int | list[int] | None:
    """New ids of a token field; tokens that were removed are left out."""
    return [new[i] for i in value if i in new] if isinstance(value, list) else new.get(value)


def special_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids in the token fields of the model's configurations, as far as it has rows for them."""
    ids: set[int] = set()
    for settings in (model.config, model.config.get_text_config(), model.generation_config):
        for field, value in settings.to_dict().items():
            if field in TOKEN_FIELDS and value is not None:
                ids |= set(value) if isinstance(value, list) else {value}
    return {i for i in ids if 0 <= i < len(_table(model))}


def _table(model: PreTrainedModel) -> torch.Tensor:
    """The embedding table (V, D)."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight
