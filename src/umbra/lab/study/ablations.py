"""Ablations of the update between blocks, for methods of a study only (Li et al., 2026, section 4).

gated     s ← s + σ(gate(n)) ⊙ (transform(n) − s)     # the method
ungated   s ← transform(n)
none      s stays s⁰ at every block
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.config import ShadowConfig
from umbra.errors import ConfigError, shown
from umbra.method import core
from umbra.model.attach import attach
from umbra.model.shadow_model import ShadowModel

UPDATE = "update"  # the field of a method
UPDATES = ("gated", "ungated", "none")


class UngatedUpdate(core.Update):
    """s ← transform(n)."""

    def __init__(self, hidden_size: int, config: ShadowConfig):
        with torch.random.fork_rng(devices=[]):  # the removed gate must not draw random numbers
            super().__init__(hidden_size, config)
        del self.gate
        for layer in self.transform:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, n: Tensor, s: Tensor) -> Tensor:
        """Return the next state (B, T, D) in the dtype of s, for the block output n and the state s, both (B, T, D)."""
        return self.transform(n).to(s.dtype)


def read_update(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Split a method's fields into those of `ShadowConfig` and the update.

    Raises:
        ConfigError: an unknown update.
    """
    update = fields.get(UPDATE, "gated")
    if update not in UPDATES:
        raise ConfigError(f"update must be one of {', '.join(UPDATES)}; got {shown(update)}.")
    return {k: v for k, v in fields.items() if k != UPDATE}, update


def is_ablated(fields: Mapping[str, Any]) -> bool:
    """Return whether a method uses another update than the published one."""
    return fields.get(UPDATE, "gated") != "gated"


def attach_ablated(base: PreTrainedModel, fields: Mapping[str, Any]) -> ShadowModel:
    """Attach a shadow with the update that a method selects.

    Do not save its adapter: it would load with the published update, or not at all.

    Args:
        base: The base model.
        fields: Fields of `ShadowConfig` of any version, and ``update``.

    Raises:
        ConfigError: see `umbra.attach`.
    """
    values, update = read_update(fields)
    config = ShadowConfig.from_dict(values)
    if update != "ungated":
        model = attach(base, config)
    else:
        with patch.object(core, "Update", UngatedUpdate):
            model = attach(base, config)
    if update == "none":
        couplings = model.shadow.couplings
        couplings.updates, couplings.norm = nn.ModuleDict(), nn.Identity()
        couplings.boundaries = list(couplings.layers)
    return model
