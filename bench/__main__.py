"""Times a training step, prefill and decoding of every method side by side, and each one's peak memory.

Everything is interleaved in one process, in medians; only the memory is measured in a process each. A method is timed
only after its logits at initialisation were found equal to the base's.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import methods as room

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 49152


def batch(rows: int, length: int, labelled: float) -> dict[str, torch.Tensor]:
    """Random tokens, of which the last share is labelled."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward; the forward alone for the bare base."""
    if name == "bare base":
        with torch.no_grad():
            model(**{k: v for k, v in inputs.items() if k != "labels"})
        return
    model.train()
    model(**inputs).loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def prefill(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """One forward over a prompt, keeping the logits of its last token as generation does."""
    model.eval()
    model(**{k: v for k, v in inputs.items() if k != "labels"})


def decode(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """32 new tokens after 32, one row, greedy."""
    model.eval()
    model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=32, min_new_tokens=32,
        do_sample=False, pad_token_id=0, use_cache=True,
    )  # fmt: skip


CASES: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "step, 4 × 128, all labelled": (step, batch(4, 128, 1.0)),
    "step, 4 × 128, a third labelled": (step, batch(4, 128, 1 / 3)),
    "prefill, 4 × 128": (prefill, batch(4, 128, 1.0)),
    "decode, 32 + 32": (decode, batch(1, 32, 1.0)),
}


@torch.no_grad()
def check_equal(models: dict[str, Any]) -> None:
    """At initialisation every method answers as the base does; nothing is timed otherwise."""
    inputs = {k: v for k, v in batch(2, 16, 1.0).items() if k != "labels"}
    expected = models["bare base"].eval()(**inputs).logits
    for name, model in models.items():
        difference = float((model.eval()(**inputs).logits - expected).abs().max())
        assert difference <= 1e-3 * float(expected.abs().max()), f"{name} differs from the base by {difference}"


def timings(models: dict[str, Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    """case → method → seconds of each round, the methods in turn within a round."""
    found: dict[str, dict[str, list[float]]] = {}
    for case, (run, inputs) in CASES.items():
        found[case] = {name: [] for name in models}
        for number in range(rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                run(name, model, inputs)
                if number:  # the first round warms up
                    found[case][name].append(time.perf_counter() - began)
            print(f"{case}: round {number} of {rounds}", file=sys.stderr)
    return found


def peak_memory(names: list[str], dtype: str) -> dict[str, float]:
    """Peak resident memory in GB of one step on 8 × 256, a third labelled, each method in a process of its own."""
    found = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", "bench", "--memory-of", name, "--dtype", dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        found[name] = float(done.stdout.splitlines()[-1])
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: each case as a ratio to PEFT LoRA, and the seconds of LoRA."""
    names = list(result["trainable"])
    rows = ["| | trainable | " + " | ".join(result["seconds"]) + " | peak memory of a step, 8 × 256 |"]
    rows.append("|---" * (len(result["seconds"]) + 3) + "|")
    for name in names:
        cells = []
        for times in result["seconds"].values():
            reference = statistics.median(times["PEFT LoRA"])
            ratios = [t / r for t, r in zip(times[name], times["PEFT LoRA"], strict=True)]
            seconds = f" ({reference:.2f} s)" if name == "PEFT LoRA" else f" [{min(ratios):.2f} – {max(ratios):.2f}]"
            cells.append(f"{statistics.median(ratios):.2f}{seconds}")
        memory = result["memory"].get(name)
        cells.append("–" if memory is None else f"{memory:.2f} GB")
        rows.append(f"| {name} | {result['trainable'][name] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run everything and write JSON and Markdown to bench/results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    builders = room.methods(target=room.trainable(room.lora(torch.float32)))
    torch.manual_seed(0)
    if options.memory_of:
        step(options.memory_of, builders[options.memory_of](dtype), batch(8, 256, 1 / 3))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    memory = {} if options.no_memory else peak_memory(list(builders), options.dtype)
    models = {name: build(dtype) for name, build in builders.items()}
    check_equal(models)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {p: version(p) for p in ("umbra-peft", "torch", "transformers", "peft", "shadow-peft")},
        "base": f"SmolLM2-135M-Instruct, {options.dtype}",
        "trainable": {name: room.trainable(model) for name, model in models.items()},
        "memory": memory,
        "seconds": timings(models, options.rounds),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"Ratios to PEFT LoRA, medians [min – max] of {options.rounds} interleaved rounds. {result['base']}; "
    text += f"{result['machine']}; {result['date']}; {result['versions']}.\n\n{table(result)}\n"
    (RESULTS / f"{options.dtype}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
