"""The quality of cheaper training methods: ``python -m bench.quality --data ../shared/data``; results in bench/results.

Methods of `umbra bench` with equal trainable parameters, scored on held-out training data: the loss of the answer, and the share
of answers whose tokens are all the most likely ones, as in greedy decoding. Every run is one line of JSON; the same command
resumes after a kill.
"""

import argparse
import gzip
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from umbra.base.loading import load_tokenizer
from umbra.data import Collator, Record, encode_all
from umbra.files import folder
from umbra.lab.bench.base import Base
from umbra.lab.bench.methods import LORA, METHODS, Batch, build, fit, umbra
from umbra.lab.study.statistics import mean_of_seeds
from umbra.method.losses import labelled_positions
from umbra.options import EMBEDDED

RESULTS = Path(__file__).parent / "results"
ROWS = [
    LORA,
    "Umbra",
    "Umbra α=1",
    "Umbra 4th",
    "Umbra upper half",
    "Umbra upper third",
    "Umbra lean",
]  # of dialect="paper"
KNOWN = (*METHODS, umbra("Umbra α=1", "ten times the paper's α", alpha=1.0))
RATES = {LORA: 1e-3}  # learning rate, where it is not `RATE`
RATE = 3e-3
BATCH = 8


# -- tasks -----------------------------------------------------------------------------------------------------------


def intents(row: dict[str, Any]) -> Record:
    return {"prompt": f"Request: {row['text']}\nIntent:", "completion": f" {row['label']}"}


def vitaminc(row: dict[str, Any]) -> Record:
    prompt = f"Evidence: {row['evidence']}\nClaim: {row['claim']}\nTrue, False or Neither?"
    return {"prompt": prompt, "completion": f" {row['label']}"}


class Task(NamedTuple):
    """The conversion of a row to a prompt and an answer, the optimizer steps, and the number of held-out rows."""

    form: Callable[[dict[str, Any]], Record]
    steps: int
    held_out: int


TASKS = {"intents": Task(intents, 150, 143), "vitaminc": Task(vitaminc, 150, 400)}


def load(task: str, data: Path, tokenizer: Any) -> tuple[list, list]:
    """Return training and validation examples, both from the training file."""
    form, _, held_out = TASKS[task]
    with gzip.open(data / f"{task}.train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples = encode_all([form(r) for r in rows], tokenizer, max_length=256, chat_template=False)
    return examples[held_out:], examples[:held_out]


def batches(examples: list, steps: int, seed: int, pad: int) -> Any:
    """Yield the same batches for every method."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += torch.randperm(len(examples), generator=generator).tolist()
    for i in range(steps):
        yield Collator(pad)([examples[j] for j in order[i * BATCH : (i + 1) * BATCH]])


def train(
    model: Any, loss: Callable[[Any, Batch], torch.Tensor], data: Any, steps: int, rate: float, title: str
) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warm) / (steps - warm)))
    )
    model.train()
    for batch in tqdm(data, total=steps, desc=title, leave=False, disable=None):
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def score(model: Any, examples: list, pad: int) -> dict[str, float]:
    """Return the mean loss of the answers' tokens, and the share of answers whose tokens are all correct."""
    model.eval()
    total, right = 0.0, 0
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    for start in range(0, len(examples), 16):
        batch = Collator(pad)(examples[start : start + 16])
        labels = batch.pop("labels")
        positions, targets = labelled_positions(labels)
        logits = model(**batch).logits.flatten(0, 1)[positions].float()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        rows = positions // labels.shape[1]
        sums = torch.zeros(len(labels)).index_add_(0, rows, losses)
        counts = torch.zeros(len(labels)).index_add_(0, rows, torch.ones_like(losses))
        wrong = torch.zeros(len(labels)).index_add_(0, rows, (logits.argmax(-1) != targets).float())
        total += float((sums / counts).sum())
        right += int((wrong == 0).sum())
    return {"loss": total / len(examples), "accuracy": right / len(examples)}


def run(data: Path, tasks: list[str], rows: list[str], seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """Run every task, method and seed that is not in ``out`` yet, and return all runs."""
    done = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    known = {(r["task"], r["method"], r["seed"]) for r in done}
    tokenizer: Any = load_tokenizer(EMBEDDED)
    base = Base.named(EMBEDDED, torch.bfloat16, torch.device("cpu"))
    methods = [m for m in KNOWN if m.name in rows]
    rank, widths = fit(base, methods, 8)
    for seed, task, method in itertools.product(seeds, tasks, methods):
        if (task, method.name, seed) in known:
            continue
        examples, held_out = load(task, data, tokenizer)
        model = build(base, [method], rank, widths, seed)[method.name]
        steps, rate = TASKS[task].steps, RATES.get(method.name, RATE)
        stream = batches(examples, steps, seed, tokenizer.pad_token_id)
        train(model, method.loss, stream, steps, rate, f"{task}, {method.name}, seed {seed}")
        scores = score(model, held_out, tokenizer.pad_token_id)
        done.append({"task": task, "method": method.name, "seed": seed, "rate": rate, **scores})
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return done


# -- report --------------------------------------------------------------------------------------------------------


def text(runs: list[dict[str, Any]]) -> str:
    """Return the page."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in {"Umbra": RATE, **RATES}.items())
    lines = [
        "# Quality of cheaper training methods", "",
        f"{EMBEDDED} in bf16, batches of {BATCH}, equal trainable parameters, no dropout; learning rates {rates}. Scored on",
        "held-out records of the training file. Mean over seeds ± half the 95 % confidence interval; the difference to *Umbra* is",
        "paired by seed. All variants of Umbra use `dialect=\"paper\"`. `python -m bench.quality`.",
    ]  # fmt: skip
    for task in dict.fromkeys(r["task"] for r in runs):
        lines += [
            "", f"## {task}: {TASKS[task].steps} steps, {TASKS[task].held_out} held out", "",
            "| method | seeds | loss of the answer | minus Umbra's | accuracy |", "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        ours = {r["seed"]: r for r in runs if r["task"] == task and r["method"] == "Umbra"}
        for name in (n for n in ROWS if any(r["task"] == task and r["method"] == n for r in runs)):
            selected = [r for r in runs if r["task"] == task and r["method"] == name]
            differences = [r["loss"] - ours[r["seed"]]["loss"] for r in selected if r["seed"] in ours]
            losses = [f"{m:.3f} ± {h:.3f}" for m, h in map(mean_of_seeds, ([r["loss"] for r in selected], differences))]
            mean, half = mean_of_seeds([100 * r["accuracy"] for r in selected])
            losses[1] = "" if name == "Umbra" else losses[1]
            lines.append(f"| {name} | {len(selected)} | {losses[0]} | {losses[1]} | {mean:.1f} % ± {half:.1f} |")
    return "\n".join(lines) + "\n"


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of each method: one dot per seed, a bar at the mean."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in runs))
    figure = Figure(figsize=(5.5 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        names = [n for n in ROWS if any(r["task"] == task and r["method"] == n for r in runs)]
        for y, name in enumerate(names):
            losses = [r["loss"] for r in runs if r["task"] == task and r["method"] == name]
            axes.plot(
                losses, [y] * len(losses), "o", color="#4e79a7" if name.startswith("Umbra") else "#b03a2e", alpha=0.6
            )
            axes.plot([statistics.mean(losses)] * 2, [y - 0.3, y + 0.3], color="#333333")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set(title=task, xlabel="loss of a held-out answer, by seed")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    """Run what is missing, and write the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.train.jsonl.gz")
    parser.add_argument("--tasks", nargs="+", default=["intents"], choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=[m.name for m in KNOWN])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    runs = run(given.data, given.tasks, given.rows, given.seeds, RESULTS / "quality.jsonl")
    folder.write_text(RESULTS / "quality.md", text(runs))
    picture(runs, RESULTS / "quality.png")
    print(text(runs))


if __name__ == "__main__":
    main()
