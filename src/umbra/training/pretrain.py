"""``umbra pretrain``: the shadow learns by itself, from text and from the frozen base, before any task.

    alignment      ‖P · x − h‖² / D + KL(base ‖ shadow) at every token, of the projection P alone
    distillation   τ² · D(base, shadow) at every token, see divergence.py
    next_token     CE(shadow, y) at every token

x are the states of the shadow's backbone, h the base's. A stage is one of them or their sum, in which D stands for both of the
first two's; where divergence, temperature or teacher_top_k are given, alignment's KL is that D too. Stages follow one another
on one mixture of text, each with a trainer of transformers and a folder of its own, and go on where they were killed. What
comes out is a stock model: `ShadowConfig(shadow=folder)` starts from it, and whatever loads such models runs it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from umbra.adapters.card import may_replace, pretrained_card
from umbra.adapters.files import CARD_FILE
from umbra.base import architectures
from umbra.base.loading import load_base, load_tokenizer
from umbra.config import ShadowConfig
from umbra.data import ChatFormatter
from umbra.data.corpus import (
    Documents,
    Mixture,
    hold_out,
    pack,
    read_documents,
    read_prompts,
    without_copies,
    write_own,
)
from umbra.data.sources import local_files, named_sources
from umbra.deploy.detach import write_detached
from umbra.errors import BaseModelError, CheckpointError, ConfigError, DataError
from umbra.files import folder
from umbra.files.locks import locked
from umbra.method.divergences import KINDS, Teacher, linear_divergence, teacher_log_probs
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import labelled_positions
from umbra.model.attach import attach
from umbra.model.loading import load
from umbra.options import PretrainOptions, speaks
from umbra.shadow.pretrained import check_vocabulary
from umbra.training.resuming import last_checkpoint
from umbra.training.runs import RUN_FILE, Run, make_arguments, sort_settings
from umbra.training.teacher_cache import TeacherCache
from umbra.training.trainers import ShadowTrainer, StopWhereDiverged

LOSSES = ("alignment", "distillation", "next_token")
STAGE_FILE = "stage.json"  # of a finished stage, in its folder
STAGES = "stages"  # folders of the stages, in the output folder
OWN = "own.jsonl"  # what the base has written, a file of the output folder
OWN_SOURCE = "text of the base's own"
TEACHER = "teacher"  # what it says of each token of the text
MODEL = ("config.json", "generation_config.json", "model.safetensors", CARD_FILE)
FILES = (*MODEL, STAGES, TEACHER, OWN)
ROWS = 256  # of logits at once
# What the base's own text depends on: of a run that is overwritten by one with the same, it is kept.
OWN_OF = (
    "base", "dtype", "prompts", "chat_template", "own_documents", "own_new_tokens", "own_temperature", "seed",
    "per_device_eval_batch_size",
)  # fmt: skip
POSITIVE = ("own_documents", "own_new_tokens", "own_temperature", "temperature", "teacher_top_k", "held_out")


def pretrain(values: dict[str, Any]) -> dict[str, Any]:
    """Pretrain a shadow; the same call again goes on where a killed run stopped, or returns what a finished one found.

    Args:
        values: flat settings: fields of PretrainOptions, ShadowConfig and transformers' TrainingArguments, which hold for
            each stage.

    Returns:
        Before the first stage (``start``) and after each: cross_entropy of the held-out text, divergence KL(base ‖ shadow),
        in nats a token, agreement, the share of tokens of which base and shadow say the same next one; and parameters.

    Raises:
        ConfigError, DataError, BaseModelError: before any training.
        CheckpointError: the output folder holds another run or model.
    """
    options, shadow, rest = sort_settings(values, PretrainOptions, ("output_dir",), "the configuration of pretraining")
    stages = _check(options)
    if rest.get("eval_strategy", "no") != "no":
        raise ConfigError(
            "eval_strategy is of umbra train: a pretrained shadow is measured after each stage, on held_out blocks."
        )
    if shadow.escalation is not None:
        raise ConfigError("escalation is learned from records that are marked for it: give it to umbra train.")
    named = {"data": named_sources(options.data), "prompts": named_sources(options.prompts)}
    inputs = [(name, source) for name, sources in named.items() for source in sources]
    files = [(name, str(file)) for name, source in inputs for file in local_files(source)]
    run = Run.of(FILES, options, shadow, rest, [file for _, file in files])
    run.is_extensible = len(stages) == 1  # a stage begins where the one before has ended
    for name, source in (*inputs, *files):
        run.check_apart(**{name: source})
    run.check_apart(base=options.base, shadow=shadow.shadow if shadow.is_pretrained else None)
    arguments = [make_arguments(run.out / STAGES / n, {**rest, "remove_unused_columns": False}) for n in stages]
    if arguments[0].world_size > 1:
        raise ConfigError("umbra pretrain runs in one process: start it without a launcher.")
    if arguments[0].label_smoothing_factor:
        raise ConfigError("label_smoothing_factor is of umbra train: the stages' losses are those above; leave it out.")
    with locked(run.out):
        return _pretrain(run, options, shadow, stages, arguments)


def _pretrain(
    run: Run, options: PretrainOptions, shadow: ShadowConfig, stages: dict[str, tuple[str, ...]], arguments: list[Any]
) -> dict[str, Any]:
    """See `pretrain`; the output folder is locked."""
    try:
        finished = run.claim(options.overwrite)
        if run.is_longer:
            _reopen(run, Path(arguments[0].output_dir))
    except OSError as error:
        raise CheckpointError(f"output_dir={run.out} cannot be used: {error}") from error
    if finished is not None:
        return finished
    tokenizer: Any = load_tokenizer(options.base)
    if shadow.is_pretrained:
        check_vocabulary(shadow.shadow, options.base, tokenizer)
    writer = ChatFormatter(tokenizer, options.chat_template)
    documents = _documents(options, writer)
    base: Any = load_base(options.base, dtype=options.dtype)
    most = architectures.positions(base.config)
    if most is not None and options.max_length > most:
        raise ConfigError(f"max_length={options.max_length} is more than the {most} tokens that the base is made for.")
    torch.manual_seed(arguments[0].seed)
    model: Any = attach(base, shadow)
    if model.shadow.projection is None and any("alignment" in losses for losses in stages.values()):
        raise ConfigError("The stage alignment trains the projection of a shadow of another width: this one has none.")
    if model.losses.heads() is None:
        raise BaseModelError(
            f"{type(base).__name__} has a head that is more than one plain linear layer: use another base."
        )
    model.detached()  # raises now what would be the end of all stages
    if not architectures.is_placed(base):
        model.to(arguments[0].device)
    run.contents[options.base] = hashlib.sha256(json.dumps(model.base_fingerprint).encode()).hexdigest()
    if not options.overwrite:
        run.check_contents()
    if options.prompts:
        _begin(run, options)
        documents |= _own(options, model, writer, run.out / OWN, arguments[0])
    train_set, held_out = _mix(options, documents, writer, arguments[0].seed)
    if not options.prompts:
        _begin(run, options)
    if options.overwrite:  # nothing can stop this run any more
        run.clear(keep=(RUN_FILE, OWN))

    teacher = None
    if options.teacher_cache and options.teacher_top_k is not None:
        most = min(options.teacher_top_k, architectures.vocabulary_size(model.get_input_embeddings()))
        about = {"base": run.contents[options.base], "temperature": options.temperature, "dtype": options.dtype}
        teacher = TeacherCache(run.out / TEACHER, np.concatenate(train_set.blocks), most, about)
        teacher.fill(lambda ids: say(model, ids, options), arguments[0].per_device_eval_batch_size)

    metrics: dict[str, Any] = {"start": measure(model, held_out, arguments[0].per_device_eval_batch_size)}
    history: list[dict[str, Any]] = []
    for (name, losses), args in zip(stages.items(), arguments, strict=True):
        model, found, logged = _run_stage(model, losses, options, args, train_set, held_out, teacher)
        metrics[name], history = found, [*history, *({"stage": name, **entry} for entry in logged)]
    metrics["parameters"] = sum(model.shadow.parts().values()) - model.shadow.parts().get("couplings", 0)
    write_detached(model, run.out, tokenizer, overwrite=True)
    card = pretrained_card(options.base, {k: v for k, v in run.asked.items() if v is not None}, metrics)
    if may_replace(run.out / CARD_FILE):
        folder.write_together(run.out, lambda staging: folder.write_text(staging / CARD_FILE, card))
    run.record(metrics, history)
    return metrics


def _reopen(run: Run, stage: Path) -> None:
    """Let a finished stage go on from its end, for a run that has become longer."""
    note = stage / STAGE_FILE
    if note.exists():
        run.ended_at = json.loads(note.read_text(encoding="utf-8"))["history"][-1]["step"]
        run.resumes_from(stage)
        note.unlink()


def _begin(run: Run, options: PretrainOptions) -> None:
    """Note down the run in its folder, in place of one that is to be overwritten, whose model stays until the text is there."""
    if options.overwrite:
        is_own = run.agrees(OWN_OF) and options.base not in run.rewritten()
        run.clear(keep=(*MODEL, OWN) if is_own else MODEL)
    run.record()


def _check(options: PretrainOptions) -> dict[str, tuple[str, ...]]:
    """The stages: which losses each has, by the name of its folder."""
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be more than 0, got {value}.")
    if options.divergence not in KINDS:
        raise ConfigError(f"divergence must be one of {', '.join(KINDS)}; got {options.divergence!r}.")
    if not options.data and not options.prompts:
        raise ConfigError("There is nothing to learn from: name data, or prompts after which the base writes.")
    named = [part.strip() for part in options.stages.split(",") if part.strip()]
    stages = {f"{i}-{name}": tuple(x.strip() for x in name.split("+")) for i, name in enumerate(named, 1)}
    for losses in stages.values():
        for loss in losses:
            if loss not in LOSSES:
                raise ConfigError(f"stages={options.stages!r} has {loss!r}: choose from {', '.join(LOSSES)}.")
    if not stages:
        raise ConfigError(f"stages is empty: choose from {', '.join(LOSSES)}.")
    if options.teacher_cache and options.teacher_top_k is None:
        raise ConfigError("teacher_cache keeps the likeliest tokens: say how many by teacher_top_k, such as 64.")
    asked = {loss for losses in stages.values() for loss in losses}
    if options.teacher_cache and ("alignment" in asked or "distillation" not in asked):
        raise ConfigError(
            "teacher_cache is for distillation: alignment reads the base's states, next_token nothing of it."
        )
    _weights(options)
    _sources(options)
    return stages


def _sources(options: PretrainOptions) -> list[str]:
    named = named_sources(options.data)
    if len(set(named)) < len(named):
        raise ConfigError(f"data={options.data!r} names a source twice: raise its weight instead.")
    return [*named, *([OWN_SOURCE] if options.prompts else [])]


def _weights(options: PretrainOptions) -> list[float] | None:
    """One for each source; None for their sizes."""
    if options.weights is None:
        return None
    sources = _sources(options)
    try:
        weights = [float(part) for part in options.weights.split(",")]
    except ValueError:
        raise ConfigError(f"weights must be numbers separated by commas, got {options.weights!r}.") from None
    if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
        raise ConfigError(f"weights={options.weights!r} must be a positive number for each of {', '.join(sources)}.")
    return weights


# -- text --------------------------------------------------------------------------------------------------------------


def _documents(options: PretrainOptions, writer: ChatFormatter) -> dict[str, Documents]:
    if options.prompts:
        read_prompts(named_sources(options.prompts))
    return {s: read_documents(s, options.data_split, writer) for s in _sources(options) if s != OWN_SOURCE}


def _own(options: PretrainOptions, model: Any, writer: ChatFormatter, out: Path, args: Any) -> dict[str, Documents]:
    with model.disable_adapter():
        texts = write_own(
            model, writer, read_prompts(named_sources(options.prompts)), out, count=options.own_documents,
            batch_size=args.per_device_eval_batch_size, new=options.own_new_tokens,
            temperature=options.own_temperature, seed=args.seed,
        )  # fmt: skip
    return {OWN_SOURCE: Documents(texts, plain=not writer.chats, ended=True)}


def _mix(
    options: PretrainOptions, documents: dict[str, Documents], writer: ChatFormatter, seed: int
) -> tuple[Mixture, np.ndarray]:
    """What is trained on, and the held-out blocks (N, T)."""
    kept, copies = without_copies([d.texts for d in documents.values()])
    for (source, before), after in zip(documents.items(), kept, strict=True):
        if not after:
            raise DataError(f"All {len(before.texts)} documents of {source} are copies of others: leave it out.")
    blocks = [
        pack(before._replace(texts=texts), writer, options.max_length, source)
        for (source, before), texts in zip(documents.items(), kept, strict=True)
    ]
    blocks, held_out = hold_out(blocks, options.held_out)
    if speaks():
        told = ", ".join(f"{len(b)} of {s}" for s, b in zip(documents, blocks, strict=True))
        tqdm.write(f"blocks of {options.max_length} tokens: {told}; {len(held_out)} held out; {copies} copies left out")
    weights = _weights(options) or [float(len(b)) for b in blocks]
    return Mixture(blocks, weights, sum(map(len, blocks)), seed), held_out


# -- stages ------------------------------------------------------------------------------------------------------------


class Pretrainer(ShadowTrainer):
    """Trains the shadow alone, by the losses of a stage."""

    losses: tuple[str, ...] = ()
    options: Any = None
    teacher: TeacherCache | None = None

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the stage's losses over the tokens, divided by their number."""
        with self.accelerator.autocast():  # which accelerate puts around the model's forward alone
            loss = self._loss(model, dict(inputs), num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _loss(self: Any, model: Any, inputs: dict[str, Tensor], count: Any) -> Tensor:
        blocks, (positions, targets) = inputs.pop("block"), labelled_positions(inputs.pop("labels"))
        chosen, factor = model.losses.sample(positions, model.training)
        heads, places = model.losses.heads(), positions[chosen]
        rows = shadow_states(model, inputs)[places]
        needs_base = set(self.losses) != {"next_token"} and self.teacher is None
        teacher = base_states(model, inputs)[places] if needs_base else None
        length = inputs["input_ids"].shape[1]
        at = (blocks[places // length], places % length)
        loss = factor * self._sum(rows, targets[chosen], teacher, at, *heads)
        return loss / (len(targets) if count is None else count)

    def _sum(
        self,
        rows: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        at: tuple[Tensor, Tensor],
        attached: Head,
        shadow: Head,
    ) -> Tensor:
        options, total = self.options, rows.new_zeros((), dtype=torch.float32)
        if "alignment" in self.losses and teacher is not None:
            total = total + F.mse_loss(rows.float(), teacher.float(), reduction="sum") / rows.shape[-1]
        plain = (options.divergence, options.temperature, options.teacher_top_k) == ("forward", 1.0, None)
        if plain or "next_token" in self.losses:
            ce, kl = linear_loss(rows, shadow, targets, (teacher, attached) if teacher is not None and plain else None)
            total = total + kl + (ce if "next_token" in self.losses else 0)
        if set(self.losses) != {"next_token"} and not plain:

            def told(part: slice) -> Any:
                if teacher is None:
                    assert self.teacher is not None
                    return self.teacher.read(at[0][part], at[1][part], rows.device)
                return teacher_log_probs(attached.logits(teacher[part]), options.temperature, options.teacher_top_k)

            total = total + linear_divergence(rows, shadow, told, options.divergence, options.temperature)
        return total


def shadow_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B · T, D): what the shadow alone gives the head."""
    with model.shadow_only():
        return model.base_model(**inputs).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def base_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B · T, D): what the bare base gives it, without dropout."""
    was_training = model.base.training
    model.base.eval()
    try:
        with model.disable_adapter():
            return model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    finally:
        model.base.train(was_training)


@torch.no_grad()
def say(model: Any, ids: Tensor, options: PretrainOptions) -> Teacher:
    """What the bare base says after each token of ids (B, T) that has a successor."""
    ids = ids.to(model.device)
    positions, _ = labelled_positions(ids)
    rows = base_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[positions]
    head = model.losses.heads()[0]
    parts = [
        teacher_log_probs(head.logits(part), options.temperature, options.teacher_top_k) for part in rows.split(ROWS)
    ]
    return Teacher(*(torch.cat(found) for found in zip(*parts, strict=True)))


def _run_stage(
    model: Any,
    losses: tuple[str, ...],
    options: PretrainOptions,
    args: Any,
    train_set: Any,
    held_out: Any,
    teacher: TeacherCache | None,
) -> tuple[Any, dict[str, float], list[dict[str, Any]]]:
    """The model after the stage, what it then measures, and the trainer's log; a finished stage is read from its folder."""
    out, told = Path(args.output_dir), Path(args.output_dir) / STAGE_FILE
    if told.exists():
        kept = json.loads(told.read_text(encoding="utf-8"))
        return load(out, base=model.unload(), trainable=True), kept["metrics"], kept["history"]
    frozen = [p for name, p in model.shadow.named_parameters() if p.requires_grad and not _learns(name, losses)]
    for p in frozen:
        p.requires_grad_(False)
    trainer = Pretrainer(model=model, args=args, train_dataset=train_set, callbacks=[StopWhereDiverged()])
    trainer.losses, trainer.options, trainer.teacher = losses, options, teacher
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    for p in frozen:
        p.requires_grad_(True)
    trainer.save_model()
    found = measure(model, held_out, args.per_device_eval_batch_size)
    kept = {"metrics": found, "history": trainer.state.log_history}
    folder.write_together(out, lambda staging: folder.write_text(staging / told.name, json.dumps(kept) + "\n"))
    return model, found, trainer.state.log_history


def _learns(name: str, losses: tuple[str, ...]) -> bool:
    """Whether a stage trains this parameter of the shadow."""
    if losses == ("alignment",):
        return name.startswith("projection.")
    return not name.startswith(("couplings.", "heads."))


@torch.no_grad()
def measure(model: Any, blocks: np.ndarray, batch_size: int) -> dict[str, float]:
    """cross_entropy and divergence KL(base ‖ shadow), nats a token, and agreement, on blocks (N, T)."""
    was_training = model.training
    model.eval()
    attached, shadow = model.losses.heads()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for start in tqdm(
        range(0, len(blocks), batch_size), desc="measure", leave=False, disable=None if speaks() else True
    ):
        ids = torch.as_tensor(blocks[start : start + batch_size], dtype=torch.long, device=model.device)
        positions, targets = labelled_positions(ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows, teacher = (f(model, inputs)[positions] for f in (shadow_states, base_states))
        ce, kl = linear_loss(rows, shadow, targets, (teacher, attached))
        same = sum(
            int((shadow.logits(a).argmax(-1) == attached.logits(b).argmax(-1)).sum())
            for a, b in zip(rows.split(ROWS), teacher.split(ROWS), strict=True)
        )
        sums += torch.tensor([float(ce), float(kl), same], dtype=torch.float64)
        count += len(targets)
    model.train(was_training)
    return dict(zip(("cross_entropy", "divergence", "agreement"), (sums / count).tolist(), strict=True))
