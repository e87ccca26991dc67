"""The run behind ``umbra train``: data, `ShadowTrainer`, and an output folder that can be resumed."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
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
    Labels,
    Record,
    Rows,
    describe_classes,
    encode_all,
    local_files,
    needs_thinking,
    read_records,
    record_kind,
    shadows_own,
)
from umbra.errors import BaseModelError, CheckpointError, ConfigError, DataError
from umbra.files import manifest
from umbra.files.locks import locked
from umbra.model.attach import attach
from umbra.options import TrainOptions, listed, speaks
from umbra.shadow.draft_vocabulary import frequent_tokens
from umbra.shadow.pretrained import check_vocabulary
from umbra.training import warm_start
from umbra.training.runs import Run, make_arguments, sort_settings
from umbra.training.trainers import ShadowTrainer, StopWhereDiverged

FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


def split_options(values: dict[str, Any]) -> tuple[TrainOptions, ShadowConfig, dict[str, Any]]:
    """See `runs.sort_settings`."""
    return sort_settings(values, TrainOptions, ("train_data", "output_dir"), "the training configuration")


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train an adapter; the same call again goes on where a killed run stopped, or returns the metrics of a finished one.

    With a higher ``max_steps`` or ``num_train_epochs`` it goes on from the end of a finished run. ``adapter`` starts from the
    weights of another adapter.

    Under ``accelerate launch`` or ``torchrun`` every rank calls it, and rank 0 writes.

    Args:
        values: flat settings: fields of TrainOptions, ShadowConfig and transformers' TrainingArguments.

    Returns:
        The run's metrics: train_loss, train_runtime, global_step, trainable_parameters, eval_… of the last evaluation.

    Raises:
        ConfigError, DataError, BaseModelError: before any training.
        CheckpointError: the output folder holds another run or adapter, or another process writes it.
    """
    options, shadow, rest = split_options(values)
    prompting = Prompting(None, options.chat_template, options.chat_template_kwargs or {})
    if options.adapter is not None:
        options, shadow = warm_start.adopt(options, values)
        prompting = warm_start.prompting_of(options.adapter or "", values)
    _check_alone(options, shadow, rest)
    evaluates = {"eval_strategy": "steps" if "eval_steps" in rest else "epoch"} if options.eval_data else {}
    arguments = make_arguments(options.output_dir, {**evaluates, **rest})
    sources = {"train_data": options.train_data, "eval_data": options.eval_data}
    files = [(name, str(file)) for name, data in sources.items() for file in local_files(data)]
    run = Run.of(FILES, options, shadow, rest, [file for _, file in files])
    for name, file in files:
        run.check_apart(**{name: file})
    run.check_apart(base=options.base, adapter=options.adapter, shadow=shadow.shadow if shadow.is_pretrained else None)
    if options.adapter is not None and options.adapter not in run.contents:
        run.contents[options.adapter] = manifest.of_model(options.adapter)
    with locked(run.out):
        return _train(run, options, shadow, arguments, prompting)


def _train(
    run: Run, options: TrainOptions, shadow: ShadowConfig, arguments: Any, prompting: Prompting
) -> dict[str, Any]:
    """See `train`; the output folder is locked."""
    try:
        with arguments.main_process_first(local=False):
            finished = run.claim(options.overwrite)
            last = None if options.overwrite or finished is not None else run.resumes_from()
    except OSError as error:
        raise CheckpointError(f"output_dir={run.out} cannot be used: {error}") from error
    if finished is not None:
        return finished

    if not speaks():
        logging.disable_progress_bar()
    ignore = listed(options.ignore_columns)
    records = read_records(options.train_data, options.train_split, ignore)
    eval_records = read_records(options.eval_data, options.eval_split, ignore) if options.eval_data else None
    labels = _labels(records, eval_records, options.problem_type)
    if options.adapter is not None:
        labels = warm_start.classes(options.adapter, labels)
    shadow = _with_escalation(shadow, records, options.train_data)
    carried = prompting.tokenizer
    tokenizer = load_tokenizer(options.base) if carried is None else carried.open(options.base)
    _check_escalation(shadow.escalation, tokenizer)
    if shadow.is_pretrained:
        check_vocabulary(shadow.shadow, options.base, tokenizer)
    pad = tokenizer.pad_token_id
    classifier = None if labels is None else {**labels.config(), "pad_token_id": pad}
    torch.manual_seed(arguments.seed)  # of a classifier's head
    base = load_base(options.base, classifier=classifier, dtype=options.dtype)
    prompting = _with_thinking(prompting, records, tokenizer)
    encode: dict[str, Any] = {
        "max_length": options.max_length, "labels": labels, **prompting.settings(),
        "escalation": shadow.escalation or ESCALATION,
    }  # fmt: skip
    train_set = encode_all(records, tokenizer, name="train_data", **encode)
    eval_set = encode_all(eval_records, tokenizer, name="eval_data", **encode) if eval_records else None

    _check_image_tokens([*train_set, *(eval_set or [])], base)
    _check_positions([*train_set, *(eval_set or [])], base, options.max_length)
    if options.detached_only:
        train_set, eval_set = shadows_own(train_set), shadows_own(eval_set) if eval_set else None
    torch.manual_seed(arguments.seed)
    model: Any = attach(base, shadow) if options.adapter is None else warm_start.load(options.adapter, base, shadow)
    model.shadow.prompting = prompting
    if labels is None:
        ends: Any = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        model.set_draft_vocabulary(frequent_tokens([e["labels"] for e in train_set], also=ends))
    if options.detached_only:
        leave_the_pair(model)
    try:
        trainer = ShadowTrainer(
            model=model,
            args=arguments,
            train_dataset=train_set,  # type: ignore[arg-type]
            eval_dataset=eval_set,  # type: ignore[arg-type]
            processing_class=tokenizer,
            data_collator=Collator(int(pad)),  # type: ignore[arg-type]
            callbacks=[StopWhereDiverged()],
            compute_metrics=_accuracy if labels and labels.problem_type == "single_label_classification" else None,
        )
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()  # which may be one that is not installed
    except (ValueError, RuntimeError, ImportError, TypeError) as error:  # settings that do not go together
        raise ConfigError(f"transformers' Trainer refuses these settings: {error!s:.500}") from error
    if arguments.should_save:
        if options.overwrite:
            run.clear()
        run.record()
    with model.shadow_only() if options.detached_only else nullcontext():
        result = trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        metrics = {**result.metrics, "global_step": result.global_step}
        metrics["trainable_parameters"] = model.num_trainable_parameters()
        if eval_set is not None:
            metrics |= trainer.evaluate()
    if arguments.should_save:
        run.record(metrics, trainer.state.log_history)
    return metrics


def _labels(records: Rows, eval_records: Rows | None, problem_type: str | None) -> Labels | None:
    kind = record_kind(records[0], "the training data's first record")
    if eval_records is not None and record_kind(eval_records[0], "the evaluation data") != kind:
        raise DataError(f"The training data holds {kind} records, the evaluation data another kind.")
    if kind != "label":
        if problem_type is not None:
            raise DataError(
                f"problem_type={problem_type} is for `text` and `label`, but the data holds {kind} records."
            )
        return None
    values = [r["label"] for r in records]
    labels = Labels.of(values, problem_type, records.where)
    if speaks():
        for line in describe_classes(labels, values):
            tqdm.write(line)
    return labels


def _with_thinking(prompting: Prompting, records: Rows, tokenizer: Any) -> Prompting:
    """The prompting, with the chat template's ``enable_thinking`` where the records need it."""
    if not needs_thinking(ChatFormatter(tokenizer, **prompting.settings()), records):
        return prompting
    if speaks():
        tqdm.write(
            "enable_thinking: true is set: the records hold reasoning, and the chat template's prompt closes it by default."
        )
    return replace(prompting, chat_template_kwargs={**prompting.chat_template_kwargs, "enable_thinking": True})


def _check_image_tokens(examples: list[dict[str, Any]], base: Any) -> None:
    """Refuse text that spells the image token of a vision-language base: the model would look for an image there."""
    token = architectures.image_token_id(base.config)
    if token is not None and any((example["input_ids"] == token).any() for example in examples):
        raise DataError(
            "A record's text spells the image token of the base, but holds no image: Umbra trains on text alone (docs/data.md)."
        )


def _check_alone(options: TrainOptions, shadow: ShadowConfig, rest: dict[str, Any]) -> None:
    if not options.detached_only:
        return
    for name, value in (
        ("distillation_weight", shadow.distillation_weight),
        ("label_smoothing_factor", rest.get("label_smoothing_factor")),
    ):
        if value:
            raise ConfigError(
                f"{name}={value} is of a loss that reads the pair, which detached_only does not run: choose one."
            )


def leave_the_pair(model: Any) -> None:
    """Train what the detached model is made of, and nothing else.

    Raises:
        BaseModelError: a base that is fed images.
    """
    if model.runner.merges_embeddings:
        raise BaseModelError(
            "detached_only runs no tower for images: train the pair, or take a language model for a base."
        )
    model.shadow.couplings.requires_grad_(False)
    if model.shadow.heads:
        model.shadow.heads["attached"].requires_grad_(False)
        model.shadow.heads["shadow"].requires_grad_(True)


def _check_positions(examples: list[dict[str, Any]], base: Any, max_length: int) -> None:
    """Refuse what is longer than the base's positions."""
    most, longest = architectures.positions(base.config), max(len(e["input_ids"]) for e in examples)
    if most is not None and longest > most:
        raise ConfigError(
            f"A record has {longest} tokens within max_length={max_length}, but the base is made for {most}: "
            f"set max_length to {most} at most."
        )


def _with_escalation(shadow: ShadowConfig, records: list[Record], source: str | list[str]) -> ShadowConfig:
    """The configuration, with what the shadow says to the records that are marked."""
    marked = any(record.get(MARK) for record in records)
    if shadow.escalation is not None and not marked:
        raise DataError(f"escalation={shadow.escalation!r}, but no record of {source} is marked `{MARK}: true`.")
    return replace(shadow, escalation=shadow.escalation or ESCALATION) if marked else shadow


def _check_escalation(escalation: str | None, tokenizer: Any) -> None:
    """Refuse what would not be read back from an answer."""
    ids = tokenizer(escalation or "", add_special_tokens=False)["input_ids"]
    if escalation is not None and tokenizer.decode(ids, skip_special_tokens=True).strip() != escalation.strip():
        raise ConfigError(f"escalation={escalation!r} is not plain text to the base's tokenizer: choose other words.")


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
