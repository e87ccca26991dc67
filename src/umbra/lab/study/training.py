"""Train the model of a request with transformers' Trainer, and save its adapter."""

import gc
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from umbra.data import Collator, Labels, encode_all
from umbra.lab.bench.machine import Device
from umbra.lab.study import records
from umbra.lab.study.requests import Request
from umbra.lab.study.tasks import Task
from umbra.model.shadow_model import ShadowModel
from umbra.training.resuming import ResumableTrainer, last_checkpoint, read_progress
from umbra.training.runs import make_arguments
from umbra.training.trainers import ShadowTrainer


def train_model(
    model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, labels: Labels | None, request: Request,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train a model on a task. All methods get the same batches in the same order.

    Args:
        model: The model to train.
        task: The task.
        tokenizer: Its tokenizer.
        labels: The classes, for a classification head.
        request: The request of the run.
        folder: The folder for checkpoints, which stay until the record is written.

    Returns:
        Time, memory, steps and losses; see docs/guides/studies.md.
    """
    settings = {"save_strategy": "no", **request["training"], "seed": request["seed"]}
    last = last_checkpoint(folder) if folder.exists() else None
    arguments = make_arguments(folder, {"logging_strategy": "steps", **settings})
    examples = encode_all(
        task.train, tokenizer, max_length=task.options.max_length, chat_template=request["chat_template"], labels=labels,
        name=task.name,
    )  # fmt: skip
    device = Device("cuda" if arguments.device.type == "cuda" else "cpu")
    trainer_class = ShadowTrainer if isinstance(model, ShadowModel) else ResumableTrainer
    trainer = trainer_class(
        model=cast(Any, model), args=arguments, train_dataset=cast(Any, examples),
        data_collator=Collator(cast(int, tokenizer.pad_token_id)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    gc.collect()
    device.reset_peak_memory()
    before = device.memory()
    is_alone = request["kind"] == "alone"
    with model.shadow_only() if is_alone and isinstance(model, ShadowModel) else nullcontext():
        result = trainer.train(resume_from_checkpoint=last)
    peak = device.peak_memory()
    seconds = result.metrics["train_runtime"]
    progress = None if last is None else read_progress(Path(last))
    samples = result.global_step * arguments.train_batch_size * arguments.gradient_accumulation_steps
    history = [{k: h[k] for k in ("step", "loss", "learning_rate")} for h in trainer.state.log_history if "loss" in h]
    return {
        "seconds_per_step": seconds / max(result.global_step, 1), "train_seconds": seconds,
        "earlier_seconds": 0.0 if progress is None else progress["seconds"],
        "steps": result.global_step, "samples": samples,
        "tokens": round(samples * sum(len(e["input_ids"]) for e in examples) / len(examples)), "peak_bytes": peak,
        "before_bytes": before, "train_loss": result.training_loss, "history": history,
        "arguments": {k: v for k, v in arguments.to_dict().items() if k in records.ARGUMENTS},
    }  # fmt: skip


def save_adapter(
    model: nn.Module, adapters: Path | None, tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> int:  # fmt: skip
    """Save the adapter and return the size of its weights in bytes.

    Args:
        model: The trained model.
        adapters: The folder to save in; None to discard the files.
        tokenizer: Saved along with a shadow.
        chat_template: Whether the model was trained with the chat template.
    """
    if adapters is not None:
        shutil.rmtree(adapters, ignore_errors=True)  # left by a run that was interrupted after saving
    with tempfile.TemporaryDirectory() as scratch:
        target = adapters or Path(scratch)
        if isinstance(model, ShadowModel):
            model.save_pretrained(target, tokenizer=tokenizer, chat_template=chat_template)
        else:
            cast(PreTrainedModel, model).save_pretrained(str(target))  # PEFT's models have the same method
        return sum(f.stat().st_size for f in target.glob("*.safetensors"))


def configuration_of(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of a model's adapter as plain values; empty for the bare base."""
    if isinstance(model, ShadowModel):
        return {"peft_type": "UMBRA", **model.shadow_config.to_dict()}
    if isinstance(model, PreTrainedModel):
        return {}
    peft_configs = cast(dict[str, Any], model.peft_config)
    values = next(iter(peft_configs.values())).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
