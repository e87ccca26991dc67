"""Leaving tokens out of a byte-level BPE vocabulary: those that given texts do not need.

A text that needs no other token is tokenised to the same strings as before. For BPE merges the pair of lowest rank first, and
nothing it has merged comes apart again: every merge on the way to a token that is kept is kept, in its order, and the pairs
that are gone were never the next. Any other text can still be made of single bytes.
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

from umbra.data import ChatFormatter, read_records
from umbra.data.sources import named_sources, text_files
from umbra.data.text_files import read_text
from umbra.errors import DataError, ExportError
from umbra.shadow.detached import mark_changed

TOKEN_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def read_texts(names: str, writer: ChatFormatter) -> list[str]:
    """The texts of files, each to be tokenised by itself: whole .txt and .md files, the segments of records.

    Raises:
        DataError: a file that cannot be read.
    """
    texts: list[str] = []
    for name in named_sources(names):
        if files := text_files(name):
            texts += map(read_text, files)
        else:
            texts += [text for record in read_records(name) for text, _ in writer.segments(record)]
    if not texts:
        raise DataError(f"vocabulary={names!r} names no text: give files of text or records, separated by commas.")
    return texts


def read_specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json would hold.

    Raises:
        ExportError: no byte-level BPE.
    """
    if not tokenizer.is_fast:
        raise ExportError(f"A {type(tokenizer).__name__} has no tokenizer.json: leave out --vocabulary.")
    backend: Any = tokenizer.backend_tokenizer
    found = json.loads(backend.to_str())
    splits = found["pre_tokenizer"] or {}
    kinds = {part["type"] for part in [splits, *splits.get("pretokenizers", ())] if part}
    model = found["model"]
    if model["type"] != "BPE" or "ByteLevel" not in kinds or model.get("byte_fallback"):
        raise ExportError(
            f"Tokens can be left out of a byte-level BPE vocabulary alone; this tokenizer is a {model['type']}"
            f"{' without bytes' if model['type'] == 'BPE' else ''}: leave out --vocabulary."
        )
    return found


def needed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], ids: Iterable[int] = ()) -> list[int]:
    """The ids that the texts need, single bytes, added tokens and ``ids``, in order.

    Raises:
        ExportError: see `read_specification`.
    """
    found = read_specification(tokenizer)
    vocabulary: dict[str, int] = found["model"]["vocab"]
    names = {i: name for name, i in vocabulary.items()}
    ranks = {pair: rank for rank, pair in enumerate(_pairs(found))}
    kept = {token["id"] for token in found["added_tokens"]} | set(ids)
    kept |= {vocabulary[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    for text in texts:
        kept |= set(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    for i in list(kept):
        kept |= {vocabulary[part] for part in _merged_from(names.get(i, ""), ranks)}
    return sorted(kept)


def _pairs(found: dict[str, Any]) -> list[tuple[str, str]]:
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in found["model"]["merges"]]
    return [(left, right) for left, right in merges]


def _merged_from(token: str, ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """All that BPE makes on the way to a token."""
    parts = list(token)
    while True:
        yield from (p for p in parts if len(p) > 1)
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    """A tokenizer of the ``kept`` ids alone, renumbered in order."""
    new = {old: i for i, old in enumerate(kept)}
    found = read_specification(tokenizer)
    model = found["model"]
    model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    model["merges"] = [list(pair) for pair in _pairs(found) if all(p in model["vocab"] for p in (*pair, "".join(pair)))]
    for token in found["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(found["post_processor"], new)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
        file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # by their old ids; tokenizer.json has them too
        file.write_text(json.dumps(settings), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _renumber(value: Any, new: dict[int, int]) -> None:
    """The ids of special tokens within a post-processor."""
    if isinstance(value, dict):
        if isinstance(value.get("ids"), list):
            value["ids"] = [new[i] for i in value["ids"]]
        for name in ("cls", "sep"):
            if isinstance(value.get(name), list):
                value[name][1] = new[value[name][1]]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _renumber(inner, new)


@torch.no_grad()
def trim_model(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A stock model with the ``kept`` rows of embeddings and head; its logits of those tokens are the model's own.

    Raises:
        ExportError: a model with other tables by token.
    """
    new = {old: i for i, old in enumerate(kept)}
    table, head = _table(model), model.get_output_embeddings()
    if kept[-1] >= len(table):
        raise ExportError(
            f"The tokenizer has tokens from {len(table)} on, which the model has no embeddings of: leave out --vocabulary."
        )
    by_token = [table, *(() if head is None else head.parameters())]
    state, rows = {}, len(table)
    for name, value in {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}.items():
        ours = any(value is t for t in by_token)
        if not ours and value.dim() and len(value) == rows and "embed" in name:
            raise ExportError(
                f"A {model.config.model_type} has further tables by token ({name}): leave out --vocabulary."
            )
        state[name] = value[kept] if ours else value
    config = copy.deepcopy(model.config)
    generation = copy.deepcopy(model.generation_config)
    for settings in {id(c): c for c in (config, config.get_text_config(), generation)}.values():
        for field, value in settings.to_dict().items():
            if field in TOKEN_FIELDS and value is not None:
                setattr(settings, field, _mapped(value, new))
    mark_changed(generation, is_read_back=False)
    config.get_text_config().vocab_size = len(kept)
    trimmed = type(model)._from_config(config, dtype=model.dtype)
    trimmed.load_state_dict({k: v for k, v in state.items() if k in trimmed.state_dict()})
    trimmed.tie_weights()
    trimmed.generation_config = generation
    return trimmed.eval()


def _mapped(value: Any, new: dict[int, int]) -> Any:
    return [new[i] for i in value if i in new] if isinstance(value, list) else new.get(value)


def special_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that the model's configurations name and that it has rows for."""
    found: set[int] = set()
    for settings in (model.config, model.config.get_text_config(), model.generation_config):
        for field, value in settings.to_dict().items():
            if field in TOKEN_FIELDS and value is not None:
                found |= set(value) if isinstance(value, list) else {value}
    return {i for i in found if 0 <= i < len(_table(model))}


def _table(model: PreTrainedModel) -> torch.Tensor:
    """(V, D)"""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight
