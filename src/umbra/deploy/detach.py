"""Write a detached shadow as a stock transformers checkpoint, with its tokenizer; loading it needs no Umbra."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from umbra.adapters.files import PROMPTING
from umbra.adapters.prompting import TOKENIZER_FILES, Prompting, override, save_tokenizer
from umbra.data import ChatFormatter, end_tokens
from umbra.errors import CheckpointError, ConfigError, DetachError
from umbra.files import folder
from umbra.model.shadow_model import ShadowModel
from umbra.options import check_dtype
from umbra.shadow.detached import mark_changed

PIECES = "tokenizer.model"
OF_STOCK = ("generation_config.json", *TOKENIZER_FILES)


def check_target(out: str | Path, overwrite: bool) -> Path:
    """``out``, if it may be written to: new, empty, to be overwritten, or left by a kill in the middle of being written.

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

    Raises:
        CheckpointError: ``out`` is not empty and ``overwrite`` is False, or the disk refused.
        DetachError: see `umbra.shadow.detached.detached`.
    """
    out = check_target(out, overwrite)
    stock = model.detached()
    if tokenizer is not None:
        end_as_learned(stock, formatter_of(stock, tokenizer))
    write_stock(out, lambda staging: save_stock(stock, staging, tokenizer, dtype))
    return out


def formatter_of(
    stock: Any, tokenizer: PreTrainedTokenizerBase, chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatFormatter:  # fmt: skip
    """The chat formatting by which a stock model is asked: as the adapter that it is detached from, unless overridden.

    Raises:
        ConfigError: a damaged entry of its generation config, or unusable arguments.
    """
    noted = stock.generation_config.to_dict().get(PROMPTING) if stock.can_generate() else None
    try:
        prompting = Prompting(None, **(noted or {}))
    except TypeError as error:
        raise ConfigError(f"The generation config is damaged: {PROMPTING}: {error}") from error
    return override(prompting, tokenizer, chat_template, chat_template_kwargs)


def end_as_learned(stock: Any, formatter: ChatFormatter) -> None:
    """Let a stock model's answers end where the chat template ends them, which the base's generation config may not know."""
    if not stock.can_generate():
        return
    generation, ends = stock.generation_config, end_tokens(stock, formatter)
    told = generation.eos_token_id
    if ends and ends != (told if isinstance(told, list) else [told]):
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        mark_changed(generation)


def write_stock(out: Path, write: Callable[[Path], None]) -> None:
    """What ``write`` puts into a folder, in ``out``, in place of the model there: the files of another's tokenizer go.

    Whoever loads the folder meanwhile, or after a kill, finds the old model or the new one.
    """
    folder.settle(out)
    is_model = (out / "config.json").is_file()
    folder.switch_together(out, write, (*OF_STOCK, *_weights(out)) if is_model else ())


def _weights(out: Path) -> list[str]:
    """Names of the weights that transformers would read from a folder."""
    names = ["model.safetensors"]
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads(folder.read_text(out / SAFE_WEIGHTS_INDEX_NAME))
        names += [SAFE_WEIGHTS_INDEX_NAME, *{Path(n).name for n in index["weight_map"].values()}]
    return names


def save_stock(stock: Any, staging: Path, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None) -> None:
    """The files of a stock model, cast to ``dtype`` if one is given, and of its tokenizer.

    Raises:
        DetachError: a head with a bias, which the stock class would not read back.
    """
    with torch.device("meta"):
        known = type(stock)(stock.config).state_dict().keys()
    if more := sorted(stock.state_dict().keys() - known):
        raise DetachError(
            f"A {type(stock).__name__} on disk has no {', '.join(more)}, as the base's head does. Use shadow='mirror', or "
            "`umbra export --to onnx`."
        )
    (stock if dtype is None else stock.to(dtype)).save_pretrained(staging)
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
        if (pieces := _pieces(tokenizer.name_or_path)) is not None:
            shutil.copyfile(pieces, staging / PIECES)


def _pieces(name: str) -> str | None:
    """SentencePiece's file of the tokenizer that was loaded from ``name``, where it has one: GGML's converter reads no other.

    transformers saves tokenizer.json alone.
    """
    try:
        found: Any = cached_file(name, PIECES, _raise_exceptions_for_missing_entries=False) if name else None
    except OSError:  # no such place any more, or the hub cannot be reached
        return None
    return found


def parse_dtype(name: str) -> torch.dtype | None:
    """A floating-point type by its name; None for auto.

    Raises:
        ConfigError: another name.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types.get(check_dtype(name))
