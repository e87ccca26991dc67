"""Adapters of PEFT's Shadow tuner: ``adapter_config.json`` with ``peft_type`` SHADOW, ``adapter_model.safetensors``.

PEFT wraps each targeted block with the injection before it and the update after it. The targeted blocks must be contiguous;
all others run as in the bare base. ``target_modules`` alone decides which blocks are coupled: ``layers_to_transform`` never
selects any (0.21 looks for an index inside a block's name and ignores exact names).
"""

import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from umbra.adapters.files import Values
from umbra.adapters.interop import foreign
from umbra.adapters.interop.foreign import Foreign, refusal
from umbra.adapters.interop.layout import Layout
from umbra.base import architectures
from umbra.base.architectures import Architecture
from umbra.config import CONSTANTS, ShadowConfig
from umbra.errors import CheckpointError, ConfigError
from umbra.shadow.network import Shadow

PACKAGE = "peft"
CONFIG_FILE, WEIGHTS_FILE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MODEL, BACKBONE, PROJECTION, HEAD = (
    "base_model.model.",
    "base_model.shadow_backbone.default.",
    "base_model.shadow_projection.default.",
    "base_model.shadow_head.default.",
)
SIZES = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_intermediate_size", "shadow_num_attention_heads")
FIELDS = {"r", "shadow_alpha", "shadow_dropout", "shadow_model", "share_embeddings", "update_hidden_size", *SIZES}
FIELDS |= {"auxiliary_loss_weight", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
# These do not describe the model: auto_mapping names classes, which are never imported.
KNOWN = FIELDS | {"peft_type", "task_type", "base_model_name_or_path", "revision", "modules_to_save"}
KNOWN |= {"auto_mapping", "inference_mode", "init_weights", "peft_version"}
FIXED = {name: CONSTANTS["peft"][name] for name in ("norm", "activation", "bias", "dropout_position")}
HEADS = ("classifier", "score")  # the modules that PEFT saves for any classifier


class Adapter(Foreign):
    """An adapter folder of PEFT's Shadow tuner."""

    @classmethod
    def read(cls, path: Path, values: Values) -> "Adapter":
        """Read the folder, whose ``adapter_config.json`` holds ``values``.

        Raises:
            CheckpointError: the folder is damaged, pickled, or of a task that Umbra does not support.
        """
        foreign.check_keys(values, path / CONFIG_FILE, KNOWN)
        weights = foreign.read_tensors(path, WEIGHTS_FILE, PICKLED)
        task = values.get("task_type")
        if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
            raise CheckpointError(f"{path / CONFIG_FILE}: task_type={task!r}, Umbra supports CAUSAL_LM and SEQ_CLS.")
        head = weights.get(f"{HEAD}weight")
        return cls(
            path, path / CONFIG_FILE, values, {WEIGHTS_FILE: weights}, base_name=values.get("base_model_name_or_path"),
            base_options={"revision": str(values["revision"])} if values.get("revision") else {},
            num_labels=len(head) if task == "SEQ_CLS" and head is not None and head.ndim else None,
        )  # fmt: skip

    def configure(self, base: Architecture) -> tuple[ShadowConfig, PretrainedConfig]:
        """Return the shadow's configuration, and that of its backbone; see `Foreign.configure`."""
        values, weights = self.values, self.weights[WEIGHTS_FILE]
        task = values.get("task_type")
        if task is not None and (task == "SEQ_CLS") != base.is_classifier:
            raise CheckpointError(
                f"{self.path} is an adapter for {task}, the base given is a {type(base.model).__name__}."
            )
        foreign.check_sizes(values, ("r", "update_hidden_size", *SIZES), weights)
        path, shares = values.get("shadow_model", "mirror"), values.get("share_embeddings", True)
        sizes: dict[str, Any] = {name: values.get(name) for name in SIZES}
        if not isinstance(shares, bool):
            raise ConfigError(f"share_embeddings must be true or false, got {shares!r}.")
        shares &= path == "mirror" and sizes["shadow_hidden_size"] in (None, base.config.hidden_size)
        blocks, saves_head = self._blocks(base), self._saves_head(base)
        config = ShadowConfig(
            dialect="peft",
            rank=values.get("r", 8),
            gate_rank=values.get("update_hidden_size") or None,
            alpha=foreign.not_null(values, "shadow_alpha", 0.1),
            dropout=foreign.not_null(values, "shadow_dropout", 0.2),
            auxiliary_loss_weight=values.get("auxiliary_loss_weight", 0.05),
            shadow="./dense" if path == "dense" else path,  # a folder of that name
            embeddings="base" if shares else "own",
            train_heads=task == "SEQ_CLS" or saves_head,
            layers=None if len(blocks) == len(base.blocks) else blocks,
            **sizes,
        )
        if not config.is_pretrained:
            return config, foreign.mirror(base, PACKAGE, {k.removeprefix("shadow_"): v for k, v in sizes.items()})
        backbone, projected = foreign.explicit(config.shadow)
        if projected and backbone.hidden_size == base.config.hidden_size:
            raise CheckpointError(f"{self.file}: {path!r} projects between equal widths, which Umbra's shadows do not.")
        return config, backbone

    def _blocks(self, base: Architecture) -> tuple[int, ...]:
        """The indices of the blocks that PEFT wraps.

        Raises:
            CheckpointError: there are none, or they are not contiguous, which PEFT cannot run either.
        """
        prefix = architectures.name_of(base.model, base.blocks)
        targets = [l for l in range(len(base.blocks)) if _targets(self.values, f"{prefix}.{l}")]
        if not targets or targets != list(range(targets[0], targets[-1] + 1)):
            raise CheckpointError(
                f"{self.file} targets the blocks {targets} of this base; PEFT couples one contiguous run of blocks. Is this the "
                "base that the adapter was trained on?"
            )
        return tuple(targets)

    def _saves_head(self, base: Architecture) -> bool:
        """Whether the task head is among ``modules_to_save``.

        Raises:
            CheckpointError: another module of the base is, which Umbra leaves alone.
        """
        names = _strings(self.values, "modules_to_save")
        saved = {n for n, _ in base.model.named_modules() if any(n.endswith(name) for name in names)}
        for name in sorted(saved - {base.head_name}):
            raise CheckpointError(
                f"{self.file}: modules_to_save holds a trained {name!r} of the base; Umbra trains heads only."
            )
        return bool(saved)

    def layouts(self, shadow: Shadow, base: Architecture) -> dict[str, Layout]:
        """Return the table of each file of tensors by file name."""
        layout = _layout(shadow, base)
        if shadow.heads:
            _heads(layout, base, self.values.get("task_type") == "SEQ_CLS", self._saves_head(base))
        return {WEIGHTS_FILE: layout}


def _layout(shadow: Shadow, base: Architecture) -> Layout:
    """The table of all tensors but the task heads."""
    layout = Layout(foreign.plain_state(shadow))
    layout.module(BACKBONE, "backbone.")
    if not shadow.owns_embeddings:
        foreign.add_unused_table(layout, BACKBONE, base)
    if shadow.projection is not None:
        layout.same(f"{PROJECTION}weight", "projection.weight")
    layers, blocks = shadow.couplings.layers, architectures.name_of(base.model, base.blocks)
    for l in layers:
        block = f"{MODEL}{blocks}.{l}.shadow_"
        for matrix in ("down", "up"):
            layout.same(f"{block}{matrix}.default.weight", f"couplings.injections.{l}.{matrix}.weight")
        for name, zeros in foreign.unused_update(base, shadow.config).items():
            part, _, suffix = name.replace("transform.3", "transform.2").partition(".")  # PEFT has no dropout there
            stored = f"{block}update_{part}.default.{suffix}"
            if l == layers[-1]:
                layout.unused(stored, zeros)
            else:
                layout.same(stored, f"couplings.updates.{l}.{name}")
    return layout


def _heads(layout: Layout, base: Architecture, own_shadow_head: bool, saved: bool) -> None:
    """Add the task heads: the shadow of a classifier has its own; both paths of a language model share the saved one."""
    attached = f"{MODEL}{base.head_name}."
    if own_shadow_head:
        layout.module(HEAD, "heads.shadow.")
        if saved:
            layout.module(attached, "heads.attached.")
    else:
        layout.module(attached, "heads.attached.", "heads.shadow.")


# -- which blocks ------------------------------------------------------------------------------------------------------


def _targets(values: Values, name: str) -> bool:
    """Whether PEFT wraps the block with this name."""
    if _matches(values.get("exclude_modules"), name, "exclude_modules"):
        return False
    targets: object = values.get("target_modules")
    if targets is None or isinstance(targets, str):
        return targets is None or _matches(targets, name, "target_modules")
    chosen = values.get("layers_to_transform") not in (None, [])  # then a name's end alone matches nothing
    return name in _strings(values, "target_modules") or (not chosen and _matches(targets, name, "target_modules"))


def _matches(patterns: object, name: str, key: str) -> bool:
    """Whether a module's name matches an entry ``key``: a regular expression, or a list of names or ends of names."""
    if not isinstance(patterns, str):
        return any(name == p or name.endswith(f".{p}") for p in _strings({key: patterns}, key))
    if re.search(r"\)[*+?{]|\\[1-9]", patterns) or len(re.findall(r"[*+{]", patterns)) > 4:
        raise ConfigError(f"{key}={patterns!r} is too complex: name the blocks in a list.")
    try:
        return re.fullmatch(patterns, name) is not None
    except re.error as error:
        raise ConfigError(f"{key}={patterns!r} is no valid regular expression: {error}") from error


def _strings(values: Values, key: str) -> list[str]:
    names: object = values.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key} must be a list of names, got {names!r}.")
    return names


# -- writing -----------------------------------------------------------------------------------------------------------


def write(shadow: Shadow, base: Architecture) -> tuple[Values, dict[str, Layout]]:
    """Return the content of ``adapter_config.json``, and the table of each file of tensors by file name.

    Args:
        shadow: the shadow.
        base: the parts of its base.

    Raises:
        CheckpointError: PEFT's format cannot express this shadow.
    """
    config = shadow.config
    layers = list(shadow.couplings.layers)
    foreign.refuse_other_fields(config, FIXED, PACKAGE)
    foreign.refuse_unreachable(base, PACKAGE)
    if layers != list(range(layers[0], layers[-1] + 1)):
        raise refusal(PACKAGE, f"couplings at {layers}", "its coupled blocks are one contiguous run")
    if shadow.embed_projection is not None:
        raise refusal(
            PACKAGE, "projected shared embeddings", "a shadow of another width has its own (embeddings='own')"
        )
    if config.is_pretrained and not shadow.owns_embeddings:
        raise refusal(PACKAGE, "a pretrained shadow that reads the base's embeddings", "there it reads its own")
    if not config.is_pretrained:
        sizes = {name.removeprefix("shadow_"): config.to_dict()[name] for name in SIZES}
        foreign.refuse_other_backbone(shadow, foreign.mirror(base, PACKAGE, sizes), PACKAGE)
    layout = _layout(shadow, base)
    if shadow.heads:
        _heads(layout, base, base.is_classifier, saved=True)
    elif base.is_classifier:
        for name, value in foreign.head_weights(base.head).items():
            layout.unused(f"{MODEL}{base.head_name}.{name}", value)
            layout.unused(f"{HEAD}{name}", value)
    trained = [base.head_name] if shadow.heads else None
    return {
        "peft_type": "SHADOW",
        "task_type": "SEQ_CLS" if base.is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": base.model.name_or_path or None,
        "inference_mode": True,
        "r": config.rank,
        "shadow_alpha": config.alpha,
        "shadow_dropout": config.dropout,
        "shadow_model": config.shadow if config.is_pretrained else "mirror",
        **{name: config.to_dict()[name] for name in SIZES},
        "share_embeddings": not shadow.owns_embeddings,
        "update_hidden_size": config.gate_rank,
        "auxiliary_loss_weight": config.auxiliary_loss_weight,
        "target_modules": [f"{architectures.name_of(base.model, base.blocks)}.{l}" for l in layers],
        "modules_to_save": list(HEADS) if base.is_classifier else trained,
    }, {WEIGHTS_FILE: layout}
