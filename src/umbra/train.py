"""The run behind ``umbra train``: settings, data, `ShadowTrainer`, and an output folder that can be resumed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.utils import logging

from . import checkpoint, folder
from .bases import load_base, load_tokenizer
from .config import ShadowConfig
from .data import Collator, Labels, Record, encode_all, read_records, record_kind
from .drafting import frequent_tokens
from .errors import CheckpointError, ConfigError, DataError, unknown_key
from .model import attach
from .options import TrainOptions, check_dtype, check_types, names, speaks
from .trainers import ShadowTrainer

RUN_FILE = "run.json"  # what a run was asked for; lies in its output folder
DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
}
POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Fields that may differ between a run and its continuation: they change nothing that is learned.
HARMLESS = ("overwrite", "disable_tqdm", "report_to", "logging_dir", "save_total_limit", "resume_from_checkpoint")


def split_options(values: dict[str, Any]) -> tuple[TrainOptions, ShadowConfig, dict[str, Any]]:
    """Sort flat settings into the run's own, the shadow's and TrainingArguments'.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), or a required one missing.
    """
    arguments = [f for f in TrainingArguments.__dataclass_fields__ if not f.startswith("_")]
    known = [*names(TrainOptions, ShadowConfig), *arguments]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, "the training configuration")
    options = TrainOptions(**{k: v for k, v in values.items() if k in names(TrainOptions)})
    check_types(TrainOptions, asdict(options))
    shadow = ShadowConfig(**{k: v for k, v in values.items() if k in names(ShadowConfig)})
    for required in ("train_data", "output_dir"):
        if not getattr(options, required):
            raise ConfigError(f"{required} is missing: set it in the configuration, or by --{required}.")
    check_dtype(options.dtype)
    if options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {options.max_length}.")
    rest = {k: v for k, v in values.items() if k in arguments and k not in names(TrainOptions, ShadowConfig)}
    check_types(TrainingArguments, rest)
    return options, shadow, rest


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter; the same call again goes on where a killed run stopped, or returns what a finished one found.

    Under ``accelerate launch`` or ``torchrun`` every rank calls it, and rank 0 writes.

    Args:
        values: flat settings: fields of TrainOptions, ShadowConfig and transformers' TrainingArguments.

    Returns:
        The run's metrics: train_loss, train_runtime, global_step, trainable_parameters, eval_… of the last evaluation.

    Raises:
        ConfigError, DataError, BaseModelError: before any training.
        CheckpointError: the output folder holds another run or adapter.
    """
    options, shadow, rest = split_options(values)
    out = Path(options.output_dir)
    arguments = _arguments(options, rest)
    try:
        with arguments.main_process_first(local=False):
            finished = _claim(out, options, shadow, rest)
            last = _last_checkpoint(out)
    except OSError as error:
        raise CheckpointError(f"output_dir={out} cannot be used: {error}") from error
    if finished is not None:
        return finished

    if not speaks():
        logging.disable_progress_bar()
    records = read_records(options.train_data, options.train_split)
    eval_records = read_records(options.eval_data, options.eval_split) if options.eval_data else None
    labels = _labels(records, eval_records)
    tokenizer = load_tokenizer(options.base)
    pad = tokenizer.pad_token_id
    classifier = None if labels is None else {**labels.config(), "pad_token_id": pad}
    base = load_base(options.base, classifier=classifier, dtype=options.dtype)
    encode = {"max_length": options.max_length, "chat_template": options.chat_template, "labels": labels}
    train_set = encode_all(records, tokenizer, name="train_data", **encode)
    eval_set = encode_all(eval_records, tokenizer, name="eval_data", **encode) if eval_records else None

    torch.manual_seed(arguments.seed)
    model: Any = attach(base, shadow)
    if labels is None:
        ends: Any = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        model.set_draft_vocabulary(frequent_tokens([e["labels"] for e in train_set], also=ends))
    if arguments.should_save:
        _record(out, options, shadow, rest)
    trainer = ShadowTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,  # type: ignore[arg-type]
        eval_dataset=eval_set,  # type: ignore[arg-type]
        processing_class=tokenizer,
        data_collator=Collator(int(pad)),  # type: ignore[arg-type]
        compute_metrics=_accuracy if labels and labels.problem_type == "single_label_classification" else None,
    )
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    metrics = {**result.metrics, "global_step": result.global_step}
    metrics["trainable_parameters"] = model.num_trainable_parameters()
    if eval_set is not None:
        metrics |= trainer.evaluate()
    if arguments.should_save:
        _record(out, options, shadow, rest, metrics, trainer.state.log_history)
    return metrics


def _arguments(options: TrainOptions, rest: dict[str, Any]) -> TrainingArguments:
    given = {**DEFAULTS, **({"eval_strategy": "epoch"} if options.eval_data else {}), **rest}
    for name in POSITIVE:
        if given.get(name, 1) < 1:
            raise ConfigError(f"{name} must be at least 1, got {given[name]}.")
    if not 0 <= given.get("seed", 0) < 2**32:
        raise ConfigError(f"seed must lie in [0, 2³²), got {given['seed']}.")
    try:
        return TrainingArguments(output_dir=options.output_dir, **given)
    except Exception as error:  # their checks, and those of accelerate's and deepspeed's part, raise many types
        raise ConfigError(f"transformers' TrainingArguments refuse these settings: {error!s:.500}") from error


def _labels(records: list[Record], eval_records: list[Record] | None) -> Labels | None:
    kind = record_kind(records[0], "the training data's first record")
    if eval_records is not None and record_kind(eval_records[0], "the evaluation data") != kind:
        raise DataError(f"The training data holds {kind} records, the evaluation data another kind.")
    return Labels.of(r["label"] for r in records) if kind == "label" else None


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


# -- the output folder -------------------------------------------------------------------------------------------------


def _asked(options: TrainOptions, shadow: ShadowConfig, rest: dict[str, Any]) -> dict[str, Any]:
    asked = {**asdict(options), **shadow.to_dict(), **rest}
    return json.loads(json.dumps({k: v for k, v in asked.items() if k not in HARMLESS}, default=str))


def _claim(out: Path, options: TrainOptions, shadow: ShadowConfig, rest: dict[str, Any]) -> dict[str, Any] | None:
    """Make sure that the output folder is this run's; its metrics where it has finished."""
    asked, file = _asked(options, shadow, rest), folder.find(out, RUN_FILE)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"output_dir={out} is a file.")
    if options.overwrite:
        for name in (RUN_FILE, checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.CARD_FILE):
            (out / name).unlink(missing_ok=True)
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)
        return None
    if not file.exists():
        for name in (checkpoint.CONFIG_FILE, "config.json"):
            if folder.find(out, name).exists():
                raise CheckpointError(
                    f"{out} already holds another adapter or model: choose another output_dir, or overwrite."
                )
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        before = run["asked"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Choose another output_dir, or overwrite.") from error
    changed = sorted(k for k in asked.keys() | before.keys() if asked.get(k) != before.get(k))
    if changed:
        differences = ", ".join(f"{k}: {before.get(k)!r} → {asked.get(k)!r}" for k in changed)
        raise CheckpointError(f"{out} holds another run ({differences}): choose another output_dir, or overwrite.")
    return run.get("metrics")


def _record(
    out: Path, options: TrainOptions, shadow: ShadowConfig, rest: dict[str, Any], metrics: dict | None = None,
    history: list[dict] | None = None,
) -> None:  # fmt: skip
    run = {"asked": _asked(options, shadow, rest), "metrics": metrics, "history": history}
    text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
    folder.write_together(out, lambda staging: folder.write_text(staging / RUN_FILE, text))


def _last_checkpoint(out: Path) -> str | None:
    """The latest complete checkpoint: the trainer writes its state last, so one without was cut off by a kill."""
    complete = []
    for path in out.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete.append((int(path.name.rpartition("-")[2]), str(path)))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(complete)[1] if complete else None
