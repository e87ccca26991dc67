"""Pretrained shadows: a stock checkpoint of transformers, or one with a projection to the base's width.

The second form (``model_type`` `PROJECTED`, of the package shadow-peft) wraps a backbone. Its configuration names classes to
import: they are ignored, and the backbone is built from the ``model_type`` of the wrapped configuration.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from umbra.base import architectures
from umbra.base.loading import load_tokenizer, without_implementations
from umbra.errors import BaseModelError, ConfigError, UmbraError, raising, shown
from umbra.files import hub
from umbra.options import EMBEDDED

PROJECTED = "causal_lm_with_hidden_projection"
BACKBONE_PREFIX, PROJECTION = "shadow_model.", "shadow_hidden_projection.weight"
LANGUAGE_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # class names, not all end in ForCausalLM
# Fields of a saved configuration about its origin, its storage and code, which do not describe the model.
NOT_OF_THE_MODEL = (
    "_name_or_path", "architectures", "auto_map", "quantization_config", "transformers_version", "dtype", "torch_dtype",
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation", "use_kernels",
    "kernel_config",
)  # fmt: skip


class Pretrained(NamedTuple):
    """A backbone in float32; its projection (D, Ds) to a base's width, or else its head (V, Ds), if it has one.

    The head includes the factor that the model applies to its logits.
    """

    backbone: PreTrainedModel
    projection: Tensor | None = None
    head: Tensor | None = None


def load_pretrained(path: str) -> Pretrained:
    """Load a pretrained shadow.

    Args:
        path: a path or hub id.

    Raises:
        ConfigError: it cannot be read from safetensors without running code of the checkpoint.
    """
    values = read_config(path)
    if values.get("model_type") == PROJECTED:
        return _load_projected(path, values)
    if "model_type" in values and values["model_type"] not in CONFIG_MAPPING:
        raise ConfigError(
            f"shadow={path!r} is a {values['model_type']!r}, which transformers does not support; code in a checkpoint "
            "is never run."
        )
    with _reading(path):
        options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32}
        options["config"] = without_implementations(AutoConfig.from_pretrained(path, trust_remote_code=False))
        options["output_loading_info"] = True
        if not LANGUAGE_MODELS.isdisjoint(values.get("architectures") or ()):
            whole, report = cast(Any, AutoModelForCausalLM).from_pretrained(path, **options)
            _check_complete(path, report)
            head = whole.get_output_embeddings()
            if type(whole.base_model) is MODEL_MAPPING.get(type(whole.config), None) and isinstance(head, nn.Linear):
                return Pretrained(
                    whole.base_model, head=head.weight.detach() * architectures.logit_factor(whole.config)
                )
        backbone, report = AutoModel.from_pretrained(path, **options)
        _check_complete(path, report)
        return Pretrained(backbone)


@contextmanager
def _reading(path: str, fault: str = "is no model that transformers can load") -> Iterator[None]:
    """A context that reads a shadow, and raises a ConfigError with the ``fault`` where that fails."""
    try:
        with hub.lookup(path):
            yield
    except UmbraError:
        raise
    except (OSError, ValueError, RuntimeError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"shadow={path!r} {fault}: {hub.offline_advice(path, error) or error}") from error


def _check_complete(path: str, report: dict[str, Any]) -> None:
    """Raise a ConfigError for weights that the file lacks, which transformers has initialized."""
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"shadow={path!r} is damaged: it lacks {len(missing)} tensors, {missing[0]} first.")


def check_vocabulary(path: str, base: str | None, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Check that a pretrained shadow has the base's tokenizer.

    Args:
        path: of the shadow.
        base: the base's name.
        tokenizer: the base's; None loads the one of ``base``, if it is on this machine.

    Returns:
        The number of embeddings that the base's tokens need; None where either tokenizer is not on this machine.

    Raises:
        ConfigError: an id stands for different tokens. Added tokens may differ: families rename them.
    """
    shadow_tokenizer, tokenizer = tokenizer_at_hand(path), tokenizer or tokenizer_at_hand(base)
    if shadow_tokenizer is None or tokenizer is None:
        return None
    added = shadow_tokenizer.added_tokens_decoder.keys() | tokenizer.added_tokens_decoder.keys()
    names = {i: token for token, i in shadow_tokenizer.get_vocab().items()}
    numbers = tokenizer.get_vocab()
    other = [token for token, i in numbers.items() if names.get(i, token) != token and i not in added]
    if other:
        raise ConfigError(
            f"The pretrained shadow {path} has another tokenizer than the base {base}: {len(other)} tokens have other "
            f"numbers, {shown(other[0])} first. Take a shadow of the base's family, or make one: umbra pretrain --base {base}."
        )
    return 1 + max(numbers.values())


def tokenizer_at_hand(name: str | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model on this machine.

    Args:
        name: path, hub id or `EMBEDDED`.

    Returns:
        None where the model or its tokenizer is not on this machine; transformers would return an empty tokenizer.
    """
    try:
        options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        if not name or (name != EMBEDDED and not cached_file(name, "tokenizer.json", **options)):
            return None
        return load_tokenizer(name, local_files_only=True)
    except (OSError, BaseModelError):
        return None


def backbone_config(path: str) -> tuple[PretrainedConfig, bool]:
    """Return the configuration of a pretrained backbone, and whether it has a projection.

    Args:
        path: a path or hub id.

    Raises:
        ConfigError: there is none, or transformers does not support it.
    """
    values = read_config(path)
    projected = values.get("model_type") == PROJECTED
    return saved_config(_inner(path, values) if projected else values), projected


def saved_config(values: dict[str, Any]) -> PretrainedConfig:
    """Return the backbone configuration that a file describes.

    Args:
        values: the file's content.

    Raises:
        ConfigError: a model type that transformers does not support, or invalid values.
    """
    with raising(ConfigError, lambda error: f"The saved shadow's configuration cannot be used: {error!s:.500}"):
        return without_implementations(
            AutoConfig.for_model(**{k: v for k, v in values.items() if k not in NOT_OF_THE_MODEL})
        )


def read_config(path: str) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint.

    Args:
        path: a path or hub id.

    Raises:
        ConfigError: the file is missing or contains no JSON object.
    """
    if Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file():
        raise ConfigError(
            f"shadow={path!r} is an adapter. Write its shadow as a model and give that: umbra detach {path} FOLDER."
        )
    with _reading(path), open(cached_file(path, "config.json") or "", encoding="utf-8") as file:
        values = json.load(file)
    if not isinstance(values, dict):
        raise ConfigError(f"shadow={path!r} is no model: its config.json holds a {type(values).__name__}.")
    return values


def _inner(path: str, values: dict[str, Any]) -> dict[str, Any]:
    inner = values.get("shadow_model_config")
    if not isinstance(inner, dict):
        raise ConfigError(f"shadow={path!r} is damaged: its config.json has no shadow_model_config.")
    return inner


def _load_projected(path: str, values: dict[str, Any]) -> Pretrained:
    config = saved_config(_inner(path, values))
    with _reading(path, f"is a {PROJECTED} that cannot be read"):
        backbone = AutoModel.from_config(config, dtype=torch.float32)
        with safe_open(cached_file(path, "model.safetensors"), framework="pt") as file:
            names = [n for n in file.keys() if n.startswith(BACKBONE_PREFIX)]  # noqa: SIM118
            weights = {name.removeprefix(BACKBONE_PREFIX): file.get_tensor(name) for name in names}
            projection = file.get_tensor(PROJECTION).float()
        backbone.load_state_dict(weights)
    return Pretrained(backbone, projection)
