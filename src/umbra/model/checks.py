"""Small checks and conversions that the model classes share."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.errors import BaseModelError, ConfigError

INACTIVE = "inactive_adapters."  # the prefix of their weights in the state dict of the whole model
OLD_INACTIVE = "resting."  # the same prefix in state dicts of earlier versions


def check_one_adapter(adapter_names: object) -> None:
    """Raise a `ConfigError` for ``adapter_names`` where only the active adapter runs."""
    if adapter_names is not None:
        raise ConfigError("shadow_only() runs the active adapter: set_adapter(…) it, and leave adapter_names out.")


def detached_copy(loss: Tensor | None) -> Tensor | None:
    """Return a copy of a loss for logging: trainers scale the loss itself in place."""
    return None if loss is None else loss.detach().clone()


def of_base(tied_keys: dict[str, str]) -> dict[str, str]:
    """Return the base's tied keys as keys of the whole model."""
    return {f"base.{k}": f"base.{v}" for k, v in tied_keys.items()}


def rename_old_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename the weights of inactive adapters in a state dict of an earlier version."""
    for key in [key for key in state_dict if key.startswith(prefix + OLD_INACTIVE)]:
        state_dict[prefix + INACTIVE + key.removeprefix(prefix + OLD_INACTIVE)] = state_dict.pop(key)


def check_replacement(what: str, before: nn.Module, after: nn.Module) -> None:
    """Raise a `ConfigError` for a table or head of another size than the one that it replaces."""
    old, new = (architectures.table_sizes(module) for module in (before, after))
    if old != new:
        raise ConfigError(
            f"The new {what} is {new}, the base's is {old}: use resize_token_embeddings() for more tokens."
        )


def check_devices(base: PreTrainedModel) -> None:
    """Raise a `BaseModelError` for a base on several accelerators: states and shadow would have to follow its blocks."""
    devices = architectures.accelerators(base)
    if len({device.partition(":")[2] or "0" for device in devices}) > 1:
        raise BaseModelError(
            f"The base is spread over {', '.join(sorted(devices))}: load it on one device (device_map={{'': 0}}), train "
            "with FSDP2, or use a smaller dtype."
        )
