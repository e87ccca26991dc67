"""A shadow pretrained for one base, attached to a base of another width with the same tokenizer.

The other base is SmolLM2 with its channels shuffled and padded to `WIDTH`: the same logits from other weights. The projection of
the shadow is solved for by least squares.
"""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import umbra
from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter
from umbra.data.corpus import hold_out, pack, read_documents
from umbra.options import EMBEDDED
from umbra.training.pretrain import measure, pretrain

from .text import write_text

WIDTH, BLOCKS, LENGTH = 720, 32, 256
ALIGNMENT: dict[str, Any] = {
    "stages": "alignment", "max_steps": 60, "per_device_train_batch_size": 4, "auxiliary_loss_every": 4, "learning_rate": 3e-4,
    "max_length": LENGTH, "held_out": BLOCKS, "dtype": "float32", "dropout": 0.0, "bf16": True,
    "save_strategy": "no",
}  # fmt: skip


@torch.no_grad()
def widened(base: Any, width: int, seed: int = 0) -> Any:
    """Return a Llama of another width with the same logits: its new channels are 0, and its norms are rescaled."""
    config, old = copy.deepcopy(base.config), base.config.hidden_size
    config.head_dim, config.hidden_size = base.config.head_dim, width
    config.rms_norm_eps *= old / width
    wide = type(base)(config).to(base.dtype).eval()
    places = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:old]
    for (name, new), was in zip(wide.named_parameters(), base.parameters(), strict=True):
        if "norm" in name:
            new[places] = was * (old / width) ** 0.5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            new.zero_()
            new[places] = was
        else:
            new.zero_() if "embed" in name else None
            new[:, places] = was
    wide.generation_config = copy.deepcopy(base.generation_config)
    return wide


def run(data: Path, out: Path, folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Return the divergence of a shadow on held-out text with its base and with the other base, before and after alignment.

    Args:
        data: The folder of the data sets.
        out: The folder for runs.
        folder: The pretrained shadow.
        seeds: The seeds of random projections and of the alignment.
    """
    files = write_text(data, out / "short text", 120)
    tokenizer: Any = load_tokenizer(EMBEDDED)
    writer = ChatFormatter(tokenizer)
    blocks = [pack(read_documents(f, "train", writer), writer, LENGTH, f) for f in files]
    held_out = hold_out(blocks, BLOCKS)[1]
    base: Any = load_base(EMBEDDED, dtype=torch.float32)
    wide, ids = widened(base, WIDTH), torch.as_tensor(held_out[:2, :64], dtype=torch.long)
    apart = float((wide(ids).logits - base(ids).logits).abs().max())
    rows = [{"beside": f"its own base, width {base.config.hidden_size}", **_measured(base, folder, held_out)}]
    other = {"logits_apart": apart}
    place = f"a base of width {WIDTH}"
    rows += [
        {"beside": f"{place}, projection at random", **other, **_measured(wide, folder, held_out, s)} for s in seeds
    ]
    rows.append({"beside": f"{place}, projection solved for", **other, **_measured(wide, folder, held_out)})
    path = out / "wide base"
    if not path.exists():
        wide.save_pretrained(path)
        tokenizer.save_pretrained(path)
    given = {**ALIGNMENT, "base": str(path), "shadow": str(folder), "data": ",".join(files)}
    for seed in seeds:
        began = time.perf_counter()
        after = pretrain({**given, "output_dir": str(out / f"aligned {seed}"), "seed": seed})["1-alignment"]
        rows.append({"beside": f"{place}, then trained", "seconds": time.perf_counter() - began, **after})
    return rows


def _measured(base: Any, folder: Path, held_out: np.ndarray, seed: int | None = None) -> dict[str, float]:
    """Measure the solved projection, or a random one with ``seed``."""
    torch.manual_seed(seed or 0)
    began = time.perf_counter()
    model: Any = umbra.attach(base, umbra.ShadowConfig(shadow=str(folder)))
    seconds = time.perf_counter() - began
    if seed is not None:
        model.shadow.projection.reset_parameters()
    metrics = measure(model, held_out, 8)
    model.unload()
    return {"seconds": seconds, **metrics}
