"""The run behind ``umbra train``: data, `ShadowTrainer`, and an output folder that can be resumed."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from umbra.adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from umbra.adapters.prompting import Prompting
from umbra.base import architectures
from umbra.base.loading import load_base, load_tokenizer
from umbra.config import ShadowConfig
from umbra.data import (
    ESCALATION,
    MARK,
    ChatFormatter,
    Collator,
    Example,
    Labels,
    Record,
    Rows,
    describe_classes,
    encode_all,
    for_shadow_alone,
    local_files,
    needs_thinking,
    read_records,
    record_kind,
)
from umbra.errors import BaseModelError, CheckpointError, ConfigError, DataError
from umbra.files import manifest
from umbra.files.locks import locked
from umbra.model.attach import attach
from umbra.model.causal_lm import ShadowForCausalLM
from umbra.model.shadow_model import ShadowModel
from umbra.options import TrainOptions, is_main_process, listed
from umbra.shadow.draft_vocabulary import frequent_tokens
from umbra.shadow.pretrained import check_vocabulary
from umbra.training import warm_start
from umbra.training.divergence import StopOnDivergence
from umbra.training.runs import Run, make_arguments, sort_settings
from umbra.training.trainers import ShadowTrainer

FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


def split_options(values: dict[str, Any]) -> tuple[TrainOptions, ShadowConfig, dict[str, Any]]:
    """Sort flat settings by what they configure: see `runs.sort_settings`."""
    return sort_settings(values, TrainOptions, ("train_data", "output_dir"), "the training configuration")


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter; the same call again resumes a killed run, or returns the metrics of a finished one.

    With a higher ``max_steps`` or ``num_train_epochs``, a finished run continues from its end. ``adapter`` starts from the weights
    of another adapter. Under ``accelerate launch`` or ``torchrun`` every rank calls this function, and rank 0 writes.

    Args:
        values: flat settings: fields of TrainOptions, ShadowConfig and transformers' TrainingArguments.

    Returns:
        The run's metrics: train_loss, train_runtime, global_step, trainable_parameters, and eval_… of the last evaluation.

    Raises:
        ConfigError, DataError, BaseModelError: before any training.
        CheckpointError: the output folder holds another run or adapter, or another process is writing to it.
    """
    options, shadow, trainer_settings = split_options(values)
    prompting = Prompting(None, options.chat_template, options.chat_template_kwargs or {})
    if options.adapter is not None:
        options, shadow = warm_start.adopt(options, values)
        prompting = warm_start.prompting_of(options.adapter or "", values)
    _check_detached_only(options, shadow, trainer_settings)
    evaluates = {"eval_strategy": "steps" if "eval_steps" in trainer_settings else "epoch"} if options.eval_data else {}
    arguments = make_arguments(options.output_dir, {**evaluates, **trainer_settings})
    run = _make_run(options, shadow, trainer_settings)
    with locked(run.out):
        finished, last = _claim(run, options, arguments)
        return _train(run, last, options, shadow, arguments, prompting) if finished is None else finished


def _make_run(options: TrainOptions, shadow: ShadowConfig, trainer_settings: dict[str, Any]) -> Run:
    """Return the run of these settings, whose inputs lie outside its output folder."""
    sources = {"train_data": options.train_data, "eval_data": options.eval_data}
    files = [(name, str(file)) for name, data in sources.items() for file in local_files(data)]
    run = Run.of(FILES, options, shadow, trainer_settings, [file for _, file in files])
    for name, file in files:
        run.check_apart(**{name: file})
    run.check_apart(base=options.base, adapter=options.adapter, shadow=shadow.shadow if shadow.is_pretrained else None)
    if options.adapter is not None and options.adapter not in run.contents:
        run.contents[options.adapter] = manifest.of_model(options.adapter)
    return run


def _claim(run: Run, options: TrainOptions, arguments: TrainingArguments) -> tuple[dict[str, Any] | None, str | None]:
    """Return the metrics of a finished run, and the checkpoint from which an unfinished one resumes."""
    try:
        with arguments.main_process_first(local=False):
            finished = run.claim(options.overwrite)
            last = None if options.overwrite or finished is not None else run.resumes_from()
    except OSError as error:
        raise CheckpointError(f"output_dir={run.out} cannot be used: {error}") from error
    return finished, last


def _train(
    run: Run,
    last: str | None,
    options: TrainOptions,
    shadow: ShadowConfig,
    arguments: TrainingArguments,
    prompting: Prompting,
) -> dict[str, Any]:
    """Return the metrics of a run whose output folder is locked; it resumes from the checkpoint ``last``."""
    if not is_main_process():
        logging.disable_progress_bar()
    data = _read_data(options)
    shadow = _with_escalation(shadow, data.records, options.train_data)
    tokenizer = _open_tokenizer(options, shadow, prompting)
    classifier = None if data.labels is None else {**data.labels.config(), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(arguments.seed)  # for the head of a classifier
    base = load_base(options.base, classifier=classifier, dtype=options.dtype)
    prompting = _with_thinking(prompting, data.records, tokenizer)
    train_set, eval_set = _encode(
        data, tokenizer, base, options, {**prompting.settings(), "escalation": shadow.escalation}
    )

    torch.manual_seed(arguments.seed)
    model = attach(base, shadow) if options.adapter is None else warm_start.load(options.adapter, base, shadow)
    model.shadow.prompting = prompting
    if isinstance(model, ShadowForCausalLM):
        end = cast("int | None", tokenizer.eos_token_id)
        ends = [] if end is None else [end]
        model.set_draft_vocabulary(frequent_tokens([e["labels"] for e in train_set], also=ends))
    if options.detached_only:
        freeze_attached_parts(model)
    trainer = _make_trainer(model, arguments, tokenizer, (train_set, eval_set), data.labels)
    if arguments.should_save:
        if options.overwrite:
            run.clear()
        run.record()
    with model.shadow_only() if options.detached_only else nullcontext():
        metrics = _fit(trainer, last, evaluates=eval_set is not None)
    if arguments.should_save:
        run.record(metrics, trainer.state.log_history)
    return metrics


def _fit(trainer: ShadowTrainer, last: str | None, evaluates: bool) -> dict[str, Any]:
    """Train, save and evaluate the model, and return the metrics."""
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    metrics = {**result.metrics, "global_step": result.global_step}
    metrics["trainable_parameters"] = trainer.model.num_trainable_parameters()
    return metrics | trainer.evaluate() if evaluates else metrics


@dataclass(frozen=True)
class _Data:
    """The records of a run, and their classes or targets if they have labels."""

    records: Rows
    eval_records: Rows | None
    labels: Labels | None


def _read_data(options: TrainOptions) -> _Data:
    ignore = listed(options.ignore_columns)
    records = read_records(options.train_data, options.train_split, ignore)
    eval_records = read_records(options.eval_data, options.eval_split, ignore) if options.eval_data else None
    labels = _labels(records, eval_records, options.problem_type)
    if options.adapter is not None:
        labels = warm_start.classes(options.adapter, labels)
    return _Data(records, eval_records, labels)


def _open_tokenizer(options: TrainOptions, shadow: ShadowConfig, prompting: Prompting) -> PreTrainedTokenizerBase:
    """Return the adapter's tokenizer, or else the base's, which must fit the shadow."""
    files = prompting.tokenizer
    tokenizer = load_tokenizer(options.base) if files is None else files.open(options.base)
    _check_escalation(shadow.escalation, tokenizer)
    if shadow.is_pretrained:
        check_vocabulary(shadow.shadow, options.base, tokenizer)
    return tokenizer


def _encode(
    data: _Data,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    options: TrainOptions,
    settings: dict[str, Any],
) -> tuple[list[Example], list[Example] | None]:
    """Return the training and the evaluation examples.

    Args:
        data: the records.
        tokenizer: the tokenizer.
        base: the base, whose positions and image token the examples must respect.
        options: the run's options.
        settings: how records are formatted, see `encode_all`.
    """
    settings = {**settings, "escalation": settings["escalation"] or ESCALATION}
    settings |= {"max_length": options.max_length, "labels": data.labels}
    train_set = encode_all(data.records, tokenizer, name="train_data", **settings)
    eval_set = encode_all(data.eval_records, tokenizer, name="eval_data", **settings) if data.eval_records else None
    examples = [*train_set, *(eval_set or [])]
    _check_image_tokens(examples, base)
    _check_positions(examples, base, options.max_length)
    if options.detached_only:
        train_set, eval_set = for_shadow_alone(train_set), for_shadow_alone(eval_set) if eval_set else None
    return train_set, eval_set


def _make_trainer(
    model: ShadowModel,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    examples: tuple[list[Example], list[Example] | None],
    labels: Labels | None,
) -> ShadowTrainer:
    """Return the trainer, with its optimizer, of training and evaluation examples.

    Raises:
        ConfigError: settings that do not fit together.
    """
    is_single_label = labels is not None and labels.problem_type == "single_label_classification"
    try:
        trainer = ShadowTrainer(
            model=model,
            args=arguments,
            train_dataset=examples[0],
            eval_dataset=examples[1],
            processing_class=tokenizer,
            data_collator=Collator(cast(int, tokenizer.pad_token_id)),
            callbacks=[StopOnDivergence()],
            compute_metrics=_accuracy if is_single_label else None,
        )
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()  # raises if the optimizer's package is not installed
    except (ValueError, RuntimeError, ImportError, TypeError) as error:
        raise ConfigError(f"transformers' Trainer refuses these settings: {error!s:.500}") from error
    return trainer


def _labels(records: Rows, eval_records: Rows | None, problem_type: str | None) -> Labels | None:
    """Return the classes or targets of the training records; None if the records have no labels."""
    kind = record_kind(records[0], "the training data's first record")
    if eval_records is not None and record_kind(eval_records[0], "the evaluation data") != kind:
        raise DataError(f"The training data holds {kind} records, the evaluation data records of another form.")
    if kind != "label":
        if problem_type is not None:
            raise DataError(
                f"problem_type={problem_type} is for `text` and `label`, but the data holds {kind} records."
            )
        return None
    values = [r["label"] for r in records]
    labels = Labels.of(values, problem_type, records.where)
    if is_main_process():
        for line in describe_classes(labels, values):
            tqdm.write(line)
    return labels


def _with_thinking(prompting: Prompting, records: Rows, tokenizer: PreTrainedTokenizerBase) -> Prompting:
    """Return the prompting, with the chat template's ``enable_thinking`` set if the records need it."""
    if not needs_thinking(ChatFormatter(tokenizer, **prompting.settings()), records):
        return prompting
    if is_main_process():
        tqdm.write(
            "enable_thinking: true is set: the records hold reasoning, which the chat template's prompt closes by default."
        )
    return replace(prompting, chat_template_kwargs={**prompting.chat_template_kwargs, "enable_thinking": True})


def _check_image_tokens(examples: list[Example], base: PreTrainedModel) -> None:
    """Raise a DataError if a text spells the image token of a vision-language base, which would look for an image there."""
    token = architectures.image_token_id(base.config)
    if token is not None and any((example["input_ids"] == token).any() for example in examples):
        raise DataError(
            "A record's text spells the image token of the base, but holds no image: Umbra trains on text only "
            "(docs/reference/data.md)."
        )


def _check_detached_only(options: TrainOptions, shadow: ShadowConfig, trainer_settings: dict[str, Any]) -> None:
    """Raise a ConfigError if ``detached_only`` is set and a loss needs the attached model."""
    if not options.detached_only:
        return
    for name, value in (
        ("distillation_weight", shadow.distillation_weight),
        ("label_smoothing_factor", trainer_settings.get("label_smoothing_factor")),
    ):
        if value:
            raise ConfigError(
                f"{name}={value} needs the attached model, which detached_only does not run: set only one of the two."
            )


def freeze_attached_parts(model: ShadowModel) -> None:
    """Freeze everything that the detached model does not contain.

    Raises:
        BaseModelError: a base that takes images.
    """
    if model.runner.merges_embeddings:
        raise BaseModelError(
            "detached_only does not run a vision tower: train the attached model, or use a language model as the base."
        )
    model.shadow.couplings.requires_grad_(False)
    if model.shadow.heads:
        model.shadow.heads["attached"].requires_grad_(False)
        model.shadow.heads["shadow"].requires_grad_(True)


def _check_positions(examples: list[Example], base: PreTrainedModel, max_length: int) -> None:
    """Raise a ConfigError if an example is longer than the base has positions."""
    limit, longest = architectures.positions(base.config), max(len(e["input_ids"]) for e in examples)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"A record has {longest} tokens within max_length={max_length}, but the base has positions for {limit}: "
            f"set max_length to at most {limit}."
        )


def _with_escalation(shadow: ShadowConfig, records: list[Record], source: str | list[str]) -> ShadowConfig:
    """Return the configuration, with the shadow's answer to records marked for escalation if there are any."""
    marked = any(record.get(MARK) for record in records)
    if shadow.escalation is not None and not marked:
        raise DataError(f"escalation={shadow.escalation!r}, but no record of {source} is marked `{MARK}: true`.")
    return replace(shadow, escalation=shadow.escalation or ESCALATION) if marked else shadow


def _check_escalation(escalation: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError if the escalation text would not be recognised in a decoded answer."""
    ids = tokenizer(escalation or "", add_special_tokens=False)["input_ids"]
    if escalation is not None and str(tokenizer.decode(ids, skip_special_tokens=True)).strip() != escalation.strip():
        raise ConfigError(f"escalation={escalation!r} is not plain text to the base's tokenizer: choose other words.")


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy of logits (N, C)."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
