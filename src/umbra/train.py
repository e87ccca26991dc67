"""Supervised fine-tuning on transformers' Trainer: `ShadowTrainer`, and the run behind ``umbra train``."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from . import checkpoint, folder
from .bases import load_base, load_tokenizer
from .config import ShadowConfig
from .data import Collator, Labels, Record, encode_all, read_records, record_kind
from .errors import CheckpointError, ConfigError, DataError, unknown_key
from .model import ShadowModel, attach
from .options import TrainOptions, check_dtype, names

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
        self._shadow_eval: list[tuple[torch.Tensor, int]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        shadow_loss = outputs.get("shadow_loss") if isinstance(outputs, dict) else None
        if shadow_loss is not None:
            value = shadow_loss.detach()  # read only when it is logged: no waiting for a GPU in every step
            if model.training:
                if self._shadow_since is None:
                    self._shadow_since = self.state.global_step
                scaled = num_items_in_batch is not None
                self._shadow_train += value if scaled else value / self.args.gradient_accumulation_steps
            else:
                self._shadow_eval.append((value, len(inputs["input_ids"])))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``shadow_loss``, the mean over the steps since the last log."""
        if "loss" in logs and self._shadow_since is not None:
            logs["shadow_loss"] = float(self._shadow_train) / (self.state.global_step - self._shadow_since)
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
            weight = sum(n for _, n in self._shadow_eval)
            assert output.metrics is not None
            output.metrics[f"{prefix}_shadow_loss"] = float(sum(v * n for v, n in self._shadow_eval)) / weight
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.load_weights(self.model.shadow, checkpoint.read_weights(path), path / checkpoint.WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        path = output_dir or self.args.output_dir
        assert path is not None
        if self.args.should_save:
            checkpoint.save(self.model, path, state_dict=state_dict, overwrite=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(path)


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
    finished = _claim(out, options, shadow, rest)
    if finished is not None:
        return finished

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
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(out))
    trainer.save_model()
    metrics = {**result.metrics, "global_step": result.global_step}
    metrics["trainable_parameters"] = model.num_trainable_parameters()
    if eval_set is not None:
        metrics |= trainer.evaluate()
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
