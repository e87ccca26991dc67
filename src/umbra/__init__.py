"""Umbra: a frozen language model, adapted by a small shadow network that can also run alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; nothing heavy is imported before a name is used.
_ROOMS = {
    "BaseModelError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DetachError": "errors",
    "ExportError": "errors",
    "ShadowConfig": "config",
    "ShadowModel": "model.shadow_model",
    "ShadowTrainer": "training.trainers",
    "StateError": "errors",
    "UmbraError": "errors",
    "attach": "model.attach",
    "load": "model.loading",
    "with_shadow_loss": "training.trainers",
}

__all__ = [
    "BaseModelError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DetachError",
    "ExportError",
    "ShadowConfig",
    "ShadowModel",
    "ShadowTrainer",
    "StateError",
    "UmbraError",
    "attach",
    "load",
    "with_shadow_loss",
]

if TYPE_CHECKING:
    from umbra.config import ShadowConfig
    from umbra.errors import (
        BaseModelError,
        CheckpointError,
        ConfigError,
        DataError,
        DetachError,
        ExportError,
        StateError,
        UmbraError,
    )
    from umbra.model.attach import attach
    from umbra.model.loading import load
    from umbra.model.shadow_model import ShadowModel
    from umbra.training.trainers import ShadowTrainer, with_shadow_loss


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
