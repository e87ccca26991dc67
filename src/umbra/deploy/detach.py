"""Write a detached shadow as a stock transformers checkpoint, with its tokenizer; loading it needs no Umbra."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from umbra.adapters.files import PROMPTING
from umbra.adapters.prompting import TOKENIZER_FILES, Prompting, override, save_tokenizer
from umbra.base.private_transformers import mark_changed
from umbra.data import ChatFormatter, end_tokens
from umbra.errors import CheckpointError, ConfigError, DetachError
from umbra.files import folder
from umbra.model.shadow_model import ShadowModel
from umbra.options import EMBEDDED, check_dtype

PIECES = "tokenizer.model"
STOCK_FILES = ("generation_config.json", *TOKENIZER_FILES)


def check_target(out: str | Path, overwrite: bool) -> Path:
    """Check that an output folder may be written.

    Args:
        out: the folder.
        overwrite: whether a folder with files may be written; one that a killed writer left always may.

    Returns:
        ``out``.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty and ``overwrite`` is False.
    """
    out = Path(out)
    if out.is_file() or not (overwrite or folder.is_empty(out) or folder.is_interrupted(out)):
        raise CheckpointError(f"{out} is not empty: choose another folder, or overwrite (--overwrite).")
    return out


def write_detached(
    model: ShadowModel, out: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Write the detached shadow, its generation config and its tokenizer as a stock checkpoint.

    Args:
        model: the model; its active shadow is written.
        out: the folder.
        tokenizer: None writes none.
        overwrite: write into a folder that is not empty.
        dtype: of the weights on disk; None for the shadow's.

    Returns:
        ``out``.

    Raises:
        CheckpointError: ``out`` is not empty and ``overwrite`` is False, or the disk refused.
        DetachError: see `umbra.shadow.detached.detached`.
    """
    out = check_target(out, overwrite)
    stock = model.detached()
    if tokenizer is not None:
        set_end_tokens(stock, formatter_of(stock, tokenizer))
    write_stock(out, lambda staging: save_stock(stock, staging, tokenizer, dtype))
    return out


def formatter_of(
    stock: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatFormatter:  # fmt: skip
    """Return the chat formatter of a stock model: that of the adapter it was detached from, unless overridden.

    Args:
        stock: the model.
        tokenizer: its tokenizer.
        chat_template: overrides the setting in the generation config.
        chat_template_kwargs: likewise.

    Raises:
        ConfigError: a damaged entry of the generation config, or unusable arguments.
    """
    generation = stock.generation_config if stock.can_generate() else None
    entry = None if generation is None else generation.to_dict().get(PROMPTING)
    try:
        prompting = Prompting(None, **(entry or {}))
    except TypeError as error:
        raise ConfigError(f"The generation config is damaged: {PROMPTING}: {error}") from error
    return override(prompting, tokenizer, chat_template, chat_template_kwargs)


def set_end_tokens(stock: PreTrainedModel, formatter: ChatFormatter) -> None:
    """Add the chat template's end tokens to a stock model's generation config, which the base's may lack.

    Args:
        stock: the model.
        formatter: its chat formatter.
    """
    generation = stock.generation_config if stock.can_generate() else None
    if generation is None:
        return
    ends, present = end_tokens(stock, formatter), generation.eos_token_id
    if ends and ends != (present if isinstance(present, list) else [present]):
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends  # type: ignore[assignment]
        mark_changed(generation)


def write_stock(out: Path, write: Callable[[Path], None]) -> None:
    """Replace the model in a folder; a process that loads it meanwhile, or after a kill, gets the old one or the new one.

    Args:
        out: the folder. Weights and tokenizer files of the old model are removed.
        write: writes the new model's files into the folder that it is given.
    """
    folder.recover(out)
    is_model = (out / "config.json").is_file()
    folder.switch_together(out, write, (*STOCK_FILES, *_weights(out)) if is_model else ())


def _weights(out: Path) -> list[str]:
    """Names of the weight files that transformers would read from a folder."""
    names = ["model.safetensors"]
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads(folder.read_text(out / SAFE_WEIGHTS_INDEX_NAME))
        names += [SAFE_WEIGHTS_INDEX_NAME, *{Path(n).name for n in index["weight_map"].values()}]
    return names


def save_stock(
    stock: PreTrainedModel, staging: Path, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None
) -> None:
    """Write the files of a stock model and of its tokenizer.

    Args:
        stock: the model.
        staging: the folder.
        tokenizer: None writes none.
        dtype: the type to which the model is cast; None for its own.

    Raises:
        DetachError: the head has a bias, which the stock class would not read back.
    """
    with torch.device("meta"):
        known = type(stock)(stock.config).state_dict().keys()
    if more := sorted(stock.state_dict().keys() - known):
        raise DetachError(
            f"A {type(stock).__name__} on disk has no {', '.join(more)}, as the base's head does. Use shadow='mirror', or "
            "`umbra export --to onnx`."
        )
    (stock if dtype is None else cast(Any, stock).to(dtype)).save_pretrained(staging)
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
        if (pieces := _pieces(tokenizer.name_or_path)) is not None:
            shutil.copyfile(pieces, staging / PIECES)


def _pieces(name: str) -> str | None:
    """The SentencePiece file of the tokenizer that was loaded from ``name``, if there is one.

    GGML's converter needs it, and transformers saves tokenizer.json alone. The embedded base has none, and its name is no hub id.
    """
    if name in ("", EMBEDDED):
        return None
    try:
        return cached_file(name, PIECES, _raise_exceptions_for_missing_entries=False)
    except OSError:  # the folder is gone, or the hub cannot be reached
        return None


def parse_dtype(name: str) -> torch.dtype | None:
    """Return a floating-point type by its name, or None for auto.

    Raises:
        ConfigError: an unknown name.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types.get(check_dtype(name))
