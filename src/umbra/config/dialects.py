"""The dialects: defaults of the fields that a configuration leaves open, and the constants of each architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, TypeGuard

from umbra.errors import ConfigError, shown, unknown_key

Dialect = Literal["umbra", "paper", "peft"]
LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which the shadow computes
STRENGTH = 16.0  # α · rank in the dialect umbra, where α is not given

# What a field left at None means in each dialect. In `umbra`, None stands where the rank decides.
_PAPER = {
    "rank": 16,
    "gate_rank": 10,
    "alpha": 0.1,
    "input_scale": "none",
    "dropout": 0.2,
    "init": "random",
    "first_layer": 1,
}
DIALECTS: dict[str, dict[str, Any]] = {
    "umbra": {
        **_PAPER,
        "rank": 64,
        "alpha": None,
        "input_scale": "measured",
        "dropout": 0.0,
        "init": "auto",
        "first_layer": 0.25,
    },
    "paper": _PAPER,
    "peft": {**_PAPER, "rank": 8, "gate_rank": None, "first_layer": 0},
}
_PAPER_CONSTANTS = {
    "norm": True,
    "activation": "silu",
    "bias": False,
    "dropout_position": "rank",
    "down_init": "normal",
    "init_scale": 0.3,
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "umbra": {**_PAPER_CONSTANTS, "down_init": "scaled"},
    "paper": _PAPER_CONSTANTS,
    "peft": {
        **_PAPER_CONSTANTS,
        "norm": False,
        "activation": "gelu",
        "bias": True,
        "dropout_position": "delta",
        "down_init": "linear",
    },
}


CHOICES = {
    "activation": (None, "silu", "gelu"),
    "dropout_position": (None, "rank", "delta"),
    "down_init": (None, "scaled", "normal", "linear"),
}


def option(default: object, text: str) -> Any:
    """Return a dataclass field with a help text, which its flag also shows."""
    return field(default=default, metadata={"help": text})


def check_switch(name: str, value: object) -> None:
    """Raise a ConfigError unless a field is true, false or None."""
    if not isinstance(value, bool | None):
        raise ConfigError(f"{name} must be true, false or null, got {shown(value)}.")


def check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Raise a ConfigError unless a field has one of the allowed values."""
    if value not in allowed:
        words = ", ".join(choice for choice in allowed if choice is not None)
        raise ConfigError(f"{name} must be one of {words}; got {shown(value)}.")


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


@dataclass(frozen=True)
class DialectConstants:
    """The constants of a dialect: parts of the architecture that a published form fixes.

    A field that is None takes the value of the dialect.

    Raises:
        ConfigError: a value outside its range, or an unknown key (the nearest known one is named).
    """

    norm: bool | None = option(None, "one shared LayerNorm before gate and transform; default yes, peft no")
    activation: Literal["silu", "gelu"] | None = option(
        None, "activation of gate and transform; default silu, peft gelu"
    )
    bias: bool | None = option(None, "biases in gate and transform; default no, peft yes")
    dropout_position: Literal["rank", "delta"] | None = option(
        None, "dropout after W_down and inside the transform (rank, default) or on h − s before W_down (delta, peft)"
    )
    down_init: Literal["scaled", "normal", "linear"] | None = option(
        None,
        "initial W_down: N(0, 3/√D) for a base of width D (scaled, default), N(0, 0.02) (normal, paper) or nn.Linear's own "
        "(linear, peft)",
    )
    init_scale: float | None = option(
        None, "init=base: factor on the copied final norm; default 0.3. At 1 the shadow's logits start out overconfident"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("norm", "bias"):
            check_switch(name, getattr(self, name))
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.init_scale is not None and (not is_finite(self.init_scale) or self.init_scale <= 0):
            raise ConfigError(f"init_scale must be a finite number > 0, got {shown(self.init_scale)}.")


CONSTANT_NAMES = tuple(f.name for f in dataclasses.fields(DialectConstants))


def as_constants(value: object) -> DialectConstants:
    """Return the constants that a mapping holds, as JSON and YAML have them; None stands for the dialect's.

    Raises:
        ConfigError: not a mapping, an unknown key, or a value outside its range.
    """
    if isinstance(value, DialectConstants):
        return value
    if value is None:
        return DialectConstants()
    if not isinstance(value, Mapping):
        raise ConfigError(f"constants must be a mapping such as {{norm: false}}, got {shown(value)}.")
    return DialectConstants(**{str(key): entry for key, entry in value.items()})


def explain_unknown_keys(cls: type, explain: Callable[[str, object], ConfigError]) -> None:
    """Make ``cls(rnk=8)`` raise a ConfigError in place of Python's bare TypeError.

    Args:
        cls: a dataclass.
        explain: returns the error for a key that the class lacks and its value.
    """
    plain_init: Callable[..., None] = cls.__init__
    known = {f.name for f in dataclasses.fields(cls)}

    @wraps(plain_init)
    def init(self: object, /, **values: object) -> None:
        for key, value in values.items():
            if key not in known:
                raise explain(key, value)
        plain_init(self, **values)

    setattr(cls, "__init__", init)  # noqa: B010 (a type checker refuses the plain assignment)


explain_unknown_keys(DialectConstants, lambda key, _: unknown_key(key, CONSTANT_NAMES, "constants"))
