"""Answer a request for run.py in PyTorch: ``python -m bench.shipping.edge_torch FOLDER MODE DTYPE THREADS REQUEST``."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import umbra
from umbra.deploy.export.run import peak_bytes
from umbra.evaluation.scoring import in_mode


@torch.no_grad()
def measure(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return greedy answers of `generate` and their times; without an end token, all answers have the same length."""
    new, end = request["max_new_tokens"], request["end"]
    settings = {"do_sample": False, "eos_token_id": end or None, "pad_token_id": 0}
    answers, first, more, seconds = [], [], 0, 0.0
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        given, began = {"attention_mask": torch.ones_like(ids), **settings}, time.perf_counter()
        model.generate(ids, max_new_tokens=1, **given)
        one, began = time.perf_counter() - began, time.perf_counter()
        answers.append(model.generate(ids, max_new_tokens=new, **given)[0, len(prompt) :].tolist())
        first.append(one)
        more, seconds = more + len(answers[-1]) - 1, seconds + time.perf_counter() - began - one
    return {"answers": answers, "first_token_seconds": first, "tokens_per_second": more / seconds if more else None}


def main() -> None:
    """Run the command."""
    folder, mode, dtype, threads, file = sys.argv[1:]
    torch.set_num_threads(int(threads))
    request, began = json.loads(Path(file).read_text(encoding="utf-8")), time.perf_counter()
    if mode == "detached":
        from transformers import AutoModelForCausalLM

        edge = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        result = {"load_seconds": time.perf_counter() - began, **measure(edge, request)}
    else:
        model = umbra.load(folder, dtype=getattr(torch, dtype)).eval()
        with in_mode(model, mode) as runner:
            result = {"load_seconds": time.perf_counter() - began, **measure(runner, request)}
    print(json.dumps({**result, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
