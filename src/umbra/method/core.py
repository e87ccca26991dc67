"""The method, and nothing else (Li et al., 2026, arXiv 2604.19254).

Letters: B batch, T tokens, D base hidden size, R injection rank, G gate rank, L base layers.

    s⁰            = projection(shadow_backbone(x))                     # (B, T, D), see backbone.py
    inject        h ← h + α · dropout((h − s) · W_down) · W_up         # before block l ≥ first; W_up starts at 0
                  (with (h − s) ⊙ c in its place where channels are scaled: see channels.py)
    block l       h ← base_block_l(h)                                  # frozen
    update        n = norm(h);  s ← s + σ(gate(n)) ⊙ (transform(n) − s)
    loss          = CE(base head, y) + λ · CE(head(s⁰), y)             # see model.py

The update after the last block feeds nothing: it is neither computed nor given parameters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbra.config import ShadowConfig
from umbra.errors import ConfigError
from umbra.method import kernels
from umbra.method.kernels.couple import NO_MASKS, Masks, Seam

IGNORED = -100  # the label of a position that carries no loss
ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}
SCALED = 3.0  # √D times the standard deviation that W_down starts with, if that goes by the width


class Injection(nn.Module):
    """h ← h + α · dropout(((h − s) ⊙ c) · W_down) · W_up, with ``down.weight`` (R, D), ``up.weight`` (D, R).

    c is 1, or ``channels`` (D,), which is measured and not trained.
    """

    channels: nn.Parameter | None

    def __init__(self, hidden_size: int, config: ShadowConfig):
        super().__init__()
        assert config.rank is not None and config.dropout is not None
        self.alpha = config.alpha
        self.down = nn.Linear(hidden_size, config.rank, bias=False)
        self.up = nn.Linear(config.rank, hidden_size, bias=False)
        scale = nn.Parameter(torch.ones(hidden_size), requires_grad=False)  # engines spread parameters, and few buffers
        self.register_parameter("channels", scale if config.input_scale == "measured" else None)
        self.dropout_delta = nn.Dropout(config.dropout if config.constants.dropout_position == "delta" else 0.0)
        self.dropout_rank = nn.Dropout(config.dropout if config.constants.dropout_position == "rank" else 0.0)
        if config.constants.down_init != "linear":
            std = 0.02 if config.constants.down_init == "normal" else SCALED / hidden_size**0.5
            nn.init.normal_(self.down.weight, std=std)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """(B, T, D), (B, T, D) → (B, T, D) in h's dtype; computed in the dtype of the weights."""
        delta = (h - s).to(self.down.weight.dtype)
        delta = delta if self.channels is None else delta * self.channels
        correction = self.up(self.dropout_rank(self.down(self.dropout_delta(delta))))
        return h + (self.alpha * correction).to(h.dtype)

    def reader(self) -> Tensor:
        """c ⊙ W_down (R, D), which reads h − s itself."""
        return self.down.weight if self.channels is None else self.down.weight * self.channels


class Update(nn.Module):
    """s ← s + σ(gate(n)) ⊙ (transform(n) − s), with gate and transform of shape D → G → D."""

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
        """(B, T, D), (B, T, D) → (B, T, D) in s's dtype."""
        return (s + torch.sigmoid(self.gate(n)) * (self.transform(n) - s)).to(s.dtype)


class Couplings(nn.Module):
    """All that couples blocks to the state: an `Injection` before each of ``layers``, an `Update` between them.

    Both happen at the seams between blocks: before block l the state is updated from the output of block l − 1, if that
    is coupled, and then injected, if l is.

    Args:
        num_layers: L.
        hidden_size: D.
        config: resolved, so that no field of the dialect is None.
    """

    def __init__(self, num_layers: int, hidden_size: int, config: ShadowConfig):
        super().__init__()
        self.config = config
        self.layers = layers = config.coupled(num_layers)
        self.injections = nn.ModuleDict({str(l): Injection(hidden_size, config) for l in layers})
        updated = layers[:-1]  # the last update would feed nothing
        self.updates = nn.ModuleDict({str(l): Update(hidden_size, config) for l in updated})
        self.norm = nn.LayerNorm(hidden_size) if config.constants.norm and updated else nn.Identity()
        self.seams = sorted({*layers, *(l + 1 for l in updated)})

    def inject(self, l: int, h: Tensor, s: Tensor) -> Tensor:
        """The input of block l: h corrected towards what the state knows."""
        return self.injections[str(l)](h, s)

    def update(self, l: int, h: Tensor, s: Tensor) -> Tensor:
        """The state after block l, whose output is h."""
        update: Any = self.updates[str(l)]
        n = self.norm(h.to(update.transform[0].weight.dtype))
        return update(n, s)

    def couple(self, l: int, h: Tensor, s: Tensor, fast: bool = True) -> tuple[Tensor, Tensor]:
        """(h', s') of the seam before block l.

        Args:
            h, s: (B, T, D).
            fast: whether the weights may be read outside their own modules, by the kernels.
        """
        before, here = str(l - 1), str(l)
        if fast and self._may_fuse(h):
            return kernels.couple(h, s, self._seam(before, here), self._masks(before, here, h))
        s = self.update(l - 1, h, s) if before in self.updates else s
        return self.inject(l, h, s) if here in self.injections else h, s

    def decodes(self, s: Tensor) -> bool:
        """Whether a forward with this state is one that `kernels.couple_few` is for."""
        if self.training or torch.is_grad_enabled() or not self._may_fuse(s):
            return False
        return s.device.type == "cpu" and s.shape[0] * s.shape[1] <= kernels.FEW

    def is_plain(self) -> bool:
        """Whether the kernels may read the weights: nobody has hooked, wrapped or parametrised a module."""
        return all(kernels.is_plain(module, kinds=KINDS) for module in self.modules())

    def _may_fuse(self, x: Tensor) -> bool:
        return kernels.in_use() and not x.is_meta and not torch.is_autocast_enabled(x.device.type)

    def packs(self) -> "dict[int, kernels.Pack]":
        """Each seam for `kernels.couple_few`; to be thrown away before the weights change."""
        if not self.is_plain():
            return {}
        return {l: kernels.pack(self._seam(str(l - 1), str(l))) for l in self.seams}

    def _seam(self, before: str, here: str) -> Seam:
        update: Any = self.updates._modules.get(before)
        injection: Any = self.injections._modules.get(here)
        norm: Any = self.norm
        return Seam(
            (norm.weight, norm.bias, norm.eps) if update and self.config.constants.norm else None,
            _pair(update.gate) if update else None,
            _pair(update.transform) if update else None,
            self.config.constants.activation or "",
            injection.reader() if injection else None,
            injection.up.weight if injection else None,
            injection.alpha if injection else 0.0,
        )

    def _masks(self, before: str, here: str, h: Tensor) -> Masks:
        """As `nn.Dropout` would draw them in turn."""
        if not self.training:
            return NO_MASKS

        def mask(layer: nn.Dropout, size: Any) -> Tensor | None:
            if (p := layer.p) == 0:
                return None
            weight: Any = next(self.parameters())
            return torch.empty(*h.shape[:-1], size, dtype=weight.dtype, device=h.device).bernoulli_(1 - p).div_(1 - p)

        update: Any = self.updates._modules.get(before)
        injection: Any = self.injections._modules.get(here)
        transform = mask(_dropout(update), self.config.gate_rank) if update else None
        rank = mask(injection.dropout_rank, self.config.rank) if injection else None
        delta = mask(injection.dropout_delta, h.shape[-1]) if injection else None
        return NO_MASKS if transform is rank is delta is None else Masks(transform, rank, delta)


KINDS = {*kernels.PLAIN, Injection, Update, Couplings}


def _dropout(update: Any) -> nn.Dropout:
    return next(m for m in update.transform if isinstance(m, nn.Dropout))


def _pair(inner: nn.Sequential) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    first, last = inner[0], inner[-1]
    return first.weight, first.bias, last.weight, last.bias  # type: ignore[return-value]


def labelled_positions(labels: Tensor, shift_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where a next-token loss falls: flat positions (N,) whose following token is labelled, and those labels (N,).

    Args:
        labels: (B, T), aligned with the input; `IGNORED` where there is no loss.
        shift_labels: (B, T), the following tokens' labels, in place of ``labels``.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift_labels is None else shift_labels
    following = following.reshape(-1)
    positions = (following != IGNORED).nonzero().squeeze(-1)
    return positions, following[positions]


def as_classes(labels: Tensor, count: int, name: str = "labels") -> Tensor:
    """Class numbers as `torch.long`, from any integer dtype.

    Args:
        count: how many classes there are.
        name: of the argument, for the error.

    Raises:
        ConfigError: another dtype, or a value that is neither a class nor `IGNORED`.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ConfigError(f"{name} must be integers, got {labels.dtype}: convert them by .long().")
    labels = labels.long()
    if torch.compiler.is_compiling() or labels.is_meta:
        return labels
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= count)
    if bool(wrong.any()):
        raise ConfigError(
            f"{name} must lie in 0 to {count - 1}, or be {IGNORED} where there is no loss; got {int(labels[wrong][0])}."
        )
    return labels


def at_least_one(items: Tensor | int) -> Tensor | int:
    """What a sum over ``items`` labels is divided by: a batch without any has a loss of 0."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def token_loss(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """Σ CE over (N, V) logits and (N,) targets, divided by ``items``, the labels of the whole accumulated batch.

    Without ``items`` it is the mean over N. With N = 0 it is 0 and still connected to the graph.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    return total / at_least_one(targets.numel() if items is None else items)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str, items: Tensor | int | None) -> Tensor:
    """The loss of (B, C) logits: regression (MSE), single_label_classification (CE) or multi_label_… (BCE).

    Normalised like `token_loss`: by ``items`` labels, by default those of this batch.
    """
    logits = logits.float()
    if problem_type == "single_label_classification":
        labels = as_classes(labels.reshape(-1), logits.shape[-1])
        total, count = F.cross_entropy(logits, labels, reduction="sum"), (labels != IGNORED).sum()
    elif problem_type == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        count = labels.numel()
    else:
        total = F.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape), reduction="sum")
        count = labels.numel()
    return total / at_least_one(count if items is None else items)
