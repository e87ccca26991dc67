"""What the formats of others have in common."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from umbra.adapters.files import read_weights
from umbra.adapters.interop.layout import Layout, Tensors
from umbra.adapters.prompting import Prompting
from umbra.base import architectures
from umbra.base.architectures import Anatomy
from umbra.base.architectures.families import ATTENTION_TYPES
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, CheckpointError, ConfigError
from umbra.method.core import Update
from umbra.shadow.network import Shadow
from umbra.shadow.pretrained import NOT_OF_THE_MODEL, backbone_config


@dataclass
class Foreign:
    """An adapter folder of another package, read but not yet beside a base.

    Args:
        file: of its configuration, whose content is ``values``.
        weights: tensors by file name.
        base_options: for loading the base by the name that the folder gives.
        num_labels: of a classifier.
    """

    path: Path
    file: Path
    values: dict[str, Any]
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
        """The tokenizer that lies in the folder, as trainers write it; its template without arguments."""
        return Prompting.read(self.path, {})

    def check(self, base: Anatomy, allow_other_base: bool = False) -> None:
        """Settle `config` and `backbone_config` for a base. There is no fingerprint to check it by.

        Raises:
            CheckpointError: damaged, for another kind of base, or something that Umbra does not do.
        """
        try:
            config, self.backbone_config = self.configure(base)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged, or of another base: {error}") from error
        self.config, self.base = config.resolve(), base

    def configure(self, base: Anatomy) -> tuple[ShadowConfig, PretrainedConfig]:
        """Our configuration, and that of the shadow's backbone.

        Raises:
            CheckpointError: something that Umbra does not do.
            ConfigError: a value that is damaged, or does not fit the base.
        """
        raise NotImplementedError

    def layouts(self, shadow: Shadow, base: Anatomy) -> dict[str, Layout]:
        """The table of each file."""
        raise NotImplementedError

    def add_rows(self, shadow: Shadow, base: Anatomy) -> None:
        """Do nothing: these formats have no room for added tokens."""

    def fill(self, shadow: Shadow) -> None:
        """Put all tensors into the shadow, or none.

        Raises:
            CheckpointError: a tensor is missing, left over, misshapen, not floating point or not finite.
        """
        found: Tensors = {}
        for name, layout in self.layouts(shadow, self.base).items():
            found |= layout.read(self.weights[name], self.path / name)
        own = shadow.state_dict()
        left = sorted(key for key in own.keys() - found.keys() if not key.startswith("heads."))
        if left:
            raise CheckpointError(f"{self.path} has nothing for {left[0]!r}, which a shadow of these sizes needs.")
        shadow.load_state_dict({**own, **found})


def check_keys(values: dict[str, Any], file: Path, known: Iterable[str]) -> None:
    """Raise a CheckpointError for a key of a configuration file that this version does not know and that is set."""
    unknown = sorted(k for k in values.keys() - set(known) if values[k] not in (None, False, [], {}))
    if unknown:
        raise CheckpointError(
            f"{file} sets {unknown[0]!r}, which this version of Umbra does not know and so cannot honour."
        )


def read_tensors(path: Path, name: str, pickled: str) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: missing or damaged, or there is only its ``pickled`` form, which can run code when it is opened.
    """
    if not (path / name).exists() and (path / pickled).exists():
        raise CheckpointError(
            f"{path / pickled} is a pickle, which can run code when it is opened: Umbra reads safetensors only. Save the "
            f"adapter again with the package that wrote it, as {name}."
        )
    return read_weights(path, name)


def check_sizes(values: dict[str, Any], names: Iterable[str], tensors: Tensors) -> None:
    """Raise a ConfigError for a size beyond everything in the weights, before anything of that size is built."""
    largest = max([len(tensors), *(size for tensor in tensors.values() for size in tensor.shape)])
    for name in names:
        value = values.get(name)
        if isinstance(value, int) and value > largest:
            raise ConfigError(f"{name}={value}, but no tensor beside it is larger than {largest}.")


def given(values: dict[str, Any], name: str, default: Any) -> Any:
    """Raise a ConfigError for a null, which in a `ShadowConfig` would stand for the dialect's value."""
    if values.get(name, default) is None:
        raise ConfigError(f"{name} is null; leave it out for {default}.")
    return values.get(name, default)


def mirror(base: Anatomy, form: str, sizes: dict[str, Any]) -> PretrainedConfig:
    """The configuration of the backbone that the peers mirror from a base, whatever its blocks are.

    Raises:
        BaseModelError: blocks whose mirror Umbra cannot run.
        ConfigError: sizes that this architecture does not have.
    """
    given = {"num_hidden_layers": 1, **{k: v for k, v in sizes.items() if v is not None}}
    if not set(architectures.layer_types(base.config)) <= ATTENTION_TYPES:
        raise BaseModelError(
            f"{form} mirrors the recurrent blocks of {base.config.model_type}; Umbra cannot run those."
        )
    if given["num_hidden_layers"] > 1 and architectures.scales_by_depth(base.config):
        raise BaseModelError(
            f"{base.config.model_type} scales attention by depth (scale_attn_by_inverse_layer_idx): {form} does so in a "
            "shadow of several layers, Umbra does not."
        )
    return architectures.mirror_config(base.config, given)


def explicit(path: str) -> tuple[PretrainedConfig, bool]:
    """The backbone configuration of a pretrained shadow, and whether it is a projected one.

    Raises:
        ConfigError: nothing there.
        BaseModelError: no causal decoder.
    """
    config, projected = backbone_config(path)
    if config.get_text_config() is not config or not architectures.is_causal(config):
        raise BaseModelError(f"The pretrained shadow {path!r} ({config.model_type}) is no causal decoder of text.")
    return config, projected


def plain_state(shadow: Shadow) -> Tensors:
    """Its tensors, with the measured scale of channels, which the peers do not have, multiplied into W_down."""
    state = shadow.state_dict()
    for l, injection in shadow.couplings.injections.items():
        name = f"couplings.injections.{l}."
        if state.pop(f"{name}channels", None) is not None:
            state[f"{name}down.weight"] = injection.scaled_down().detach()  # type: ignore[operator]
    return state


def dead_update(base: Anatomy, config: ShadowConfig) -> Tensors:
    """Zeros for the update after the last coupled block, which both peers carry: it feeds nothing."""
    with torch.device("meta"):
        shapes = Update(base.config.hidden_size, config).state_dict()
    return {name: torch.zeros(value.shape) for name, value in shapes.items()}


def dead_table(layout: Layout, prefix: str, base: Anatomy) -> None:
    """The embedding table that the peers leave inside a mirrored shadow which reads the base's embeddings.

    They take out only what is called ``embed_tokens``.
    """
    name = architectures.name_of(base.decoder, base.embeddings)
    if name != "embed_tokens":
        layout.dead(f"{prefix}{name}.weight", base.embeddings.weight)


# -- writing -----------------------------------------------------------------------------------------------------------


def refuse(form: str, what: str, instead: str) -> CheckpointError:
    """The error for what a format cannot express."""
    return CheckpointError(f"A {form} adapter cannot have {what}: {instead}.")


def refuse_other_fields(config: ShadowConfig, fixed: dict[str, Any], form: str) -> None:
    """Raise a CheckpointError unless the constants that a format has built in have its values."""
    values = config.to_dict()["constants"]
    for name, value in fixed.items():
        if values[name] != value and not (name == "dropout_position" and config.dropout == 0):
            raise refuse(form, f"{name}={values[name]}", f"it always has {name}={value}")


def refuse_unreachable(base: Anatomy, form: str) -> None:
    """Raise a CheckpointError for a base in which the peers do not find the blocks."""
    blocks = architectures.name_of(base.model, base.blocks)
    if base.decoder is not base.model.base_model or blocks.rpartition(".")[2] not in ("layers", "h"):
        raise refuse(form, f"a base with its blocks at {blocks}", "that package does not find them there")


def refuse_other_backbone(shadow: Shadow, expected: PretrainedConfig, form: str) -> None:
    """Raise a CheckpointError unless the shadow is what the format would mirror from the base."""
    found, wanted = (_model_fields(c) for c in (shadow.backbone.config, expected))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise refuse(form, f"a shadow with {name}={found.get(name)}", f"it would be built with {wanted.get(name)}")


def _model_fields(config: PretrainedConfig) -> dict[str, Any]:
    values = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in (*NOT_OF_THE_MODEL, "use_cache")}


def head_weights(head: nn.Module) -> dict[str, Tensor]:
    """The tensors of a task head by name."""
    return {name: value.detach() for name, value in head.state_dict().items()}
