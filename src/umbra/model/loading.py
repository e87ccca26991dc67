"""`load`: read an adapter and attach it to its base."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from umbra.model.shadow_model import ShadowModel


def load(
    path: str | Path,
    base: PreTrainedModel | str | None = None,
    *,
    trainable: bool = False,
    allow_other_base: bool = False,
    shadow: str | None = None,
    **base_options: Any,
) -> ShadowModel:
    """Read an adapter and attach it to its base.

    Adapters of PEFT and of shadow-peft are read too: see `umbra.adapters.interop`.

    Args:
        path: an adapter folder, or a hub id (``owner/name``, ``owner/name@revision``).
        base: the base model, or where to load it from; by default the name that the adapter stores.
        trainable: keep the shadow's weights trainable; otherwise all are frozen.
        allow_other_base: skip the check that the base is the one that the adapter was trained on.
        shadow: for an adapter of shadow-peft with an explicit shadow: the path or hub id of that model.
        base_options: keyword arguments for loading the base, such as dtype.

    Returns:
        The base with its shadow.

    Raises:
        CheckpointError: the folder is missing, damaged or of an unreadable kind, or its tensors do not fit.
        BaseModelError: the base is not the adapter's. Folders of other packages store no more than its sizes to check.
    """
    return ShadowModel.from_pretrained(
        path, base, trainable=trainable, allow_other_base=allow_other_base, shadow=shadow, **base_options
    )
