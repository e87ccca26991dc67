"""What the formats of PEFT and shadow-peft have in common."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from umbra.adapters.files import Tensors, Values, read_weights
from umbra.adapters.interop.layout import Layout
from umbra.adapters.prompting import Prompting
from umbra.base import architectures
from umbra.base.architectures import Architecture
from umbra.base.architectures.families import ATTENTION_TYPES
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, CheckpointError, ConfigError
from umbra.method.core import Injection, Update
from umbra.shadow.network import Shadow
from umbra.shadow.pretrained import NOT_OF_THE_MODEL, backbone_config


@dataclass
class Foreign(ABC):
    """An adapter folder of another package, read but not yet attached to a base.

    Args:
        path: the folder.
        file: its configuration.
        values: the configuration's content.
        weights: tensors by file name.
        base_name: the name of the base, if the folder stores it.
        base_options: keyword arguments for loading the base by that name.
        num_labels: of a classifier.
    """

    path: Path
    file: Path
    values: Values
    weights: dict[str, Tensors]
    base_name: str | None = None
    base_options: dict[str, Any] = field(default_factory=dict)
    num_labels: int | None = None
    base_rows: ClassVar[int] = 0
    added_count: ClassVar[int] = 0  # these formats have no room for added tokens

    @property
    def classifier(self) -> dict[str, Any] | None:
        """The label entries of the base's configuration, for a classifier; None for a language model."""
        return None if self.num_labels is None else {"num_labels": self.num_labels}

    def prompting(self) -> Prompting:
        """Read the tokenizer in the folder, where trainers write it; the chat template has no arguments."""
        return Prompting.read(self.path, {})

    def check(self, base: Architecture, allow_other_base: bool = False) -> None:
        """Set `config` and `backbone_config` for a base.

        Args:
            base: the base's parts.
            allow_other_base: has no effect: the folder stores no fingerprint to compare.

        Raises:
            CheckpointError: the folder is damaged, for another type of base, or has settings that Umbra does not support.
        """
        try:
            config, self.backbone_config = self.configure(base)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged, or of another base: {error}") from error
        self.config, self.base = config.resolve(), base

    @abstractmethod
    def configure(self, base: Architecture) -> tuple[ShadowConfig, PretrainedConfig]:
        """Return the shadow's configuration, and that of its backbone.

        Args:
            base: the base's parts.

        Raises:
            CheckpointError: a setting that Umbra does not support.
            ConfigError: a value that is damaged, or does not fit the base.
        """

    @abstractmethod
    def layouts(self, shadow: Shadow, base: Architecture) -> dict[str, Layout]:
        """Return the table of each file of tensors by file name."""

    def add_rows(self, shadow: Shadow, base: Architecture) -> None:  # noqa: B027, as `SavedAdapter` has it
        """Do nothing: these formats have no room for added tokens."""

    def fill(self, shadow: Shadow) -> None:
        """Load the tensors into ``shadow``, all of them or none.

        Raises:
            CheckpointError: a tensor is missing, unknown, misshapen, not floating point or not finite.
        """
        tensors: Tensors = {}
        for name, layout in self.layouts(shadow, self.base).items():
            tensors |= layout.read(self.weights[name], self.path / name)
        state = shadow.state_dict()
        missing = sorted(key for key in state.keys() - tensors.keys() if not key.startswith("heads."))
        if missing:
            raise CheckpointError(f"{self.path} has nothing for {missing[0]!r}, which a shadow of these sizes needs.")
        shadow.load_state_dict({**state, **tensors})


def check_keys(values: Values, file: Path, known: Iterable[str]) -> None:
    """Raise a CheckpointError for an entry of a configuration file that is set and not in ``known``."""
    unknown = sorted(k for k in values.keys() - set(known) if values[k] not in (None, False, [], {}))
    if unknown:
        raise CheckpointError(
            f"{file} sets {unknown[0]!r}, which this version of Umbra does not know and cannot apply."
        )


def read_tensors(path: Path, name: str, pickled: str) -> Tensors:
    """Read the tensors of a safetensors file.

    Args:
        path: the folder.
        name: the file's name.
        pickled: the name of the same file as a pickle.

    Raises:
        CheckpointError: the file is missing or damaged, or there is a pickle alone, which can run code when it is opened.
    """
    if not (path / name).exists() and (path / pickled).exists():
        raise CheckpointError(
            f"{path / pickled} is a pickle, which can run code when it is opened: Umbra reads safetensors only. Save the "
            f"adapter again with the package that wrote it, as {name}."
        )
    return read_weights(path, name)


def check_sizes(values: Values, names: Iterable[str], tensors: Tensors) -> None:
    """Raise a ConfigError for a size larger than any in the weights, before anything of that size is built.

    Args:
        values: the content of a configuration file.
        names: its entries that are sizes.
        tensors: the weights.
    """
    largest = max([len(tensors), *(size for tensor in tensors.values() for size in tensor.shape)])
    for name in names:
        value = values.get(name)
        if isinstance(value, int) and value > largest:
            raise ConfigError(f"{name}={value}, but no tensor beside it is larger than {largest}.")


def not_null(values: Values, name: str, default: float) -> Any:
    """Return an entry of a configuration file.

    Args:
        values: the content of the file.
        name: the entry.
        default: returned where the entry is missing.

    Raises:
        ConfigError: the entry is null, which in a `ShadowConfig` would stand for the dialect's value.
    """
    if values.get(name, default) is None:
        raise ConfigError(f"{name} is null; leave it out for {default}.")
    return values.get(name, default)


def mirror(base: Architecture, package: str, sizes: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration of the backbone that the other packages mirror from a base.

    Args:
        base: the base's parts.
        package: the format's name, for the message.
        sizes: fields of the configuration that differ from the base's; None for those that do not.

    Raises:
        BaseModelError: Umbra cannot run a mirror of these blocks.
        ConfigError: the architecture does not have one of the sizes.
    """
    changed = {"num_hidden_layers": 1, **{k: v for k, v in sizes.items() if v is not None}}
    if not set(architectures.layer_types(base.config)) <= ATTENTION_TYPES:
        raise BaseModelError(
            f"{package} mirrors the recurrent blocks of {base.config.model_type}; Umbra cannot run those."
        )
    if changed["num_hidden_layers"] > 1 and architectures.scales_by_depth(base.config):
        raise BaseModelError(
            f"{base.config.model_type} scales attention by depth (scale_attn_by_inverse_layer_idx): {package} does so in a "
            "shadow of several layers, Umbra does not."
        )
    return architectures.mirror_config(base.config, changed)


def explicit(path: str) -> tuple[PretrainedConfig, bool]:
    """Return the backbone configuration of a pretrained shadow, and whether a projection comes with it.

    Args:
        path: a path or hub id.

    Raises:
        ConfigError: there is no model.
        BaseModelError: it is no causal decoder.
    """
    config, projected = backbone_config(path)
    if config.get_text_config() is not config or not architectures.is_causal(config):
        raise BaseModelError(f"The pretrained shadow {path!r} ({config.model_type}) is no causal decoder of text.")
    return config, projected


def plain_state(shadow: Shadow) -> Tensors:
    """Return a shadow's tensors, with the measured input scale, which the other packages do not have, folded into W_down."""
    state = shadow.state_dict()
    for l, injection in shadow.couplings.injections.items():
        name = f"couplings.injections.{l}."
        if state.pop(f"{name}channels", None) is not None:
            assert isinstance(injection, Injection)
            state[f"{name}down.weight"] = injection.scaled_down().detach()
    return state


def unused_update(base: Architecture, config: ShadowConfig) -> Tensors:
    """Return zeros for the update after the last coupled block, which both packages store: nothing reads its result."""
    with torch.device("meta"):
        shapes = Update(base.config.hidden_size, config).state_dict()
    return {name: torch.zeros(value.shape) for name, value in shapes.items()}


def add_unused_table(layout: Layout, prefix: str, base: Architecture) -> None:
    """Add the embedding table that the other packages leave in a mirrored shadow that reads the base's embeddings.

    They remove modules named ``embed_tokens`` alone.

    Args:
        layout: where the table is added.
        prefix: of the backbone's tensors.
        base: the base's parts.
    """
    name = architectures.name_of(base.decoder, base.embeddings)
    if name != "embed_tokens":
        layout.unused(f"{prefix}{name}.weight", base.embeddings.weight)


# -- writing -----------------------------------------------------------------------------------------------------------


def refusal(package: str, feature: str, reason: str) -> CheckpointError:
    """Return the error for a feature that a format cannot express."""
    return CheckpointError(f"A {package} adapter cannot have {feature}: {reason}.")


def refuse_other_fields(config: ShadowConfig, fixed: dict[str, Any], package: str) -> None:
    """Raise a CheckpointError unless the fields that a format does not store have the values that it fixes."""
    values = config.to_dict()["constants"]
    for name, value in fixed.items():
        if values[name] != value and not (name == "dropout_position" and config.dropout == 0):
            raise refusal(package, f"{name}={values[name]}", f"it always has {name}={value}")


def refuse_unreachable(base: Architecture, package: str) -> None:
    """Raise a CheckpointError for a base in which the other packages do not find the blocks."""
    blocks = architectures.name_of(base.model, base.blocks)
    if base.decoder is not base.model.base_model or blocks.rpartition(".")[2] not in ("layers", "h"):
        raise refusal(package, f"a base with its blocks at {blocks}", "that package does not find them there")


def refuse_other_backbone(shadow: Shadow, expected: PretrainedConfig, package: str) -> None:
    """Raise a CheckpointError unless the shadow's backbone is the one that the package would mirror from the base."""
    fields, mirrored = (_model_fields(c) for c in (shadow.backbone.config, expected))
    for name in sorted(fields.keys() | mirrored.keys()):
        if fields.get(name) != mirrored.get(name):
            feature = f"a shadow with {name}={fields.get(name)}"
            raise refusal(package, feature, f"it would be built with {mirrored.get(name)}")


def _model_fields(config: PretrainedConfig) -> Values:
    """The entries of a configuration that describe the model."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in (*NOT_OF_THE_MODEL, "use_cache")}


def head_weights(head: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a task head by name."""
    return {name: value.detach() for name, value in head.state_dict().items()}
