"""Ablations of the method itself, which no configuration of an adapter offers.

    update: ungated    s ← transform(n) instead of s ← s + σ(gate(n)) ⊙ (transform(n) − s)
    update: none       the state stays s⁰ at every block

A study sets them among the fields of a method of kind ``umbra``: ``{kind: umbra, update: none}``.
"""

from typing import Any, cast

from torch import Tensor, nn

from umbra.errors import ConfigError, shown
from umbra.method.core import Couplings, Update
from umbra.model.shadow_model import ShadowModel

UPDATE = "update"
CHOICES = ("gated", "ungated", "none")  # gated is the method as published


class UngatedUpdate(nn.Module):
    """The update without its gate: s ← transform(n). No fused kernel computes it, so the model uses its plain form."""

    def __init__(self, update: Update):
        super().__init__()
        self.transform = update.transform

    def forward(self, n: Tensor, s: Tensor) -> Tensor:
        """Return the next state (B, T, D) for the normalized block output n and the state s, both (B, T, D)."""
        return self.transform(n).to(s.dtype)


def ablations_in(fields: dict[str, Any]) -> dict[str, str]:
    """Return the ablations among the fields of a method.

    Raises:
        ConfigError: an unknown value.
    """
    value = fields.get(UPDATE, CHOICES[0])
    if value not in CHOICES:
        raise ConfigError(f"update must be one of {', '.join(CHOICES)}; got {shown(value)}.")
    return {} if value == CHOICES[0] else {UPDATE: value}


def without_ablations(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a method that belong to `umbra.ShadowConfig`."""
    return {k: v for k, v in fields.items() if k != UPDATE}


def ablate(model: ShadowModel, fields: dict[str, Any]) -> None:
    """Change an attached shadow in place as the ablations among ``fields`` require."""
    choice = ablations_in(fields).get(UPDATE)
    couplings = cast(Couplings, model.shadow.couplings)
    if choice == "ungated":
        for layer, update in couplings.updates.items():
            couplings.updates[layer] = UngatedUpdate(cast(Update, update))
    elif choice == "none":
        couplings.updates.clear()
        couplings.norm = nn.Identity()
