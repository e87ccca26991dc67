"""Adapters of other packages: reading those of PEFT's Shadow tuner and of shadow-peft, and writing theirs.

A folder of theirs carries no fingerprint of its base: that the sizes fit is all that can be checked.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from umbra.adapters.checkpoint import CONFIG_FILE, read_json
from umbra.adapters.interop import peft, shadow_peft
from umbra.adapters.interop.foreign import Foreign, plain_state
from umbra.adapters.interop.layout import check_names
from umbra.base import architectures
from umbra.errors import CheckpointError, ConfigError
from umbra.files import folder
from umbra.model.shadow_model import ShadowModel

FORMATS = {"peft": peft, "shadow-peft": shadow_peft}


def recognise(path: Path) -> str | None:
    """The format of a foreign adapter folder; None for Umbra's own, and for what is no adapter folder."""
    if folder.find(path, CONFIG_FILE).exists():
        return "peft" if read_json(path, CONFIG_FILE).get("peft_type") == "SHADOW" else None
    return "shadow-peft" if (path / shadow_peft.CONFIG_FILE).exists() else None


def read(path: Path, shadow: str | None = None) -> Foreign:
    """Read a folder that `recognise` knows; `umbra.load` and `ShadowModel.load_adapter` put it beside its base.

    Args:
        shadow: the path or hub id of an explicit shadow, which shadow-peft does not note.

    Raises:
        CheckpointError: a damaged folder, or one that Umbra cannot honour.
        ConfigError: ``shadow`` for a format that notes it.
    """
    if recognise(path) == "shadow-peft":
        return shadow_peft.Adapter.read(path, shadow)
    if shadow is not None:
        raise ConfigError(f"{path} names its shadow itself: shadow=… is for adapters of shadow-peft.")
    return peft.Adapter.read(path)


def convert(model: ShadowModel, path: str | Path, to: str, *, is_own: bool = False) -> Path:
    """Write an adapter in the format of another package, or in Umbra's own.

    Args:
        path: a new or empty folder.
        to: peft, shadow-peft or umbra.
        is_own: whether what lies in the folder is of an earlier call of this very kind, which was killed.

    Raises:
        ConfigError: another format.
        CheckpointError: the folder is not empty, the format cannot express this adapter, or the disk refused.
    """
    path, form = Path(path) if is_own else check_new(path), check_form(to)
    if form is None:
        model.save_pretrained(path, overwrite=is_own)
        return path
    shadow = model.shadow
    values, layouts = form.write(shadow, architectures.locate(model.base))
    files = {name: layout.write(to) for name, layout in layouts.items()}
    held = {key for layout in layouts.values() for slot in layout.slots.values() for key in slot.mine}
    check_names(held, plain_state(shadow), path)

    def write(staging: Path) -> None:
        folder.write_text(staging / form.CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        for name, tensors in files.items():
            save_file(tensors, staging / name, metadata={"format": "pt"})
        if shadow.prompting is not None and shadow.prompting.tokenizer is not None:
            shadow.prompting.tokenizer.write(staging)

    folder.write_together(path, write)
    return path


def check_form(name: str) -> Any:
    """The room of a format; None for Umbra's own.

    Raises:
        ConfigError: an unknown one.
    """
    if name not in (*FORMATS, "umbra"):
        raise ConfigError(f"Unknown format {name!r}: choose from {', '.join(FORMATS)}, umbra.")
    return FORMATS.get(name)


def check_new(path: str | Path) -> Path:
    """``path``, if it is a new or empty folder.

    Raises:
        CheckpointError: something is there.
    """
    path = Path(path)
    if path.is_file() or not (folder.is_empty(path) or folder.is_interrupted(path)):
        raise CheckpointError(
            f"{path} is not empty: choose another folder. Nothing is ever converted over something else."
        )
    return path
