"""Methods to compare: the bare base, any method of PEFT, Umbra attached and detached, and the shadow network alone.

A method is a kind and the fields of its configuration: of `ShadowConfig`, or of the PEFT configuration named by ``peft_type``.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from umbra.config import ShadowConfig
from umbra.errors import ConfigError, shown, unknown_key
from umbra.lab.bench.base import Base
from umbra.lab.bench.methods import trainable
from umbra.lab.study.ablations import attach_ablated, read_update
from umbra.options import check_types, names
from umbra.options.extras import install_command
from umbra.training.train import freeze_attached_parts

ATTACHED, DETACHED = "attached", "detached"
BY_LIKELIHOOD = "likelihood"  # a further score of the bare base, measured where answers repeat; no mode of a method
FIT = 0.05  # tolerated relative difference between matched parameter counts
SMALL = 16  # value of the size field at which parameters are counted first


@dataclass(frozen=True)
class Kind:
    """A family of methods.

    Args:
        about: A description for the report.
        defaults: Default values of its fields.
        size: The field that sets the number of trainable parameters; None if there is none.
        modes: The ways in which a trained model can be scored.
    """

    about: str
    defaults: dict[str, Any] = field(default_factory=dict)
    size: str | None = None
    modes: tuple[str, ...] = (ATTACHED,)


ALL: dict[str, Any] = {"target_modules": "all-linear"}
KINDS = {
    "base": Kind("the frozen base without training"),
    "lora": Kind("PEFT's LoRA on all linear layers, alpha twice the rank", {"peft_type": "LORA", **ALL}, "r"),
    "dora": Kind("PEFT's DoRA (LoRA with use_dora) on all linear layers", {"peft_type": "LORA", **ALL, "use_dora": True}, "r"),
    "lily": Kind(
        "PEFT's Lily on all linear layers", {"peft_type": "LILY", **ALL, "stride_A": 10, "num_B": 3, "scaling": 4.0}, "r"
    ),
    "peft_shadow": Kind("PEFT's ShadowConfig", {"peft_type": "SHADOW"}, "shadow_intermediate_size"),
    "peft": Kind("a method of PEFT, selected by peft_type"),
    "umbra": Kind("Umbra", {}, "shadow_intermediate_size", (ATTACHED, DETACHED)),
    "alone": Kind("the shadow network trained without the base", {}, None, (DETACHED,)),
}  # fmt: skip
SHADOWS = ("umbra", "alone")


@dataclass(frozen=True)
class MethodOptions:
    """One method of a study.

    Args:
        kind: A key of `KINDS`.
        fields: Fields of the configuration of this kind.
        family: Methods of one family form one curve of scores over trainable parameters.
        learning_rate: Learning rates to try, instead of the study's.
        training: TrainingArguments over those of study and task.
        modes: The modes to score; default all modes of the kind.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    learning_rate: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether anything is trained."""
        return self.kind != "base"

    @property
    def is_pretrained(self) -> bool:
        """Whether training starts from a pretrained shadow in a folder."""
        return self.kind in SHADOWS and ShadowConfig.from_dict(read_update(self.fields)[0]).is_pretrained

    @property
    def is_fixed(self) -> bool:
        """Whether the size is set by a field, by a pretrained shadow or by the base's blocks, and not matched."""
        size = KINDS[self.kind].size
        return size is None or size in self.fields or self.is_pretrained or self.fields.get("init") == "base"

    def sized(self, value: int) -> dict[str, Any]:
        """Return the fields with the size set to ``value``."""
        size = KINDS[self.kind].size
        return {**self.fields, **({size: value} if size else {})}


def read_method(name: str, values: dict[str, Any]) -> MethodOptions:
    """Parse one entry under ``methods``; keys that `MethodOptions` does not have are fields of the kind's configuration.

    Raises:
        ConfigError: an unknown kind, field or mode, or a value that the configuration refuses.
    """
    if not isinstance(values, dict) or "kind" not in values:
        raise ConfigError(f"method {name} needs a kind, one of {', '.join(KINDS)}: such as {{kind: lora, r: 8}}.")
    options = {k: v for k, v in values.items() if k in names(MethodOptions) and k != "fields"}
    fields = {str(k): v for k, v in values.items() if k not in options}
    if not isinstance(options["kind"], str) or options["kind"] not in KINDS:
        raise unknown_key(str(options["kind"]), KINDS, f"the kinds of method ({name})")
    kind = KINDS[options["kind"]]
    options = {k: [v] if k in ("modes", "learning_rate") and not isinstance(v, list) else v for k, v in options.items()}
    try:
        check_types(MethodOptions, {**options, "modes": tuple(options.get("modes", ()))})
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from error
    if "learning_rate" in options.get("training", {}):
        raise ConfigError(f"method {name}: set learning_rate outside training, where the search would override it.")
    modes = tuple(options.get("modes") or kind.modes)
    if any(mode not in kind.modes for mode in modes):
        raise ConfigError(
            f"method {name}: modes must be of {', '.join(kind.modes)} for {options['kind']}, got {', '.join(map(shown, modes))}."
        )
    if options["kind"] in SHADOWS:
        ShadowConfig.from_dict(read_update(fields)[0])
    elif options["kind"] != "base":
        fields = {**kind.defaults, **fields}
        _peft_config(str(options["kind"]), fields, False, name)
    elif fields:
        raise ConfigError(f"method {name}: the bare base has no fields, got {', '.join(fields)}.")
    return MethodOptions(**{**options, "fields": fields, "modes": modes})


# -- models ------------------------------------------------------------------------------------------------------------


def build(kind: str, base: PreTrainedModel, fields: dict[str, Any], classifies: bool = False) -> nn.Module:
    """Build the model of a method.

    Args:
        kind: A key of `KINDS`.
        base: The base model; PEFT's methods change it in place.
        fields: Fields of the kind's configuration.
        classifies: Whether the base has a classification head.
    """
    if kind == "base":
        return base
    if kind not in SHADOWS:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by transformers for calls that PEFT makes
            return peft.get_peft_model(base, _peft_config(kind, fields, classifies))
    model = attach_ablated(base, fields)
    if kind == "alone":
        freeze_attached_parts(model)
    return model


def _peft_config(kind: str, fields: dict[str, Any], classifies: bool, name: str = "") -> Any:
    """Return PEFT's configuration; ``name`` is the method's name in error messages."""
    name = name or kind
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError(f"method {name} needs PEFT: {install_command('evaluate')}.") from error
    fields = {"task_type": "SEQ_CLS" if classifies else "CAUSAL_LM", **fields}
    peft_type = str(fields.pop("peft_type", "")).upper()
    configs: dict[str, Callable[..., Any]] = {str(k.value): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in configs:
        raise unknown_key(peft_type, configs, f"the peft_type of PEFT (method {name})")
    config = configs[peft_type]
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
    """Count the trainable parameters of a method on a causal language model.

    No weights are allocated, except those of a pretrained shadow.

    Raises:
        ConfigError: the method cannot be applied to this base.
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
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # PEFT's methods raise any of these
        raise ConfigError(f"method {name} cannot be applied to this base: {error!s:.300}") from error


def match(base: Base, methods: dict[str, MethodOptions], target: int) -> dict[str, dict[str, Any]]:
    """Return the fields of every method, sized to train ``target`` parameters unless its size is fixed.

    The number of parameters is linear in the size, so two counts determine it.

    Raises:
        ConfigError: a method that has no such size.
    """
    matched = {}
    for name, method in methods.items():
        if method.is_fixed:
            matched[name] = method.fields
            continue
        small, large = (count(base, name, method, method.sized(s)) for s in (SMALL, 2 * SMALL))
        size_field = KINDS[method.kind].size
        if large == small:
            raise ConfigError(
                f"method {name} trains {small:,} parameters on this base for every {size_field}: set {size_field}, so that it "
                "is not matched."
            )
        size = SMALL + round((target - small) * SMALL / (large - small))
        matched[name] = method.sized(max(size, 1))
        actual = count(base, name, method, matched[name])
        if abs(actual - target) > FIT * target:
            raise ConfigError(
                f"method {name} cannot be matched to {target:,} trainable parameters: {size_field}={max(size, 1)} has {actual:,}. "
                f"Change match, or set {size_field}."
            )
    return matched
