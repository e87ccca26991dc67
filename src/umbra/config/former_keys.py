"""Keys of earlier versions and of LoRA: what is migrated, and what is answered with the key to write instead."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from umbra.config.dialects import CONSTANT_NAMES, as_constants
from umbra.errors import ConfigError, shown

RENAMED = {"channel_scale": "input_scale"}
REMOVED: dict[str, tuple[object, str]] = {  # key: its former default, and what to do instead
    "backbone_rate": (
        1.0,
        "the whole shadow trains at learning_rate, since a separate rate for the backbone gave no gain (docs/explanation/log.md)",
    ),
    "distillation_schedule": ("constant", "distillation_weight is constant over a training; change it between runs"),
    "update": ("gated", "other updates are ablations, which only the methods of a study can have (umbra study)"),
}
LORA = {
    "r": "write rank",
    "lora_alpha": "write alpha, which multiplies directly: alpha = lora_alpha / r",
    "use_rslora": "write alpha, which multiplies directly: alpha = lora_alpha / √r",
    "lora_dropout": "write dropout",
    "target_modules": "a shadow corrects the hidden states between blocks: write first_layer or layers",
    "exclude_modules": "a shadow corrects the hidden states between blocks: write first_layer or layers",
    "layers_to_transform": "write layers",
    "modules_to_save": "write train_heads: true, which trains copies of the task head",
    "init_lora_weights": "write init, or constants: {down_init: …}",
    "use_dora": "leave it out: a shadow has no magnitude vector",
    "task_type": "leave it out: the base's class decides",
    "inference_mode": "leave it out: umbra.load(trainable=False) freezes the shadow",
}


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's values under today's keys; keys that are not `ShadowConfig`'s pass unchanged.

    Args:
        values: fields of a `ShadowConfig` of any version, alone or among other settings.

    Raises:
        ConfigError: a removed key whose value is not its former default, one of LoRA's keys, or a field that is given under
            two names.
    """
    result: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for key, value in values.items():
        if key in CONSTANT_NAMES and not (key == "bias" and isinstance(value, str)):
            constants[key] = value
            continue
        if key in REMOVED and value == REMOVED[key][0]:
            continue
        name = RENAMED.get(key, key)
        if name != key and name in values:
            raise ConfigError(f"{key} is the former name of {name}: give one of them.")
        if name == key and (error := advice_on(key, value)):
            raise error
        result[name] = value
    if constants:
        given = as_constants(result.get("constants"))
        if twice := [key for key in constants if getattr(given, key) is not None]:
            raise ConfigError(f"{twice[0]} is given by itself and in constants: give one of them.")
        result["constants"] = dataclasses.replace(given, **constants)
    return result


def advice_on(key: str, value: object) -> ConfigError | None:
    """Return the error for a key of an earlier version or of LoRA, saying what to write instead; None for any other key."""
    if key in RENAMED:
        return ConfigError(f"{key} is now {RENAMED[key]}.")
    if key in REMOVED:
        return ConfigError(f"{key}={shown(value)} is no longer supported: {REMOVED[key][1]}.")
    if key == "bias" and isinstance(value, str):
        return ConfigError(f"bias={shown(value)} is a setting of LoRA: leave it out, the base's biases stay frozen.")
    if key in LORA:
        return ConfigError(f"{key}={shown(value)} is a setting of LoRA: {LORA[key]}.")
    if key in CONSTANT_NAMES:
        return ConfigError(f"{key} is a constant of the dialect: write constants={{{key!r}: {shown(value)}}}.")
    return None
