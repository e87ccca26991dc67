"""`ShadowConfig`, the configuration of a shadow. Imports no torch, so that ``umbra --help`` is instant."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from umbra.config.dialects import (
    CONSTANTS,
    DIALECTS,
    STRENGTH,
    Dialect,
    DialectConstants,
    as_constants,
    check_choice,
    check_switch,
    explain_unknown_keys,
    is_finite,
    is_int,
    option,
)
from umbra.config.former_keys import advice_on, migrate
from umbra.errors import ConfigError, shown, unknown_key

LARGEST = 2**20  # of any size: a larger one is a typing error and would exceed any memory
LARGEST_USUAL_ALPHA = 4.0  # above it, α is probably meant as LoRA's, which is divided by the rank
CHOICES = {
    "dialect": ("umbra", "paper", "peft"),
    "init": (None, "auto", "random", "base"),
    "input_scale": (None, "none", "measured"),
    "embeddings": ("auto", "base", "own"),
}


@dataclass(frozen=True)
class ShadowConfig:
    """The configuration of a shadow: its network, its couplings with the base, and its losses.

    A field that is None takes the value of the `dialect`; `resolve` fills those in.

    Raises:
        ConfigError: a value outside its range, or an unknown key (the nearest known one is named).
    """

    dialect: Dialect = option(
        "umbra", "defaults of the fields that are not given: as published in shadow-peft (paper), PEFT's (peft), or "
        "the paper's architecture with hyperparameters from our ablations (umbra)"
    )  # fmt: skip
    rank: int | None = option(None, "R, the rank of the injection; default 64, paper 16, peft 8")
    gate_rank: int | None = option(None, "G, hidden width of gate and transform; default 10, peft the rank")
    alpha: float | None = option(
        None, "α, the factor on the injection (not divided by the rank, unlike LoRA's); default 16 / rank, paper and peft 0.1"
    )  # fmt: skip
    input_scale: Literal["none", "measured"] | None = option(
        None, "measured (default): each channel that the injection reads is divided by its root mean square on the base, measured "
        "at attach; none: unscaled (paper and peft)"
    )  # fmt: skip
    dropout: float | None = option(
        None, "dropout probability of the injection, in [0, 1); default 0, paper and peft 0.2"
    )
    auxiliary_loss_weight: float = option(0.05, "λ, the weight of the shadow's own loss; 0 runs no second head")
    auxiliary_loss_every: int = option(
        1, "k: the shadow's losses are computed on every k-th labelled token, from a random offset, and multiplied by k"
    )
    distillation_weight: float = option(
        0.0,
        "μ, the weight of KL(attached ‖ shadow) at the labelled tokens; it raises the acceptance rate of drafted tokens",
    )
    escalation: str | None = option(
        None, "text that the shadow answers alone to a request that exceeds it (records marked `escalate`); default [REMOTE] "
        "where the training data has such records"
    )  # fmt: skip

    shadow: str = option(
        "mirror",
        "the shadow's backbone: mirror (the base's own architecture; dense for MoE and hybrid bases), "
        "dense (Llama-style), or the path or hub id of a pretrained model",
    )
    shadow_num_hidden_layers: int | None = option(
        None, "S, layers of the shadow; default 1, or all layers of a pretrained one"
    )
    shadow_hidden_size: int | None = option(
        None, "width of the shadow; default the base's. A projection maps it to the base's"
    )
    shadow_intermediate_size: int | None = option(None, "feed-forward width of the shadow; default the base's")
    shadow_num_attention_heads: int | None = option(None, "attention heads of the shadow; default the base's")
    shadow_num_key_value_heads: int | None = option(None, "key-value heads of the shadow; default the base's")
    shadow_head_dim: int | None = option(None, "width of one attention head of the shadow; default the base's")
    init: Literal["auto", "random", "base"] | None = option(
        None, "initial weights of a mirrored shadow: random (paper and peft), base (copied blocks), auto (default: base if the "
        "shadow has the base's sizes, else random)"
    )  # fmt: skip
    init_layers: tuple[int, ...] | None = option(
        None,
        "init=base: the base's block that each of the shadow's is copied from, such as 0,1; default the first ones",
    )
    embeddings: Literal["auto", "base", "own"] = option(
        "auto", "input embeddings: base (shared, projected where widths differ), own (a table of the shadow's), "
        "auto (own for a pretrained shadow with another table than the base's, else base)"
    )  # fmt: skip
    train_heads: bool | None = option(
        None, "train copies of the task head for both paths; default: yes for classification, no for causal LM"
    )

    first_layer: int | float | None = option(
        None, "first block with an injection, or the share of the blocks below it, such as 0.67. Fewer coupled blocks make "
        "training cheaper; default 0.25, paper 1, peft 0"
    )  # fmt: skip
    layers: tuple[int, ...] | None = option(
        None, "the coupled blocks, in place of first_layer, such as 20,22,24; default all from first_layer on"
    )
    constants: DialectConstants = field(
        default_factory=DialectConstants,
        metadata={"help": "constants of the architecture that replace the dialect's, such as {down_init: normal}"},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.constants, DialectConstants):
            object.__setattr__(self, "constants", as_constants(self.constants))
        for name in ("rank", "gate_rank", "auxiliary_loss_every", *_sizes(self)):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or not 1 <= value <= LARGEST):
                raise ConfigError(f"{name} must be an integer of at least 1 and at most {LARGEST}, got {shown(value)}.")
        self._check_blocks()
        if self.alpha is not None and not is_finite(self.alpha):
            raise ConfigError(f"alpha must be a finite number, got {shown(self.alpha)}.")
        self._warn_about_alpha()
        if self.dropout is not None and (not is_finite(self.dropout) or not 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must lie in [0, 1), got {shown(self.dropout)}.")
        for name in ("auxiliary_loss_weight", "distillation_weight"):
            if not is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} must be a finite number ≥ 0, got {shown(getattr(self, name))}.")
        check_switch("train_heads", self.train_heads)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.escalation is not None and (not isinstance(self.escalation, str) or not self.escalation.strip()):
            raise ConfigError(
                f"escalation must be a text, such as '[REMOTE]' in quotation marks, got {shown(self.escalation)}."
            )
        self._check_backbone()

    def _check_blocks(self) -> None:
        first = self.first_layer
        if first is not None and not ((is_int(first) and first >= 0) or (isinstance(first, float) and 0 < first < 1)):
            raise ConfigError(
                f"first_layer must be an integer of at least 0, or a share between 0 and 1, got {shown(first)}."
            )
        for name in ("layers", "init_layers"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list | tuple) or not all(is_int(l) and l >= 0 for l in value):
                raise ConfigError(f"{name} must be a list of block numbers from 0 on, got {shown(value)}.")
            object.__setattr__(self, name, tuple(value))
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ConfigError(f"layers must be one or more blocks in ascending order, got {shown(self.layers)}.")
        if self.init_layers is not None and (
            self.init != "base" or len(self.init_layers) != (self.shadow_num_hidden_layers or 1)
        ):
            raise ConfigError(
                f"init_layers={list(self.init_layers)} copies one block for each of the shadow's: it needs init='base' and as "
                f"many blocks as shadow_num_hidden_layers, {self.shadow_num_hidden_layers or 1}."
            )

    def _check_backbone(self) -> None:
        if not isinstance(self.shadow, str) or not self.shadow:
            raise ConfigError(f"shadow must be mirror, dense, a path or a hub id; got {shown(self.shadow)}.")
        if not self.is_pretrained:
            return
        if given := [name for name in _sizes(self) if getattr(self, name) is not None]:
            raise ConfigError(f"A pretrained shadow has its own sizes: remove {', '.join(given)}.")
        if self.init == "base":
            raise ConfigError("init='base' copies blocks of the base, which a pretrained shadow does not need.")

    def _warn_about_alpha(self) -> None:
        """Warn about an alpha that was probably meant as LoRA's."""
        if self.alpha is None or self.alpha <= LARGEST_USUAL_ALPHA:
            return
        rank = self.rank or DIALECTS["umbra"]["rank"]
        if self.alpha != STRENGTH / rank:
            warnings.warn(
                f"alpha={self.alpha:g} multiplies the injection directly; LoRA's alpha is divided by r. For the strength of "
                f"LoRA's alpha={self.alpha:g} at rank {rank}, write alpha={self.alpha / rank:g}.",
                stacklevel=5,  # the caller of ShadowConfig(…)
            )

    @property
    def is_pretrained(self) -> bool:
        """Whether `shadow` is the path or hub id of a checkpoint."""
        return self.shadow not in ("mirror", "dense")

    def resolve(self) -> "ShadowConfig":
        """Return this configuration with each None that the dialect decides filled in."""
        defaults = DIALECTS[self.dialect]
        rank = self.rank or defaults["rank"]
        by_rank = {"gate_rank": rank, "alpha": STRENGTH / rank}
        filled = {k: by_rank[k] if v is None else v for k, v in defaults.items() if getattr(self, k) is None}
        constants = {k: v for k, v in CONSTANTS[self.dialect].items() if getattr(self.constants, k) is None}
        return dataclasses.replace(self, constants=dataclasses.replace(self.constants, **constants), **filled)

    def coupled(self, num_layers: int) -> tuple[int, ...]:
        """Return the coupled blocks of a base with ``num_layers`` blocks; the configuration must be resolved.

        Raises:
            ConfigError: a block that the base does not have.
        """
        assert self.first_layer is not None
        first = round(self.first_layer * num_layers) if isinstance(self.first_layer, float) else self.first_layer
        if self.layers is None and first >= num_layers:
            raise ConfigError(f"first_layer={self.first_layer}, but the base's blocks are 0 to {num_layers - 1}.")
        layers = tuple(range(first, num_layers)) if self.layers is None else self.layers
        if layers[-1] >= num_layers:
            raise ConfigError(f"layers={list(layers)}, but the base's blocks are 0 to {num_layers - 1}.")
        return layers

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field name, for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShadowConfig":
        """Return the configuration of `to_dict`'s result; missing keys take their defaults, former keys are migrated.

        Raises:
            ConfigError: an unknown or removed key, or a value outside its range.
        """
        return cls(**migrate({str(key): value for key, value in values.items()}))

    def __getattr__(self, name: str) -> NoReturn:
        """Raise an AttributeError, which explains what PEFT's get_peft_model would read."""
        advice = (
            ": get_peft_model is PEFT's; write umbra.attach(base, config)" if name == "base_model_name_or_path" else ""
        )
        raise AttributeError(f"ShadowConfig has no {name}{advice}.")

    @classmethod
    def keys(cls) -> list[str]:
        """Return the names of all fields."""
        return [f.name for f in dataclasses.fields(cls)]


def check_kind(config: object) -> ShadowConfig:
    """Return the argument if it is a `ShadowConfig`.

    Raises:
        ConfigError: it is not; it may be one of PEFT's configurations.
    """
    if not isinstance(config, ShadowConfig):
        kind = type(config)
        raise ConfigError(
            f"A shadow needs an umbra.ShadowConfig, got {kind.__module__}.{kind.__qualname__}. Adapters of other kinds are not "
            "combined with a shadow: merge them into the base first (merge_and_unload() in PEFT)."
        )
    return config


def _sizes(config: ShadowConfig) -> list[str]:
    return [f.name for f in dataclasses.fields(config) if f.name.startswith("shadow_")]


explain_unknown_keys(
    ShadowConfig, lambda key, value: advice_on(key, value) or unknown_key(key, ShadowConfig.keys(), "ShadowConfig")
)
