"""The adapters of one base: named, activated, replaced and deleted; and which rows of a batch each of them has."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.errors import ConfigError, StateError
from umbra.method import kernels
from umbra.shadow.network import Shadow

DEFAULT = "default"  # the name of the shadow that `attach` and `load` make
BASE = "__base__"  # in adapter_names: no adapter, like None


class AdapterSet:
    """The shadows beside one base, of which one is active.

    The active shadow alone is trained, and runs where a call names no adapter; the others are frozen. Each shadow has its own
    layers of the shared cache, which do not change while it is loaded: a generation in progress continues while other
    adapters come and go.

    Args:
        base: the base model.
        shadow: the first adapter, which becomes the active one.
    """

    def __init__(self, base: PreTrainedModel, shadow: Shadow):
        self.base = base
        self.inactive = nn.ModuleDict()
        self.active, self.active_name = shadow, DEFAULT

    @property
    def names(self) -> list[str]:
        """The names of all adapters, the active one first."""
        return [self.active_name, *self.inactive.keys()]

    @property
    def shadows(self) -> list[Shadow]:
        """All shadows, the active one first."""
        return [self.get(name) for name in self.names]

    def get(self, name: str | None = None) -> Shadow:
        """Return the shadow of this name, by default the active one.

        Raises:
            ConfigError: no adapter has this name.
        """
        if name is None or name == self.active_name:
            return self.active
        if not isinstance(name, str) or name not in self.inactive:
            raise ConfigError(f"There is no adapter {name!r}: this model has {', '.join(self.names)}.")
        return cast(Shadow, self.inactive[name])

    def select(self, adapter_names: Sequence[str | None] | None) -> list[Shadow]:
        """Return the shadows that a batch's ``adapter_names`` contain; the active one if they are None."""
        if adapter_names is None:
            return [self.active]
        return [self.get(name) for name in dict.fromkeys(adapter_names) if name not in (None, BASE)]

    def put(self, name: str, shadow: Shadow) -> None:
        """Add a shadow, or replace the adapter of this name; a new adapter is inactive."""
        replaced = self.get(name) if name in self.names else None
        shadow.place(self._free_cache_layer(len(shadow.cache_layers), replaced))
        kernels.patch_linears(shadow.modules())
        shadow.train(self.active.training)
        shadow.added_tokens = self.active.added_tokens
        if shadow.added_tokens is not None and self.names != [name]:
            shadow.added_tokens.requires_grad_(False)  # training one adapter would change the others
        if replaced is self.active:
            self.active = shadow
        else:
            shadow.freeze()
            self.inactive[name] = shadow

    def activate(self, name: str) -> None:
        """Make an adapter the active one.

        Raises:
            ConfigError: no adapter has this name.
        """
        shadow, previous = self.get(name), self.active
        if shadow is previous:
            return
        others = {n: s for n, s in self.inactive.items() if n != name}
        previous.freeze()
        shadow.unfreeze()
        self.inactive = nn.ModuleDict({self.active_name: previous, **others})
        self.active, self.active_name = shadow, name

    def delete(self, name: str) -> None:
        """Remove an inactive adapter and free its weights.

        Raises:
            ConfigError: no adapter has this name.
            StateError: the adapter is the active one.
        """
        self.get(name)
        if name == self.active_name:
            raise StateError(f"{name!r} is active: set_adapter(…) another one first, or unload() the model.")
        del self.inactive[name]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ConfigError: no adapter is called ``old``, or ``new`` is taken or not a name.
        """
        self.get(old)
        self.check_new_name(new)
        if old == self.active_name:
            self.active_name = new
        else:
            self.inactive = nn.ModuleDict({new if n == old else n: s for n, s in self.inactive.items()})

    def check_new_name(self, name: object) -> str:
        """Return the name of an adapter to add.

        Raises:
            ConfigError: the name is taken or not a name.
        """
        if not isinstance(name, str) or not name or "." in name or name == BASE:
            raise ConfigError(f"An adapter's name is a text without dots, and not {BASE}; got {name!r}.")
        if name in self.names:
            raise ConfigError(f"There is an adapter {name!r} already: delete_adapter it, or load with replace=True.")
        return name

    def _free_cache_layer(self, count: int, leaving: Shadow | None) -> int:
        """Return the first of ``count`` adjacent layers of the shared cache that no staying shadow uses."""
        taken = {l for shadow in self.shadows if shadow is not leaving for l in shadow.cache_layers}
        start = architectures.cache_depth(architectures.locate(self.base))
        while not taken.isdisjoint(range(start, start + count)):
            start += 1
        return start


def group_rows(names: Sequence[str | None], num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return the rows of a batch that each adapter has: name → (N,) row numbers. Rows without an adapter are left out.

    Args:
        names: one for each sequence; None or `BASE` for the bare base.
        num_rows: B, a multiple of ``len(names)`` where beams or several answers stand beside each other.
        device: of the row numbers.

    Raises:
        ConfigError: B is not a multiple of ``len(names)``.
    """
    names = list(names)
    if not names or num_rows % len(names):
        raise ConfigError(f"adapter_names holds {len(names)} names for a batch of {num_rows}: give one for each row.")
    groups: dict[str, list[int]] = {}
    for row in range(num_rows):
        name = names[row // (num_rows // len(names))]
        if name is not None and name != BASE:
            groups.setdefault(name, []).append(row)
    return {name: torch.tensor(rows, device=device) for name, rows in groups.items()}


def pick_rows(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a batch with some rows of each tensor that has one row for each sequence.

    Args:
        batch: the arguments of a forward.
        rows: (N,).

    Raises:
        ConfigError: the batch is packed, so that its rows are not sequences.
    """
    if batch.get("cu_seq_lens_q") is not None:
        raise ConfigError("adapter_names needs one sequence a row: this batch is packed (cu_seq_lens).")
    return {k: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) > 1 else v for k, v in batch.items()}
