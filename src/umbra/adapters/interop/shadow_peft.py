"""Adapters of the package shadow-peft: ``shadow_config.json``, ``shadow_adapter.safetensors``, and trained heads in
``shadow_modules.safetensors``.

The folder names neither its base nor a pretrained shadow, so both are told by whoever loads it, as in that package. Keys
that the package ignores carry what it has no place for: `NOTES`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from umbra.adapters.files import read_json
from umbra.adapters.interop import foreign
from umbra.adapters.interop.foreign import Foreign, refuse
from umbra.adapters.interop.layout import Layout
from umbra.base.architectures import Anatomy
from umbra.config import CONSTANTS, ShadowConfig
from umbra.errors import CheckpointError, ConfigError
from umbra.shadow.network import Shadow

FORM = "shadow-peft"
CONFIG_FILE, WEIGHTS_FILE, PICKLED = "shadow_config.json", "shadow_adapter.safetensors", "shadow_adapter.pt"
HEADS_FILE, PICKLED_HEADS = "shadow_modules.safetensors", "shadow_modules.pt"
# Their field → that of a mirrored backbone.
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
# Whether the base is a classifier → their names of the two heads, and ours.
HEADS = {
    False: {"lm_head": "attached", "shadow_lm_head": "shadow"},
    True: {"classifier_head": "attached", "shadow_classifier_head": "shadow"},
}


@dataclasses.dataclass
class Adapter(Foreign):
    """An adapter folder of shadow-peft.

    Args:
        shadow: the path or hub id of the model that was given as ``shadow_model``; None for an implicit shadow.
    """

    shadow: str | None = None

    @classmethod
    def read(cls, path: Path, shadow: str | None) -> "Adapter":
        """Read the folder.

        Raises:
            CheckpointError: damaged, or pickled.
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

    def configure(self, base: Anatomy) -> tuple[ShadowConfig, PretrainedConfig]:
        values = self.values
        foreign.check_sizes(values, ("injection_hidden_size", "gate_hidden_size", *SIZES), self.weights[WEIGHTS_FILE])
        sizes: dict[str, Any] = {mine: values.get(theirs) for theirs, mine in SIZES.items()}
        heads = self._saved_heads(base) if HEADS_FILE in self.weights else []
        implicit = self.shadow is None
        signs = ("shadow_hidden_projection.weight", "shadow_model.embed_tokens.weight")
        if implicit and any(name in self.weights[WEIGHTS_FILE] for name in signs):
            raise CheckpointError(
                f"{self.path} holds an explicit shadow, and shadow-peft does not note which: pass shadow=…, the path or hub "
                "id of the model that was given as shadow_model."
            )
        config = ShadowConfig(
            dialect="paper",
            rank=values.get("injection_hidden_size", 16),
            gate_rank=values.get("gate_hidden_size", 10),
            alpha=foreign.given(values, "alpha", 0.1),
            dropout=foreign.given(values, "dropout", 0.2),
            auxiliary_loss_weight=values.get("auxiliary_loss_weight", 0.05),
            shadow=self.shadow or "mirror",
            embeddings="base" if implicit else "own",
            train_heads=bool(heads),
            **({f"shadow_{name}": value for name, value in sizes.items()} if implicit else {}),
        )
        if implicit:
            return config, foreign.mirror(base, FORM, sizes)
        return config, foreign.explicit(config.shadow)[0]

    def layouts(self, shadow: Shadow, base: Anatomy) -> dict[str, Layout]:
        layouts = {WEIGHTS_FILE: _layout(shadow, base)}
        if HEADS_FILE in self.weights:
            layouts[HEADS_FILE] = _heads(shadow, base, self._saved_heads(base))
        return layouts

    def _saved_heads(self, base: Anatomy) -> list[str]:
        """Which heads the folder holds: those asked for, or those that are there.

        Raises:
            CheckpointError: a head that is one with the base's embeddings.
        """
        names = self.values.get("modules_to_save") or []
        known = HEADS[base.is_classifier]
        if not isinstance(names, list) or not all(n in known for n in names):
            raise ConfigError(
                f"modules_to_save={names!r}, but beside this base shadow-peft trains {' and '.join(known)}."
            )
        names = names or [n for n in known if any(k.startswith(f"{n}.") for k in self.weights[HEADS_FILE])]
        if "lm_head" in names and base.head.weight is base.embeddings.weight:
            raise CheckpointError(
                f"{self.path / HEADS_FILE} holds a trained 'lm_head', which in this base is one with its embeddings: "
                "shadow-peft changes both, Umbra leaves the base alone."
            )
        return names


def _layout(shadow: Shadow, base: Anatomy) -> Layout:
    layout = Layout(foreign.plain_state(shadow))
    layout.module("shadow_model.", "backbone.")
    if not shadow.config.is_pretrained:
        foreign.dead_table(layout, "shadow_model.", base)
    if shadow.projection is not None:
        layout.same("shadow_hidden_projection.weight", "projection.weight")
    layers = shadow.couplings.layers
    for matrix in ("down", "up"):
        names = [f"couplings.injections.{l}.{matrix}.weight" for l in layers]
        layout.stack(f"shadow_injection_model.injection_{matrix}s", names)
    for i, l in enumerate(layers):
        for name, zeros in foreign.dead_update(base, shadow.config).items():
            part, _, rest = name.partition(".")
            theirs = f"shadow_update_model.update_{part}s.{i}.{rest}"
            if l == layers[-1]:
                layout.dead(theirs, zeros)
            else:
                layout.same(theirs, f"couplings.updates.{l}.{name}")
    norm = "shadow_update_model.hidden_norm."
    if len(layers) > 1:
        layout.module(norm, "couplings.norm.")
    else:
        layout.dead(f"{norm}weight", torch.ones(base.config.hidden_size))
        layout.dead(f"{norm}bias", torch.zeros(base.config.hidden_size))
    return layout


def _heads(shadow: Shadow, base: Anatomy, names: list[str]) -> Layout:
    layout = Layout(foreign.plain_state(shadow))
    for name in names:
        layout.module(f"{name}.", f"heads.{HEADS[base.is_classifier][name]}.")
    return layout


# -- writing -----------------------------------------------------------------------------------------------------------


def write(shadow: Shadow, base: Anatomy) -> tuple[dict[str, Any], dict[str, Layout]]:
    """The content of ``shadow_config.json``, and the table of each file of tensors.

    Raises:
        CheckpointError: something that shadow-peft's format cannot express.
    """
    config = shadow.config
    values, layers = config.to_dict(), list(shadow.couplings.layers)
    sizes = {theirs: values[f"shadow_{mine}"] for theirs, mine in SIZES.items()}
    sizes["num_shadow_layers"] = sizes["num_shadow_layers"] or 1
    foreign.refuse_other_fields(config, FIXED, FORM)
    foreign.refuse_unreachable(base, FORM)
    if layers != list(range(1, len(base.blocks))):
        raise refuse(FORM, f"couplings at {layers}", "it couples every block but the first")
    if config.gate_rank == 1:
        raise refuse(FORM, "gate_rank=1", "it needs at least 2")
    if shadow.embed_projection is not None:
        raise refuse(FORM, "projected shared embeddings", "a shadow of another width has its own (embeddings='own')")
    if config.is_pretrained and not shadow.owns_embeddings:
        raise refuse(FORM, "a pretrained shadow that reads the base's embeddings", "there it reads its own")
    if not config.is_pretrained:
        if shadow.owns_embeddings:
            raise refuse(
                FORM, f"embeddings='own' in a shadow of form {config.shadow}", "it reads the base's embeddings"
            )
        foreign.refuse_other_backbone(shadow, foreign.mirror(base, FORM, {SIZES[k]: v for k, v in sizes.items()}), FORM)
    layouts, names = {WEIGHTS_FILE: _layout(shadow, base)}, list(HEADS[base.is_classifier])
    if shadow.heads:
        if not base.is_classifier and base.head.weight is base.embeddings.weight:
            raise refuse(FORM, "trained heads beside this base", "its head is one with its embeddings")
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
