"""``python -m bench.shipping.edge_torch ADAPTER MODE DTYPE THREADS REQUEST``: a request to run.py, answered in PyTorch."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import umbra
from umbra.evaluate import in_mode
from umbra.export.run import measure, peak_bytes


class Runner:
    """A model of transformers behind the calls of run.py."""

    def __init__(self, model: Any):
        self.model = model
        self.start(0)

    def start(self, room: int) -> None:
        """Forget what was read."""
        self.past: Any = None

    @torch.no_grad()
    def logits(self, ids: list[int], rows: int) -> np.ndarray:
        """(rows, V): read (T,) ids; what comes after each of the last ``rows``."""
        out = self.model(torch.tensor([ids]), past_key_values=self.past, use_cache=True, logits_to_keep=rows)
        self.past = out.past_key_values
        return out.logits[0].float().numpy()

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        return int(self.logits(ids, 1)[0].argmax())


def main() -> None:
    """The command."""
    adapter, mode, dtype, threads, request = sys.argv[1:]
    torch.set_num_threads(int(threads))
    began = time.perf_counter()
    precision = getattr(torch, dtype)
    if mode == "detached":
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(adapter, dtype=precision).eval()
        found = {"load_seconds": time.perf_counter() - began, **_measured(model, request)}
    else:
        model = umbra.load(adapter, dtype=precision).eval()
        with in_mode(model, mode) as runner:
            found = {"load_seconds": time.perf_counter() - began, **_measured(runner, request)}
    print(json.dumps({**found, "peak_bytes": peak_bytes()}))


def _measured(model: Any, request: str) -> dict[str, Any]:
    return measure(Runner(model), json.loads(Path(request).read_text(encoding="utf-8")), [])


if __name__ == "__main__":
    main()
