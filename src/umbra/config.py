"""What a user sets: `ShadowConfig`, the whole of the method. No torch in here, so that ``umbra --help`` is instant."""

import dataclasses
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

from umbra.errors import ConfigError, shown, unknown_key

Dialect = Literal["umbra", "paper", "peft"]
LARGEST = 2**20  # of any size: what lies beyond is a slip of the pen, and would fill any memory
LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which the shadow computes

# What a field left at None means in each of the two published dialects, and in ours: the paper's, with what measured best.
PAPER = {
    "rank": 16,
    "gate_rank": 10,
    "alpha": 0.1,
    "channel_scale": "none",
    "dropout": 0.2,
    "init": "random",
    "first_layer": 1,
    "norm": True,
    "activation": "silu",
    "bias": False,
    "dropout_position": "rank",
    "down_init": "normal",
}
STRENGTH = 16.0  # α · rank, where α is not given
DIALECTS: dict[str, dict[str, Any]] = {  # where None stands, the rank decides
    "umbra": {
        **PAPER,
        "rank": 64,
        "alpha": None,
        "channel_scale": "measured",
        "dropout": 0.0,
        "init": "auto",
        "first_layer": 0.25,
        "down_init": "scaled",
    },
    "paper": PAPER,
    "peft": {
        **PAPER,
        "rank": 8,
        "gate_rank": None,
        "first_layer": 0,
        "norm": False,
        "activation": "gelu",
        "bias": True,
        "dropout_position": "delta",
        "down_init": "linear",
    },
}


def option(default: Any, text: str) -> Any:
    """A dataclass field with its explanation, which is also the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ShadowConfig:
    """The shadow: what it is made of, how it is coupled to the base, what it is trained on.

    A field that is None takes the value of the `dialect`; `resolve` fills those in.

    Raises:
        ConfigError: a value outside its range, or an unknown key (the nearest known one is named).
    """

    dialect: Dialect = option(
        "umbra", "what a field that is not given is: as published in shadow-peft (paper) or by PEFT's ShadowConfig (peft), or "
        "umbra, the paper's form with what measured best (docs/LOG.md)"
    )  # fmt: skip
    rank: int | None = option(None, "R, the rank of the injection; default 64, paper 16, peft 8")
    gate_rank: int | None = option(None, "G, hidden width of gate and transform; default 10, peft the rank")
    alpha: float | None = option(
        None, "α, the strength of the injection; default 16 / rank, so that a step moves as far at any rank; paper and peft 0.1"
    )  # fmt: skip
    channel_scale: Literal["none", "measured"] | None = option(
        None, "measured (default; paper and peft none): each channel that the injection reads is divided by its own size, "
        "measured on the base at attach, so that the few large ones do not drown the rest"
    )  # fmt: skip
    backbone_rate: float = option(
        1.0, "factor on the learning rate of the shadow's backbone, in our trainers; the couplings keep the rate itself"
    )
    dropout: float | None = option(
        None, "dropout probability of the injection, in [0, 1); default 0, paper and peft 0.2"
    )
    auxiliary_loss_weight: float = option(0.05, "λ, the weight of the shadow's own loss; 0 runs no second head")
    auxiliary_loss_every: int = option(
        1, "k: the shadow's own losses read every k-th labelled token, from a random one on, and weigh it k times"
    )
    distillation_weight: float = option(
        0.0, "μ, the weight of KL(attached ‖ shadow) at the labelled tokens: a shadow that agrees drafts well"
    )
    distillation_schedule: Literal["constant", "rise", "fall"] = option(
        "constant", "μ in the course of a training: constant, rise (from 0 to μ) or fall (from μ to 0); our trainers keep the "
        "share that is done in model.progress, a loop of your own has to"
    )  # fmt: skip
    escalation: str | None = option(
        None, "what the shadow answers by itself to a request that is beyond it, and was marked `escalate` in the training "
        "data; default [REMOTE] where some are"
    )  # fmt: skip

    shadow: str = option(
        "mirror",
        "the shadow's backbone: mirror (the base's own architecture; dense for MoE and hybrid bases), "
        "dense (Llama-style), or the path or hub id of a pretrained model",
    )
    shadow_num_hidden_layers: int | None = option(
        None, "S, layers of the shadow; default 1, or all of a pretrained one"
    )
    shadow_hidden_size: int | None = option(None, "width of the shadow; default the base's. A projection bridges them")
    shadow_intermediate_size: int | None = option(None, "feed-forward width of the shadow; default the base's")
    shadow_num_attention_heads: int | None = option(None, "attention heads of the shadow; default the base's")
    shadow_num_key_value_heads: int | None = option(None, "key-value heads of the shadow; default the base's")
    shadow_head_dim: int | None = option(None, "width of one attention head of the shadow; default the base's")
    init: Literal["auto", "random", "base"] | None = option(
        None, "initial weights of a mirrored shadow: random (paper and peft), base (copied blocks), auto (default: base for a "
        "shadow of the base's sizes, else random)"
    )  # fmt: skip
    init_layers: tuple[int, ...] | None = option(
        None, "init=base: the block that is copied for each of the shadow's, such as 0,1; default the first ones"
    )
    init_scale: float = option(
        0.3,
        "init=base: factor on the copied final norm, which was made for the last block: at 1 the shadow is far too sure",
    )
    embeddings: Literal["auto", "base", "own"] = option(
        "auto", "input embeddings: base (shared, projected where widths differ), own (a table of the shadow's), "
        "auto (own for a pretrained shadow with another table than the base's, else base)"
    )  # fmt: skip
    train_heads: bool | None = option(
        None, "train copies of the task head for both paths; default: yes for classification, no for causal LM"
    )

    first_layer: int | float | None = option(
        None, "first block with an injection; or the share of the blocks below it, such as 0.67: the fewer are coupled, the "
        "cheaper is training; default 0.25, paper 1, peft 0"
    )  # fmt: skip
    layers: tuple[int, ...] | None = option(
        None, "the coupled blocks, in place of first_layer, such as 20,22,24; default all from first_layer on"
    )
    update: Literal["gated", "ungated", "none"] = option(
        "gated", "for ablations: the state takes all of the transform (ungated), or stays s⁰ at every block (none)"
    )
    norm: bool | None = option(None, "one shared LayerNorm before gate and transform; default yes, peft no")
    activation: Literal["silu", "gelu"] | None = option(
        None, "activation of gate and transform; default silu, peft gelu"
    )
    bias: bool | None = option(None, "biases in gate and transform; default no, peft yes")
    dropout_position: Literal["rank", "delta"] | None = option(
        None, "dropout after W_down and inside the transform (rank, default) or on h − s before W_down (delta, peft)"
    )
    down_init: Literal["scaled", "normal", "linear"] | None = option(
        None, "W_down starts from N(0, 3/√D), D the base's width (scaled, default), N(0, 0.02) (normal, paper) or nn.Linear's "
        "own (linear, peft)"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("rank", "gate_rank", "auxiliary_loss_every", *(n for n in self.keys() if n.startswith("shadow_"))):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or not 1 <= value <= LARGEST):
                raise ConfigError(f"{name} must be an integer of at least 1 and at most {LARGEST}, got {shown(value)}.")
        first = self.first_layer
        if first is not None and not ((_is_int(first) and first >= 0) or (isinstance(first, float) and 0 < first < 1)):
            raise ConfigError(
                f"first_layer must be an integer of at least 0, or a share between 0 and 1, got {shown(first)}."
            )
        for name in ("layers", "init_layers"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list | tuple) or not all(_is_int(l) and l >= 0 for l in value):
                raise ConfigError(f"{name} must be a list of block numbers from 0 on, got {shown(value)}.")
            object.__setattr__(self, name, tuple(value))
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ConfigError(f"layers must be one or more blocks in ascending order, got {shown(self.layers)}.")
        if self.init_layers is not None and (
            self.init != "base" or len(self.init_layers) != (self.shadow_num_hidden_layers or 1)
        ):
            raise ConfigError(
                f"init_layers={list(self.init_layers)} copies a block for each of the shadow's: it needs init='base' and as "
                f"many as shadow_num_hidden_layers, {self.shadow_num_hidden_layers or 1}."
            )
        if not _is_finite(self.init_scale) or self.init_scale <= 0:
            raise ConfigError(f"init_scale must be a finite number > 0, got {shown(self.init_scale)}.")
        if not _is_finite(self.backbone_rate) or self.backbone_rate <= 0:
            raise ConfigError(f"backbone_rate must be a finite number > 0, got {shown(self.backbone_rate)}.")
        if self.alpha is not None and not _is_finite(self.alpha):
            raise ConfigError(f"alpha must be a finite number, got {shown(self.alpha)}.")
        if self.dropout is not None and (not _is_finite(self.dropout) or not 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must lie in [0, 1), got {shown(self.dropout)}.")
        for name in ("auxiliary_loss_weight", "distillation_weight"):
            if not _is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} must be a finite number ≥ 0, got {shown(getattr(self, name))}.")
        for name in ("train_heads", "norm", "bias"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{name} must be true, false or null, got {shown(getattr(self, name))}.")
        choices = {
            "dialect": tuple(DIALECTS),
            "distillation_schedule": ("constant", "rise", "fall"),
            "init": (None, "auto", "random", "base"),
            "channel_scale": (None, "none", "measured"),
            "update": ("gated", "ungated", "none"),
            "embeddings": ("auto", "base", "own"),
            "activation": (None, "silu", "gelu"),
            "dropout_position": (None, "rank", "delta"),
            "down_init": (None, "scaled", "normal", "linear"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                words = ", ".join(str(a) for a in allowed if a is not None)
                raise ConfigError(f"{name} must be one of {words}; got {shown(getattr(self, name))}.")
        if self.escalation is not None and (not isinstance(self.escalation, str) or not self.escalation.strip()):
            raise ConfigError(
                f"escalation must be a text, such as '[REMOTE]' in quotation marks, got {shown(self.escalation)}."
            )
        if not isinstance(self.shadow, str) or not self.shadow:
            raise ConfigError(f"shadow must be mirror, dense, a path or a hub id; got {shown(self.shadow)}.")
        if self.is_pretrained:
            sizes = [n for n in self.keys() if n.startswith("shadow_") and getattr(self, n) is not None]
            if sizes:
                raise ConfigError(f"A pretrained shadow brings its own sizes: remove {', '.join(sizes)}.")
            if self.init == "base":
                raise ConfigError("init='base' copies blocks of the base, which a pretrained shadow does not need.")

    @property
    def is_pretrained(self) -> bool:
        """Whether `shadow` names a checkpoint rather than a form."""
        return self.shadow not in ("mirror", "dense")

    def resolve(self) -> "ShadowConfig":
        """This configuration with each None of the dialect filled in."""
        own = DIALECTS[self.dialect]
        rank = self.rank or own["rank"]
        by_rank = {"gate_rank": rank, "alpha": STRENGTH / rank}
        filled = {k: by_rank[k] if v is None else v for k, v in own.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **filled)

    def coupled(self, num_layers: int) -> tuple[int, ...]:
        """The blocks of a base of ``num_layers`` that carry an injection; of a resolved configuration.

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
        """Plain values by field name, for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShadowConfig":
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            ConfigError: an unknown key, or a value outside its range.
        """
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def keys(cls) -> list[str]:
        """The names of all fields."""
        return [f.name for f in dataclasses.fields(cls)]


def check_kind(config: Any) -> ShadowConfig:
    """The same configuration.

    Raises:
        ConfigError: it is none, but perhaps one of PEFT's.
    """
    if not isinstance(config, ShadowConfig):
        kind = type(config)
        raise ConfigError(
            f"A shadow needs an umbra.ShadowConfig, got {kind.__module__}.{kind.__qualname__}. Adapters of other kinds are not "
            "combined with a shadow: merge them into the base first (merge_and_unload() in PEFT)."
        )
    return config


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


def name_the_nearest_key(cls: Any) -> None:
    """Make ``cls(rnk=8)`` raise a ConfigError that names ``rank``, instead of Python's bare TypeError."""
    plain_init = cls.__init__

    @wraps(plain_init)
    def init(self, /, **values):
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_key(key, known, cls.__name__)
        plain_init(self, **values)

    cls.__init__ = init


name_the_nearest_key(ShadowConfig)
