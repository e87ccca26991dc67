"""Run the demo end to end on a real base: data, training, evaluation, detaching, loss curve.

Everything is written to ``out/demo``; existing results are reused.
"""

import json
import platform
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml

import umbra
from umbra.data import ChatFormatter, Record
from umbra.deploy.detach import write_detached
from umbra.deploy.opening import MODES, Opened, open_model
from umbra.evaluation.scores import Score, table
from umbra.evaluation.scoring import in_mode, score
from umbra.options import EvalOptions
from umbra.training.train import train

HERE, OUT = Path(__file__).parent, Path("out/demo")
TASK = "family_relationships"
# Number of records and seed of each split. A generator draws item i from seed + i, so the seeds are far apart.
SPLITS = {"train": (1760, 0), "validation": (64, 1_000_000), "test": (300, 3_000_000)}
SYSTEM = "Answer with one word."
RELATIONS = (
    "mother-in-law|father-in-law|sister-in-law|brother-in-law|daughter-in-law|son-in-law|grandmother|grandfather|"
    "granddaughter|grandson|mother|father|daughter|son|sister|brother|wife|husband|aunt|uncle|niece|nephew|cousin"
)
# The last relation in a reply is its answer, so that the base may answer in a sentence.
OPTIONS = EvalOptions(
    adapter=str(OUT / "adapter"),
    data=str(OUT / "test.jsonl"),
    batch_size=25,
    max_new_tokens=24,
    answer_pattern=rf"(?i)\b({RELATIONS})\b",
)


def make_data() -> None:
    """Write the splits, with no question in more than one."""
    import reasoning_gym

    OUT.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split in reversed(SPLITS):  # the test set first, so that it is complete
        size, seed = SPLITS[split]
        items = [x for x in reasoning_gym.create_dataset(TASK, size=size, seed=seed) if x["question"] not in seen]
        seen |= {x["question"] for x in items}
        lines = [json.dumps(_record(x), ensure_ascii=False) for x in items]
        (OUT / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _record(item: dict[str, Any]) -> Record:
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": item["question"]}]
    return {"prompt": prompt, "completion": str(item["answer"])}


def read(split: str) -> list[Record]:
    """Return the records of a split."""
    return [json.loads(line) for line in (OUT / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def decoding_speeds(model: umbra.ShadowModel, writer: ChatFormatter, record: Record, new: int = 64) -> dict[str, float]:
    """Return tokens/s of greedy decoding at batch size 1 by mode: medians of five interleaved rounds."""
    ids = torch.tensor([writer.tokens(writer.prompt(record))])
    detached = model.detached()
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(5):
        for mode in MODES:
            with nullcontext(detached) if mode == "detached" else in_mode(model, mode) as runner:
                began = time.perf_counter()
                runner.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                    do_sample=False, pad_token_id=writer.tokenizer.pad_token_id,
                )  # fmt: skip
                seconds[mode].append(time.perf_counter() - began)
    return {mode: new / statistics.median(times) for mode, times in seconds.items()}


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss curves of the pair and of the shadow alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weight = yaml.safe_load((HERE / "train.yaml").read_text())["auxiliary_loss_weight"]
    logs = [h for h in history if "loss" in h and "shadow_loss" in h]
    steps = [h["step"] for h in logs]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        steps, [h["loss"] - weight * h["shadow_loss"] for h in logs], label="attached: base + shadow", color="#4c3a9e"
    )
    axes.plot(steps, [h["shadow_loss"] for h in logs], label="the shadow alone", color="#e08a2e")
    axes.set(yscale="log", xlabel="step", ylabel="cross-entropy per answer token", title=f"Training on {TASK}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure(opened: Opened, records: list[Record]) -> tuple[list[Score], list[dict[str, Any]]]:
    """Return the scores and replies of every mode; the speed is measured by decoding at batch size 1."""
    speeds = decoding_speeds(cast(umbra.ShadowModel, opened.model), opened.formatter, records[0])
    scores, samples = [], [{"prompt": r["prompt"][-1]["content"], "reference": r["completion"]} for r in records]
    for mode in MODES:
        result, replies = score(opened, records, mode, OPTIONS)
        scores.append(replace(result, tokens_per_second=speeds[mode]))
        for sample, reply in zip(samples, replies, strict=True):
            sample[mode] = reply["reply"].strip()
    return scores, samples


def main() -> None:
    """Run the demo, or show the results of an earlier run."""
    settings = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))
    if not all((OUT / f"{split}.jsonl").exists() for split in SPLITS):
        make_data()
    began = time.perf_counter()
    print(f"1/4  training a shadow for {settings['base']} on {TASK} → {OUT / 'adapter'}")
    metrics = train(settings)
    print(f"     {metrics['train_runtime']:.0f} s of training, {metrics['global_step']} steps")

    adapter = json.loads((OUT / "adapter/adapter_config.json").read_text(encoding="utf-8"))["adapter_id"]
    results_file = OUT / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {}
    if results.get("adapter_id") != adapter or not (OUT / "detached/config.json").exists():
        print("2/4  scoring base, attached and detached on unseen seeds")
        opened = open_model(str(OUT / "adapter"), dtype=settings["dtype"])
        scores, samples = measure(opened, read("test"))
        print(f"3/4  detaching → {OUT / 'detached'}")
        write_detached(
            cast(umbra.ShadowModel, opened.model), OUT / "detached", opened.formatter.tokenizer, overwrite=True
        )
        results = {
            "adapter_id": adapter,
            "task": TASK,
            "test_seed": SPLITS["test"][1],
            "scores": [asdict(s) for s in scores],
            "samples": samples[:12],
            "training": metrics,
            "trainable_parameters": metrics["trainable_parameters"],
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {p: version(p) for p in ("umbra-peft", "torch", "transformers", "reasoning-gym")},
            "date": date.today().isoformat(),
        }
        results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        print("2/4  scores exist\n3/4  the detached model exists")
    print(f"4/4  loss curve → {OUT / 'loss.png'}\n")
    plot(json.loads((OUT / "adapter/run.json").read_text(encoding="utf-8"))["history"], OUT / "loss.png")

    scores = [Score(**s) for s in results["scores"]]
    print(table(scores))
    print(f"\n{results['trainable_parameters'] / 1e6:.1f} M trained parameters. Some answers:\n")
    for sample in results["samples"][:5]:
        print("  " + re.sub(r"\s+", " ", sample["prompt"]))
        print("    answer: " + sample["reference"] + "".join(f" · {mode}: {sample[mode]!r}" for mode in MODES) + "\n")
    for name in ("adapter", "detached", "results.json", "loss.png"):
        print(f"  {OUT / name}")
    command = f"{Path(sys.executable).parent / 'umbra'} generate {OUT / 'adapter'} 'Who is the wife of my brother?'"
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Try: {command}")


if __name__ == "__main__":
    main()
