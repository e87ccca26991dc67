"""Adapters of the package shadow-peft.

A folder holds ``shadow_config.json``, ``shadow_adapter.safetensors``, and trained heads in ``shadow_modules.safetensors``. It
names neither its base nor a pretrained shadow: whoever loads it passes both, as in that package. Facts that its
configuration has no entries for are stored under keys that the package ignores: `NOTES`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from umbra.adapters.files import Values, read_json
from umbra.adapters.interop import foreign
from umbra.adapters.interop.foreign import Foreign, refusal
from umbra.adapters.interop.layout import Layout
from umbra.base.architectures import Architecture
from umbra.config import CONSTANTS, ShadowConfig
from umbra.errors import CheckpointError, ConfigError
from umbra.shadow.network import Shadow

PACKAGE = "shadow-peft"
CONFIG_FILE, WEIGHTS_FILE, PICKLED = "shadow_config.json", "shadow_adapter.safetensors", "shadow_adapter.pt"
HEADS_FILE, PICKLED_HEADS = "shadow_modules.safetensors", "shadow_modules.pt"
# The field in shadow_config.json → the field of a mirrored backbone's configuration.
SIZES = {
    "num_shadow_layers": "num_hidden_layers",
    "shadow_intermediate_size": "intermediate_size",
    "shadow_num_attention_heads": "num_attention_heads",
    "shadow_num_key_value_heads": "num_key_value_heads",
    "shadow_head_dim": "head_dim",
}
NOTES = {"auxiliary_loss_weight", "base_model_name_or_path"}
KNOWN = {"injection_hidden_size", "gate_hidden_size", "alpha", "dropout", "modules_to_save", *SIZES, *NOTES}
FIXED = {name: CONSTANTS["paper"][name] for name in ("norm", "activation", "bias", "dropout_position")}
# Whether the base is a classifier → the names of the two heads in the file → in the shadow.
HEADS = {
    False: {"lm_head": "attached", "shadow_lm_head": "shadow"},
    True: {"classifier_head": "attached", "shadow_classifier_head": "shadow"},
}


@dataclasses.dataclass
class Adapter(Foreign):
    """An adapter folder of shadow-peft.

    Args:
        shadow: the path or hub id of the model that was passed as ``shadow_model``; None for an implicit shadow.
    """

    shadow: str | None = None

    @classmethod
    def read(cls, path: Path, shadow: str | None) -> "Adapter":
        """Read the folder.

        Raises:
            CheckpointError: the folder is damaged, or pickled.
        """
        values = read_json(path, CONFIG_FILE)
        foreign.check_keys(values, path / CONFIG_FILE, KNOWN)
        weights = {WEIGHTS_FILE: foreign.read_tensors(path, WEIGHTS_FILE, PICKLED)}
        if (path / HEADS_FILE).exists() or values.get("modules_to_save") or (path / PICKLED_HEADS).exists():
            weights[HEADS_FILE] = foreign.read_tensors(path, HEADS_FILE, PICKLED_HEADS)
        rows = [len(t) for k, t in weights.get(HEADS_FILE, {}).items() if k.partition(".")[0] in HEADS[True] and t.ndim]
        return cls(
            path, path / CONFIG_FILE, values, weights, base_name=values.get("base_model_name_or_path"),
            num_labels=rows[0] if rows else None, shadow=shadow,
        )  # fmt: skip

    def configure(self, base: Architecture) -> tuple[ShadowConfig, PretrainedConfig]:
        """Return the shadow's configuration, and that of its backbone; see `Foreign.configure`."""
        values = self.values
        foreign.check_sizes(values, ("injection_hidden_size", "gate_hidden_size", *SIZES), self.weights[WEIGHTS_FILE])
        sizes: dict[str, Any] = {field: values.get(key) for key, field in SIZES.items()}
        heads = self._saved_heads(base) if HEADS_FILE in self.weights else []
        implicit = self.shadow is None
        signs = ("shadow_hidden_projection.weight", "shadow_model.embed_tokens.weight")
        if implicit and any(name in self.weights[WEIGHTS_FILE] for name in signs):
            raise CheckpointError(
                f"{self.path} holds an explicit shadow, and shadow-peft does not store its name: pass shadow=…, the path or "
                "hub id of the model that was passed as shadow_model."
            )
        config = ShadowConfig(
            dialect="paper",
            rank=values.get("injection_hidden_size", 16),
            gate_rank=values.get("gate_hidden_size", 10),
            alpha=foreign.not_null(values, "alpha", 0.1),
            dropout=foreign.not_null(values, "dropout", 0.2),
            auxiliary_loss_weight=values.get("auxiliary_loss_weight", 0.05),
            shadow=self.shadow or "mirror",
            embeddings="base" if implicit else "own",
            train_heads=bool(heads),
            **({f"shadow_{name}": value for name, value in sizes.items()} if implicit else {}),
        )
        if implicit:
            return config, foreign.mirror(base, PACKAGE, sizes)
        return config, foreign.explicit(config.shadow)[0]

    def layouts(self, shadow: Shadow, base: Architecture) -> dict[str, Layout]:
        """Return the table of each file of tensors by file name."""
        layouts = {WEIGHTS_FILE: _layout(shadow, base)}
        if HEADS_FILE in self.weights:
            layouts[HEADS_FILE] = _heads(shadow, base, self._saved_heads(base))
        return layouts

    def _saved_heads(self, base: Architecture) -> list[str]:
        """The names of the heads in the folder: those that its configuration lists, otherwise all in the file.

        Raises:
            CheckpointError: a head shares its weight with the base's embeddings.
        """
        names = self.values.get("modules_to_save") or []
        known = HEADS[base.is_classifier]
        if not isinstance(names, list) or not all(n in known for n in names):
            raise ConfigError(
                f"modules_to_save={names!r}, but with this base shadow-peft trains {' and '.join(known)}."
            )
        names = names or [n for n in known if any(k.startswith(f"{n}.") for k in self.weights[HEADS_FILE])]
        if "lm_head" in names and base.head.weight is base.embeddings.weight:
            raise CheckpointError(
                f"{self.path / HEADS_FILE} holds a trained 'lm_head', which this base shares with its embeddings: "
                "shadow-peft changes both, Umbra never changes the base."
            )
        return names


def _layout(shadow: Shadow, base: Architecture) -> Layout:
    """The table of ``shadow_adapter.safetensors``."""
    layout = Layout(foreign.plain_state(shadow))
    layout.module("shadow_model.", "backbone.")
    if not shadow.config.is_pretrained:
        foreign.add_unused_table(layout, "shadow_model.", base)
    if shadow.projection is not None:
        layout.same("shadow_hidden_projection.weight", "projection.weight")
    layers = shadow.couplings.layers
    for matrix in ("down", "up"):
        names = [f"couplings.injections.{l}.{matrix}.weight" for l in layers]
        layout.stack(f"shadow_injection_model.injection_{matrix}s", names)
    for i, l in enumerate(layers):
        for name, zeros in foreign.unused_update(base, shadow.config).items():
            part, _, suffix = name.partition(".")
            stored = f"shadow_update_model.update_{part}s.{i}.{suffix}"
            if l == layers[-1]:
                layout.unused(stored, zeros)
            else:
                layout.same(stored, f"couplings.updates.{l}.{name}")
    norm = "shadow_update_model.hidden_norm."
    if len(layers) > 1:
        layout.module(norm, "couplings.norm.")
    else:
        layout.unused(f"{norm}weight", torch.ones(base.config.hidden_size))
        layout.unused(f"{norm}bias", torch.zeros(base.config.hidden_size))
    return layout


def _heads(shadow: Shadow, base: Architecture, names: list[str]) -> Layout:
    """The table of ``shadow_modules.safetensors``."""
    layout = Layout(foreign.plain_state(shadow))
    for name in names:
        layout.module(f"{name}.", f"heads.{HEADS[base.is_classifier][name]}.")
    return layout


# -- writing -----------------------------------------------------------------------------------------------------------


def write(shadow: Shadow, base: Architecture) -> tuple[Values, dict[str, Layout]]:
    """Return the content of ``shadow_config.json``, and the table of each file of tensors by file name.

    Args:
        shadow: the shadow.
        base: the parts of its base.

    Raises:
        CheckpointError: shadow-peft's format cannot express this shadow.
    """
    config = shadow.config
    values, layers = config.to_dict(), list(shadow.couplings.layers)
    sizes = {key: values[f"shadow_{field}"] for key, field in SIZES.items()}
    sizes["num_shadow_layers"] = sizes["num_shadow_layers"] or 1
    foreign.refuse_other_fields(config, FIXED, PACKAGE)
    foreign.refuse_unreachable(base, PACKAGE)
    if layers != list(range(1, len(base.blocks))):
        raise refusal(PACKAGE, f"couplings at {layers}", "it couples every block but the first")
    if config.gate_rank == 1:
        raise refusal(PACKAGE, "gate_rank=1", "it needs at least 2")
    if shadow.embed_projection is not None:
        raise refusal(
            PACKAGE, "projected shared embeddings", "a shadow of another width has its own (embeddings='own')"
        )
    if config.is_pretrained and not shadow.owns_embeddings:
        raise refusal(PACKAGE, "a pretrained shadow that reads the base's embeddings", "there it reads its own")
    if not config.is_pretrained:
        if shadow.owns_embeddings:
            raise refusal(
                PACKAGE, f"embeddings='own' in a shadow of form {config.shadow}", "it reads the base's embeddings"
            )
        foreign.refuse_other_backbone(
            shadow, foreign.mirror(base, PACKAGE, {SIZES[k]: v for k, v in sizes.items()}), PACKAGE
        )
    layouts, names = {WEIGHTS_FILE: _layout(shadow, base)}, list(HEADS[base.is_classifier])
    if shadow.heads:
        if not base.is_classifier and base.head.weight is base.embeddings.weight:
            raise refusal(PACKAGE, "trained heads beside this base", "its head shares its weight with the embeddings")
        layouts[HEADS_FILE] = _heads(shadow, base, names)
    return {
        **sizes,
        "injection_hidden_size": config.rank,
        "gate_hidden_size": config.gate_rank,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "modules_to_save": names if shadow.heads else [],
        "auxiliary_loss_weight": config.auxiliary_loss_weight,
        "base_model_name_or_path": base.model.name_or_path or None,
    }, layouts
