"""Read and write adapters of other packages: PEFT's Shadow tuner, and shadow-peft.

Their folders store no fingerprint of the base: nothing but its sizes can be checked.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from umbra.adapters.files import Values
from umbra.adapters.interop import peft, shadow_peft
from umbra.adapters.interop.foreign import Foreign, plain_state
from umbra.adapters.interop.layout import check_names
from umbra.base.architectures import Architecture
from umbra.errors import ConfigError
from umbra.files import folder
from umbra.shadow.network import Shadow

FORMATS = {"peft": peft, "shadow-peft": shadow_peft}


def recognise(path: Path, values: Values | None) -> str | None:
    """Return the format of another package's adapter folder; None for Umbra's, and for folders without an adapter.

    Args:
        path: the folder.
        values: the content of its ``adapter_config.json``; None if there is none.
    """
    if values is not None:
        return "peft" if values.get("peft_type") == "SHADOW" else None
    return "shadow-peft" if (path / shadow_peft.CONFIG_FILE).exists() else None


def read(path: Path, values: Values | None, shadow: str | None = None) -> Foreign:
    """Read a folder that `recognise` knows; `umbra.load` and `ShadowModel.load_adapter` attach it to its base.

    Args:
        path: the folder.
        values: the content of its ``adapter_config.json``; None if there is none.
        shadow: the path or hub id of an explicit shadow, which adapters of shadow-peft do not name.

    Returns:
        The adapter, not yet attached to a base.

    Raises:
        CheckpointError: the folder is damaged, or has settings that Umbra does not support.
        ConfigError: ``shadow`` was given for a format that stores it.
    """
    if values is None:
        return shadow_peft.Adapter.read(path, shadow)
    if shadow is not None:
        raise ConfigError(f"{path} names its shadow itself: shadow=… is for adapters of shadow-peft.")
    return peft.Adapter.read(path, values)


def write(shadow: Shadow, base: Architecture, path: Path, to: str) -> None:
    """Write a shadow in the format of another package.

    Args:
        shadow: the shadow.
        base: the parts of its base.
        path: the folder.
        to: a key of `FORMATS`.

    Raises:
        CheckpointError: the format cannot express this adapter, or the disk refused.
    """
    package = FORMATS[to]
    values, layouts = package.write(shadow, base)
    files = {name: layout.write(to) for name, layout in layouts.items()}
    written = {key for layout in layouts.values() for slot in layout.slots.values() for key in slot.sources}
    check_names(written, plain_state(shadow), path)

    def fill(staging: Path) -> None:
        folder.write_text(staging / package.CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        for name, tensors in files.items():
            save_file(tensors, staging / name, metadata={"format": "pt"})
        if shadow.prompting is not None and shadow.prompting.tokenizer is not None:
            shadow.prompting.tokenizer.write(staging)

    folder.write_together(path, fill)


def check_format(name: str) -> None:
    """Raise a ConfigError unless ``name`` is a format: a key of `FORMATS`, or umbra."""
    if name not in (*FORMATS, "umbra"):
        raise ConfigError(f"Unknown format {name!r}: choose from {', '.join(FORMATS)}, umbra.")
