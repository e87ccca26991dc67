"""One run: a request becomes a trained model, its scores, and a record (see study.py and docs/evaluate.md for both forms)."""

import gc
import math
import shutil
import tempfile
import time
import traceback
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PrinterCallback

from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter, Collator, Labels, Record, encode_all
from umbra.evaluation.scoring import in_mode, score_classes, score_generation
from umbra.lab.bench.machine import Device
from umbra.lab.bench.methods import trainable
from umbra.lab.study import harness
from umbra.lab.study import record as records
from umbra.lab.study.methods import build
from umbra.lab.study.metrics import LOSS
from umbra.lab.study.tasks import Task, TaskOptions, load_task
from umbra.method.losses import IGNORED
from umbra.model.shadow_model import ShadowModel
from umbra.training.resuming import ResumableTrainer, last_checkpoint, read_progress
from umbra.training.runs import make_arguments
from umbra.training.trainers import ShadowTrainer


def run(request: dict[str, Any], folder: Path, adapters: Path | None) -> dict[str, Any]:
    """The record of a request. What fails inside is in the record, with its traceback; only an interruption is raised.

    Args:
        folder: where checkpoints lie, if `save_strategy` asks for any, and where a killed run then goes on.
        adapters: where the adapter is kept; None not to keep it.
    """
    began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        found = _run(request, folder, adapters)
        error = ""
    except Exception:  # whatever a method, a data set or a library does wrong is this run's result, not the sweep's end
        found, error = {}, traceback.format_exc()
    gc.collect()
    seconds = time.perf_counter() - began + found.get("earlier_seconds", 0.0)
    return records.make(request, found, created, seconds, error)


def _run(request: dict[str, Any], folder: Path, adapters: Path | None) -> dict[str, Any]:
    options = {n: TaskOptions(**t) for n, t in request["tasks"].items()}
    tokenizer: Any = load_tokenizer(request["base"])
    chats = ChatFormatter(tokenizer, request["chat_template"]).chats
    tasks = {
        n: load_task(n, o, chats, n == request["task"] and request["kind"] != "base")
        for n, o in options.items()
        if o.lm_eval is None
    }
    learned = tasks.get(request["task"])
    labels = None
    if learned is not None and learned.options.head == "classify":
        labels = Labels.of(r["label"] for r in (*learned.train, *learned.validation))
    classifier = None if labels is None else {**labels.config(), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(request["seed"])  # of a classifier's head
    base = load_base(request["base"], classifier=classifier, dtype=request["dtype"])
    torch.manual_seed(request["seed"])
    model = build(request["kind"], base, request["fields"], labels is not None)
    found: dict[str, Any] = {
        "trainable_parameters": trainable(model) if request["kind"] != "base" else 0,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_config": _configuration(model),
    }
    if request["kind"] != "base":
        assert learned is not None
        found |= _train(model, learned, tokenizer, labels, request, folder)
        found["file_bytes"] = _save(model, adapters, tokenizer, request["chat_template"])
    else:
        model.to("cuda" if torch.cuda.is_available() and not request["training"].get("use_cpu") else "cpu")
    model.eval()
    found["device"] = str(next(model.parameters()).device)
    if request["is_trial"]:
        assert learned is not None
        with _as(model, request["modes"][0]) as runner:
            given = learned, learned.validation, labels, request["chat_template"]
            loss = loss_of(runner, tokenizer, *given)[0]
        found["validation_loss"] = loss if math.isfinite(loss) else None
        return found
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise ValueError("Training has diverged: not all trained weights are finite.")
    own = tasks.get(request["task"])
    found |= {"scores": {}, "unscored": {}, "max_new_tokens": None if own is None else own.max_new_tokens}
    for name in request["tests"]:
        for mode in request["modes"]:
            try:
                score = _score(model, mode, name, options[name], tasks.get(name), tokenizer, labels, request)
                found["scores"].setdefault(name, {})[mode] = score
            except Exception:  # one test's trouble costs neither the training nor the other scores
                found["unscored"][name] = traceback.format_exc()
    if not found["scores"]:
        raise RuntimeError(next(iter(found["unscored"].values())))
    return found


# -- training ----------------------------------------------------------------------------------------------------------


def _train(
    model: Any, task: Task, tokenizer: Any, labels: Labels | None, request: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """By transformers' Trainer, or ours, from the same batches in the same order; checkpoints stay until there is a record."""
    given = {"save_strategy": "no", **request["training"], "seed": request["seed"]}
    last = last_checkpoint(folder) if folder.exists() else None
    arguments = make_arguments(folder, {"logging_strategy": "steps", **given})
    examples = encode_all(
        task.train, tokenizer, max_length=task.options.max_length, chat_template=request["chat_template"], labels=labels,
        name=task.name,
    )  # fmt: skip
    device = Device("cuda" if arguments.device.type == "cuda" else "cpu")
    trainer = (ShadowTrainer if isinstance(model, ShadowModel) else ResumableTrainer)(
        model=model, args=arguments, train_dataset=examples, data_collator=Collator(int(tokenizer.pad_token_id)),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    gc.collect()
    device.settle_memory()
    before = device.memory()
    with model.shadow_only() if request["kind"] == "alone" else nullcontext():
        done = trainer.train(resume_from_checkpoint=last)
    peak = device.peak_memory()
    seconds = done.metrics["train_runtime"]
    progress = None if last is None else read_progress(Path(last))
    samples = done.global_step * arguments.train_batch_size * arguments.gradient_accumulation_steps
    history = [{k: h[k] for k in ("step", "loss", "learning_rate")} for h in trainer.state.log_history if "loss" in h]
    return {
        "seconds_per_step": seconds / max(done.global_step, 1), "train_seconds": seconds,
        "earlier_seconds": 0.0 if progress is None else progress["seconds"],
        "steps": done.global_step, "samples": samples,
        "tokens": round(samples * sum(len(e["input_ids"]) for e in examples) / len(examples)), "peak_bytes": peak,
        "before_bytes": before, "train_loss": done.training_loss, "history": history,
        "arguments": {k: v for k, v in arguments.to_dict().items() if k in records.ARGUMENTS},
    }  # fmt: skip


def _save(model: Any, adapters: Path | None, tokenizer: Any, chat_template: bool) -> int:
    """Bytes of the adapter's weights, as saved."""
    if adapters is not None:
        shutil.rmtree(adapters, ignore_errors=True)  # of a run that was interrupted after it had saved
    with tempfile.TemporaryDirectory() as scratch:
        carried = {"tokenizer": tokenizer, "chat_template": chat_template} if isinstance(model, ShadowModel) else {}
        model.save_pretrained(adapters or scratch, **carried)
        return sum(f.stat().st_size for f in Path(adapters or scratch).glob("*.safetensors"))


def _configuration(model: Any) -> dict[str, Any]:
    if isinstance(model, ShadowModel):
        return {"peft_type": "UMBRA", **model.shadow_config.to_dict()}
    configs = getattr(model, "peft_config", {})
    found = next(iter(configs.values())).to_dict() if configs else {}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in found.items()}


# -- scores ------------------------------------------------------------------------------------------------------------


def _as(model: Any, mode: str) -> Any:
    return in_mode(model, mode) if isinstance(model, ShadowModel) else nullcontext(model)


def _score(
    model: Any, mode: str, name: str, options: TaskOptions, task: Task | None, tokenizer: Any, labels: Labels | None,
    request: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A score: its metric, its value, and what every item got."""
    with _as(model, mode) as runner:
        runner.eval()
        if task is None:
            return harness.score(runner, tokenizer, options, request["batch_size"])
        if task.metric == LOSS:
            each = loss_of(runner, tokenizer, task, task.test, None, request["chat_template"])[1]
            if not all(map(math.isfinite, each)):
                raise ValueError(f"The loss on {name} is not finite: training has diverged.")
            return {"metric": LOSS, "value": sum(each) / len(each), "items": each}
        if task.options.head == "classify":
            replies, seconds = score_classes(
                runner, tokenizer, task.test, batch_size=request["batch_size"], max_length=task.options.max_length, name=name
            )  # fmt: skip
            each = [{"exact": float(r["correct"])} for r in replies]
        else:
            replies, seconds, _ = score_generation(
                runner, ChatFormatter(tokenizer, request["chat_template"]), task.test, batch_size=request["batch_size"],
                max_new_tokens=task.max_new_tokens, name=name,
            )  # fmt: skip
            each = [task.score(r["reply"], t) for r, t in zip(replies, task.test, strict=True)]
        means = {k: sum(e[k] for e in each) / len(each) for k in each[0]}
        chief = next(iter(means))
        items = [round(e[chief], 4) for e in each]
        return {"metric": task.metric, "value": means[chief], "values": means, "items": items, "seconds": seconds}


@torch.no_grad()
def loss_of(
    runner: Any, tokenizer: Any, task: Task, found: list[Record], labels: Labels | None, chat_template: bool
) -> tuple[float, list[float]]:
    """Mean loss of all labelled tokens (nats a token, or a class), and each record's own mean.

    Records are cut as in training; those without a label within the task's ``max_length`` are left out.
    """
    runner.eval()
    examples = encode_all(
        found, tokenizer, max_length=task.options.max_length, chat_template=chat_template, labels=labels, name=task.name
    )
    sums, counts = [], []
    for start in tqdm(range(0, len(examples), 8), desc="loss", disable=None, leave=False):
        batch = Collator(int(tokenizer.pad_token_id))(examples[start : start + 8])
        batch = {k: v.to(runner.device) for k, v in batch.items()}
        targets = batch.pop("labels")
        for row, target in zip(runner(**batch).logits, targets, strict=True):
            own = row[-len(target) :] if labels is None else row  # PEFT's prompts stand before the tokens
            row, target = (own[None], target[None]) if labels is not None else (own[:-1], target[1:])
            sums.append(float(F.cross_entropy(row.float(), target, reduction="sum", ignore_index=IGNORED)))
            counts.append(int((target != IGNORED).sum()))
    return sum(sums) / sum(counts), [round(s / n, 5) for s, n in zip(sums, counts, strict=True)]
