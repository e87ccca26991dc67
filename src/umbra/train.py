"""Supervised fine-tuning on transformers' Trainer: `ShadowTrainer`, and the run behind ``umbra train``."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from . import checkpoint, folder, shards
from .bases import load_base, load_tokenizer
from .config import ShadowConfig
from .data import Collator, Labels, Record, encode_all, read_records, record_kind
from .errors import CheckpointError, ConfigError, DataError, unknown_key
from .model import ShadowModel, attach
from .options import TrainOptions, check_dtype, names, speaks

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
# Fields that may differ between a run and its continuation: they change nothing that is learned.
HARMLESS = ("overwrite", "disable_tqdm", "report_to", "logging_dir", "save_total_limit", "resume_from_checkpoint")


class ShadowTrainer(Trainer):
    """transformers' Trainer, with the shadow's own loss beside the task's in training logs and in evaluation.

    Checkpoints hold the adapter folder; resuming and loading the best one read it back whole.
    """

    model: ShadowModel

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._shadow_train: torch.Tensor | float = 0.0
        self._shadow_since: int | None = None  # the step at which that sum began
        self._shadow_eval: list[torch.Tensor] = []  # one value for each example, of all ranks

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        shadow_loss = outputs.get("shadow_loss") if isinstance(outputs, dict) else None
        if shadow_loss is not None:
            value = shadow_loss.detach()  # read only when it is logged: no waiting for a GPU in every step
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                value = value * self.accelerator.num_processes  # as the loss itself: the mean over ranks is their sum
            if model.training:
                if self._shadow_since is None:
                    self._shadow_since = self.state.global_step
                scaled = num_items_in_batch is not None
                self._shadow_train += value if scaled else value / self.args.gradient_accumulation_steps
            else:
                of_ranks: Any = self.gather_function(value.repeat(self.args.eval_batch_size))
                self._shadow_eval.append(of_ranks)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``shadow_loss``, the mean over the ranks and over the steps since the last log."""
        if "loss" in logs and self._shadow_since is not None:
            of_ranks: Any = self.accelerator.gather(self._shadow_train)  # type: ignore[arg-type]
            logs["shadow_loss"] = float(of_ranks.mean()) / (self.state.global_step - self._shadow_since)
            self._shadow_train, self._shadow_since = 0.0, None
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Logits only where there is a label, unless somebody wants the predictions."""
        return super().prediction_step(
            model, {**inputs, "skip_logits": prediction_loss_only}, prediction_loss_only, ignore_keys
        )

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Adds the shadow's loss to the metrics, averaged as the task's is."""
        self._shadow_eval.clear()
        output = super().evaluation_loop(*args, **options)
        if self._shadow_eval:
            prefix = options.get("metric_key_prefix", "eval")
            assert output.metrics is not None
            output.metrics[f"{prefix}_shadow_loss"] = float(torch.cat(self._shadow_eval).mean())
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.load_weights(self.model.shadow, checkpoint.read_weights(path), path / checkpoint.WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder; called by all ranks, of which one writes. A sharded base is never gathered."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        path = output_dir or self.args.output_dir
        assert path is not None
        weights = shards.whole_state(self.model.shadow, checkpoint.PREFIX) if state_dict is None else state_dict
        if self.args.should_save:
            checkpoint.save(self.model, path, state_dict=weights, overwrite=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP as one process would, so that any number of ranks can go on, and without the frozen base."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = shards.gather(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        wrapped: Any = self.optimizer
        handle = wrapped.optimizer.register_load_state_dict_pre_hook(shards.spread_optimizer_state)
        self.is_fsdp_enabled = False  # for what one process has saved
        super()._load_optimizer_and_scheduler(checkpoint)
        self.is_fsdp_enabled = True
        handle.remove()


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
    shadow = ShadowConfig(**{k: v for k, v in values.items() if k in names(ShadowConfig)})
    for required in ("train_data", "output_dir"):
        if not getattr(options, required):
            raise ConfigError(f"{required} is missing: set it in the configuration, or by --{required}.")
    check_dtype(options.dtype)
    if options.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {options.max_length}.")
    rest = {k: v for k, v in values.items() if k in arguments and k not in names(TrainOptions, ShadowConfig)}
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
    with arguments.main_process_first(local=False):
        finished = _claim(out, options, shadow, rest)
        last = _last_checkpoint(out)
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
    model = attach(base, shadow)
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
    try:
        return TrainingArguments(output_dir=options.output_dir, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers' TrainingArguments refuse these settings: {error}") from error


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
