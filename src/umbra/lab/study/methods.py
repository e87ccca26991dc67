"""What is compared: the bare base, any method of PEFT, Umbra attached and detached, and the shadow's architecture alone.

A method is a kind and its own fields: of `ShadowConfig`, or of the PEFT configuration that its ``peft_type`` names.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from umbra.config import ShadowConfig
from umbra.errors import ConfigError, shown, unknown_key
from umbra.lab.bench.base import Base
from umbra.lab.bench.methods import trainable
from umbra.lab.study.ablations import attach_ablated, read_update
from umbra.options import check_types, names
from umbra.training.train import leave_the_pair

ATTACHED, DETACHED = "attached", "detached"
FIT = 0.05  # by which trainable parameters may differ where they are matched
SMALL = 16  # a value of the field that sets a method's size, at which parameters are counted


@dataclass(frozen=True)
class Kind:
    """A family of methods.

    Args:
        defaults: of its fields.
        size: the field by which parameters are matched; None where nothing is trained or that cannot be done.
        modes: what can be scored of it.
    """

    about: str
    defaults: dict[str, Any] = field(default_factory=dict)
    size: str | None = None
    modes: tuple[str, ...] = (ATTACHED,)


ALL: dict[str, Any] = {"target_modules": "all-linear"}
KINDS = {
    "base": Kind("the bare base, untrained"),
    "lora": Kind("PEFT's LoRA on all linear layers, alpha twice the rank", {"peft_type": "LORA", **ALL}, "r"),
    "dora": Kind("the same, with weights decomposed", {"peft_type": "LORA", **ALL, "use_dora": True}, "r"),
    "lily": Kind(
        "PEFT's Lily on all linear layers", {"peft_type": "LILY", **ALL, "stride_A": 10, "num_B": 3, "scaling": 4.0}, "r"
    ),
    "peft_shadow": Kind("PEFT's ShadowConfig", {"peft_type": "SHADOW"}, "shadow_intermediate_size"),
    "peft": Kind("any configuration of PEFT, by its peft_type"),
    "umbra": Kind("Umbra", {}, "shadow_intermediate_size", (ATTACHED, DETACHED)),
    "alone": Kind("the shadow's architecture, trained without the base", {}, None, (DETACHED,)),
}  # fmt: skip
SHADOWS = ("umbra", "alone")


@dataclass(frozen=True)
class MethodOptions:
    """One method of a study: its kind, and fields of the kind's own.

    Args:
        family: the methods of one family are points of one curve of scores over trainable parameters.
        learning_rate: rates to choose among, in place of the study's.
        training: TrainingArguments over the study's and the task's.
        modes: what is scored; default all that the kind has.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    learning_rate: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ()

    @property
    def is_trained(self) -> bool:
        return self.kind != "base"

    @property
    def is_pretrained(self) -> bool:
        """Whether it starts from a shadow in a folder."""
        return self.kind in SHADOWS and ShadowConfig.from_dict(read_update(self.fields)[0]).is_pretrained

    @property
    def is_fixed(self) -> bool:
        """Whether its size is given, lies in such a folder, or is that of the base's blocks."""
        size = KINDS[self.kind].size
        return size is None or size in self.fields or self.is_pretrained or self.fields.get("init") == "base"

    def sized(self, value: int) -> dict[str, Any]:
        """Its fields, with the one that sets its size."""
        size = KINDS[self.kind].size
        return {**self.fields, **({size: value} if size else {})}


def read_method(name: str, values: dict[str, Any]) -> MethodOptions:
    """From a study's mapping: fields that are not this dataclass's own are the kind's.

    Raises:
        ConfigError: an unknown kind, field or mode.
    """
    if not isinstance(values, dict) or "kind" not in values:
        raise ConfigError(f"method {name} needs a kind, one of {', '.join(KINDS)}: such as {{kind: lora, r: 8}}.")
    own = {k: v for k, v in values.items() if k in names(MethodOptions) and k != "fields"}
    fields = {str(k): v for k, v in values.items() if k not in own}
    if not isinstance(own["kind"], str) or own["kind"] not in KINDS:
        raise unknown_key(str(own["kind"]), KINDS, f"the kinds of method ({name})")
    kind = KINDS[own["kind"]]
    own = {k: [v] if k in ("modes", "learning_rate") and not isinstance(v, list) else v for k, v in own.items()}
    try:
        check_types(MethodOptions, {**own, "modes": tuple(own.get("modes", ()))})
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from error
    if "learning_rate" in own.get("training", {}):
        raise ConfigError(
            f"method {name}: give learning_rate beside training, not in it: the search would override it."
        )
    modes = tuple(own.get("modes") or kind.modes)
    if any(mode not in kind.modes for mode in modes):
        raise ConfigError(
            f"method {name}: modes are {', '.join(kind.modes)} for {own['kind']}, got {', '.join(map(shown, modes))}."
        )
    if own["kind"] in SHADOWS:
        ShadowConfig.from_dict(read_update(fields)[0])
    elif own["kind"] != "base":
        fields = {**kind.defaults, **fields}
        _peft_config(str(own["kind"]), fields, False, name)
    elif fields:
        raise ConfigError(f"method {name}: the bare base has no fields, got {', '.join(fields)}.")
    return MethodOptions(**{**own, "fields": fields, "modes": modes})


# -- models ------------------------------------------------------------------------------------------------------------


def build(kind: str, base: Any, fields: dict[str, Any], classifies: bool = False) -> Any:
    """The model of a method on ``base``, which it may change in place."""
    if kind == "base":
        return base
    if kind not in SHADOWS:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT's use of it
            return peft.get_peft_model(base, _peft_config(kind, fields, classifies))
    model: Any = attach_ablated(base, fields)
    if kind == "alone":
        leave_the_pair(model)
    return model


def _peft_config(kind: str, fields: dict[str, Any], classifies: bool, name: str = "") -> Any:
    """PEFT's configuration; ``name`` is of the method, for messages."""
    name = name or kind
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError(f"method {name} needs PEFT: pip install 'umbra-peft[evaluate]'.") from error
    fields = {"task_type": "SEQ_CLS" if classifies else "CAUSAL_LM", **fields}
    form = str(fields.pop("peft_type", "")).upper()
    if form not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise unknown_key(
            form, [str(k.value) for k in PEFT_TYPE_TO_CONFIG_MAPPING], f"the peft_type of PEFT (method {name})"
        )
    config: Callable[..., Any] = PEFT_TYPE_TO_CONFIG_MAPPING[form]  # type: ignore[index]
    known = inspect.signature(config).parameters
    for key in fields:
        if key not in known:
            raise unknown_key(key, known, f"the fields of {config.__name__} (method {name})")
    if kind in ("lora", "dora") and "lora_alpha" not in fields:
        fields["lora_alpha"] = 2 * fields.get("r", 8)
    try:
        return config(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {name}: PEFT refuses its fields: {error}") from error


# -- sizes -------------------------------------------------------------------------------------------------------------


def count(base: Base, name: str, method: MethodOptions, fields: dict[str, Any]) -> int:
    """Parameters that are trained of a method on a causal language model; no weights are made but those of a pretrained shadow.

    Raises:
        ConfigError: it cannot be put on this base.
    """
    if not method.is_trained:
        return 0
    sizes = {k: v for k, v in fields.items() if not k.startswith("init")}
    sizes |= {"init": "random"} if method.kind in SHADOWS else {}  # there are no blocks to copy
    try:
        if method.is_pretrained:
            return trainable(build(method.kind, base.copy(), fields))
        with torch.device("meta"):
            return trainable(build(method.kind, base.skeleton(), sizes))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # PEFT's methods raise whatever comes
        raise ConfigError(f"method {name} cannot be put on this base: {error!s:.300}") from error


def match(base: Base, methods: dict[str, MethodOptions], target: int) -> dict[str, dict[str, Any]]:
    """The fields of every method, with its size such that it trains ``target`` parameters, where its size is not given.

    Parameters grow linearly with the size, so two counts tell all.

    Raises:
        ConfigError: a method that cannot have so few.
    """
    found = {}
    for name, method in methods.items():
        if method.is_fixed:
            found[name] = method.fields
            continue
        small, large = (count(base, name, method, method.sized(s)) for s in (SMALL, 2 * SMALL))
        if large == small:
            raise ConfigError(
                f"method {name} trains {small:,} parameters on this base, whatever its {KINDS[method.kind].size}: give that, so "
                "that it is not matched."
            )
        size = SMALL + round((target - small) * SMALL / (large - small))
        found[name] = method.sized(max(size, 1))
        have = count(base, name, method, found[name])
        if abs(have - target) > FIT * target:
            field_name = KINDS[method.kind].size
            raise ConfigError(
                f"method {name} cannot be matched to {target:,} trainable parameters: {field_name}={max(size, 1)} has {have:,}. "
                f"Choose another number to match, or give {field_name}."
            )
    return found
