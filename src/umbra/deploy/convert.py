"""Write the active adapter of a model in the format of another package, or in Umbra's."""

from pathlib import Path

from umbra.adapters import interop
from umbra.base import architectures
from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.model.shadow_model import ShadowModel


def convert(model: ShadowModel, path: str | Path, to: str, *, is_resumed: bool = False) -> Path:
    """Write the model's active adapter in the format of another package, or in Umbra's.

    Args:
        model: the model.
        path: a new or empty folder.
        to: peft, shadow-peft or umbra.
        is_resumed: whether the folder's content was written by an earlier call with the same arguments, which was killed.

    Returns:
        ``path``.

    Raises:
        ConfigError: an unknown format.
        CheckpointError: the folder is not empty, the format cannot express this adapter, or the disk refused.
    """
    path = Path(path) if is_resumed else _check_new(path)
    interop.check_format(to)
    if to == "umbra":
        model.save_pretrained(path, overwrite=is_resumed)
    else:
        interop.write(model.shadow, architectures.locate(model.base), path, to)
    return path


def _check_new(path: str | Path) -> Path:
    """Return ``path`` if it is a new or empty folder; raise a CheckpointError otherwise."""
    path = Path(path)
    if path.is_file() or not (folder.is_empty(path) or folder.is_interrupted(path)):
        raise CheckpointError(
            f"{path} is not empty: choose another folder. Nothing is ever converted over something else."
        )
    return path
