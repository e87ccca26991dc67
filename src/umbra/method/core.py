"""The method (Li et al., 2026, arXiv 2604.19254): its equations and shapes, and nothing else.

Letters: B batch, T tokens, D base hidden size, R injection rank, G gate rank, L base layers.

    s⁰            = projection(shadow_backbone(x))                     # (B, T, D); see shadow/network.py
    inject,  l ≥ first:   h  ← h + α · dropout((h − s) · W_down) · W_up   # before block l; W_up starts at 0
    block l:              h  ← base_block_l(h)                            # frozen
    update:               n = norm(h);  s ← s + σ(gate(n)) ⊙ (transform(n) − s)
    loss          = CE(base head, y) + λ · CE(head(s⁰), y)             # see model/losses.py

With input scaling, the injection reads (h − s) ⊙ c instead of h − s; see shadow/input_scale.py. The update after the last
block would feed nothing: it is not computed and has no parameters.
"""

from typing import cast

import torch
from torch import Tensor, nn

from umbra.config import ShadowConfig

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}
SCALED_STD = 3.0  # std of the initial W_down times √D, where it depends on the width


class Injection(nn.Module):
    """h ← h + α · dropout(((h − s) ⊙ c) · W_down) · W_up.

    ``down.weight`` is (R, D), ``up.weight`` (D, R). c is 1, or ``channels`` (D,), which is measured and not trained.

    Args:
        hidden_size: D.
        config: a resolved configuration.
    """

    channels: nn.Parameter | None

    def __init__(self, hidden_size: int, config: ShadowConfig):
        super().__init__()
        assert config.rank is not None and config.alpha is not None and config.dropout is not None
        self.alpha = config.alpha
        self.down = nn.Linear(hidden_size, config.rank, bias=False)
        self.up = nn.Linear(config.rank, hidden_size, bias=False)
        scale = nn.Parameter(torch.ones(hidden_size), requires_grad=False)  # engines shard parameters, but few buffers
        self.register_parameter("channels", scale if config.input_scale == "measured" else None)
        self.dropout_delta = nn.Dropout(config.dropout if config.constants.dropout_position == "delta" else 0.0)
        self.dropout_rank = nn.Dropout(config.dropout if config.constants.dropout_position == "rank" else 0.0)
        if config.constants.down_init != "linear":
            std = 0.02 if config.constants.down_init == "normal" else SCALED_STD / hidden_size**0.5
            nn.init.normal_(self.down.weight, std=std)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """(B, T, D), (B, T, D) → (B, T, D) in the dtype of h; computed in the dtype of the weights."""
        delta = (h - s).to(self.down.weight.dtype)
        delta = delta if self.channels is None else delta * self.channels
        correction = self.up(self.dropout_rank(self.down(self.dropout_delta(delta))))
        return h + (self.alpha * correction).to(h.dtype)

    def scaled_down(self) -> Tensor:
        """Return c ⊙ W_down (R, D), which reads h − s itself."""
        return self.down.weight if self.channels is None else self.down.weight * self.channels


class Update(nn.Module):
    """s ← s + σ(gate(n)) ⊙ (transform(n) − s).

    Gate and transform are two-layer networks of shape D → G → D.

    Args:
        hidden_size: D.
        config: a resolved configuration.
    """

    def __init__(self, hidden_size: int, config: ShadowConfig):
        super().__init__()
        constants = config.constants
        assert config.gate_rank and constants.bias is not None and constants.activation and config.dropout is not None
        D, G, bias, activation = hidden_size, config.gate_rank, constants.bias, ACTIVATIONS[constants.activation]
        dropout = config.dropout if constants.dropout_position == "rank" else 0.0
        self.gate = nn.Sequential(nn.Linear(D, G, bias=bias), activation(), nn.Linear(G, D, bias=bias))
        self.transform = nn.Sequential(
            nn.Linear(D, G, bias=bias), activation(), nn.Dropout(dropout), nn.Linear(G, D, bias=bias)
        )

    def forward(self, n: Tensor, s: Tensor) -> Tensor:
        """(B, T, D), (B, T, D) → (B, T, D) in the dtype of s."""
        return (s + torch.sigmoid(self.gate(n)) * (self.transform(n) - s)).to(s.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the update reads n."""
        return cast(nn.Linear, self.transform[0]).weight.dtype


class Couplings(nn.Module):
    """The modules that couple base and shadow: an `Injection` before each coupled block, an `Update` between them.

    Both run at the boundary before a block: the state is updated from the output of block l − 1, if that block is coupled,
    and then injected into the input of block l, if this one is.

    Args:
        num_layers: L.
        hidden_size: D.
        config: a resolved configuration.
    """

    def __init__(self, num_layers: int, hidden_size: int, config: ShadowConfig):
        super().__init__()
        self.config = config
        self.layers = layers = config.coupled(num_layers)
        self.injections = nn.ModuleDict({str(l): Injection(hidden_size, config) for l in layers})
        updated = layers[:-1]  # the last update would feed nothing
        self.updates = nn.ModuleDict({str(l): Update(hidden_size, config) for l in updated})
        self.norm = nn.LayerNorm(hidden_size) if config.constants.norm and updated else nn.Identity()
        self.boundaries = sorted({*layers, *(l + 1 for l in updated)})

    def inject(self, l: int, h: Tensor, s: Tensor) -> Tensor:
        """Return the input of block l: h (B, T, D), corrected by the state s (B, T, D)."""
        return self.injections[str(l)](h, s)

    def update(self, l: int, h: Tensor, s: Tensor) -> Tensor:
        """Return the state after block l, whose output is h (B, T, D)."""
        update = cast(Update, self.updates[str(l)])
        return update(self.norm(h.to(update.dtype)), s)

    def update_and_inject(self, l: int, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and s, both (B, T, D), after the boundary before block l."""
        s = self.update(l - 1, h, s) if str(l - 1) in self.updates else s
        return self.inject(l, h, s) if str(l) in self.injections else h, s
