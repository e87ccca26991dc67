"""Input scales: the size of each channel of the base's hidden states, measured once by `attach`.

Of the 576 channels of SmolLM2-135M three hold 58 – 87 % of a hidden state's energy (`bench/channels.py`). W_down, initialized
at random, reads little else, and its updates for them change the correction most. With ``input_scale="measured"`` the
injection before block l reads (h − s) ⊙ c instead, where over N tokens (random, with a fixed seed) and D channels

    c_d = m / max(rms_d, m / 20),    rms_d² = Σ_n h²_nd / N,    m = median over tokens of |h_n| / √D

so that every channel has the size of the whole, and the correction keeps its strength. It is a change of coordinates: with
AdamW it gives each column of W_down its own learning rate, and c ⊙ W_down is W_down of the unscaled form.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from umbra.base import architectures, sharded
from umbra.base.architectures import Architecture
from umbra.method.core import Couplings

ROWS, LENGTH, SEED = 32, 32, 0  # of the random tokens
LARGEST = 20.0  # the largest scale, of a silent channel


@torch.no_grad()
def measure(base: Architecture, couplings: Couplings) -> None:
    """Measure the input scale of every injection by a forward of the base.

    Args:
        base: its parts; no shadow may be active on it.
        couplings: their scales are set.
    """
    generator = torch.Generator().manual_seed(SEED)
    rows = architectures.vocabulary_size(base.embeddings)
    length = min(LENGTH, architectures.positions(base.model.config) or LENGTH)
    ids = torch.randint(rows, (ROWS, length), generator=generator).to(architectures.device_of(base.embeddings))
    scales: dict[int, Tensor] = {}
    handles = [
        base.blocks[l].register_forward_pre_hook(_recorder(scales, l, base.stream), with_kwargs=True)
        for l in couplings.layers
    ]
    before = architectures.modes(base.model)
    base.model.eval()
    try:
        with sharded.gathered_while_computing(base.decoder):
            base.decoder(input_ids=ids, use_cache=False)
    finally:
        architectures.restore_modes(base.model, before)
        for handle in handles:
            handle.remove()
    for l, scale in scales.items():
        couplings.injections[str(l)].get_parameter("channels").copy_(scale)


def _recorder(
    scales: dict[int, Tensor], l: int, stream: int | None
) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """Return a hook that records the scale of block l's input."""

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        scales[l] = scale_of((h if stream is None else h[stream]).flatten(0, -2).float())

    return record


def scale_of(h: Tensor) -> Tensor:
    """Return the scale c (D,) for hidden states (N, D)."""
    size = h.square().mean(1).sqrt().median()
    return size / torch.maximum(h.square().mean(0).sqrt(), size / LARGEST)
