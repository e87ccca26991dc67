"""How large each channel of the base's hidden states is, measured once, at `attach`.

Of the 576 channels of SmolLM2-135M three hold 58 – 87 % of a hidden state's energy (`bench/channels.py`): W_down, which starts
at random, reads little else, and what it learns of them moves the correction most. With ``input_scale="measured"`` the
injection before block l reads (h − s) ⊙ c instead, where over N tokens (at random, always the same ones) and D channels

    c_d = m / max(rms_d, m / 20),    rms_d² = Σ_n h²_nd / N,    m = median over tokens of |h_n| / √D

so that every channel is as loud as the whole, and the correction as strong as before. It is a change of coordinates: with AdamW
a rate of its own for each column of W_down, and c ⊙ W_down is W_down of the plain form.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from umbra.base import architectures, sharded
from umbra.base.architectures import Anatomy
from umbra.method.core import Couplings

ROWS, LENGTH, SEED = 32, 32, 0  # of the tokens
LARGEST = 20.0  # c of a channel that is silent


@torch.no_grad()
def measure(base: Anatomy, couplings: Couplings) -> None:
    """Set c of every injection by a forward of the base; it must not carry a shadow that is in use."""
    generator = torch.Generator().manual_seed(SEED)
    rows = architectures.vocabulary_size(base.embeddings)
    length = min(LENGTH, architectures.positions(base.model.config) or LENGTH)
    ids = torch.randint(rows, (ROWS, length), generator=generator).to(architectures.device_of(base.embeddings))
    found: dict[int, Tensor] = {}
    handles = [
        base.blocks[l].register_forward_pre_hook(partial(_keep, found, l, base.stream), with_kwargs=True)
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
    for l, scale in found.items():
        injection: Any = couplings.injections[str(l)]
        injection.channels.copy_(scale)


def _keep(found: dict[int, Tensor], l: int, stream: int | None, block: nn.Module, args: tuple, kwargs: dict) -> None:
    h = args[0] if args else kwargs["hidden_states"]
    found[l] = scale_of((h if stream is None else h[stream]).flatten(0, -2).float())


def scale_of(h: Tensor) -> Tensor:
    """c (D,), of hidden states (N, D)."""
    whole = h.square().mean(1).sqrt().median()
    return whole / torch.maximum(h.square().mean(0).sqrt(), whole / LARGEST)
