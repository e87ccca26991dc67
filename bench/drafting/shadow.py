"""A shadow for drafting: copies of the base's first two blocks, trained on answers first alone, then with the base.

    data      gsm_symbolic of reasoning-gym: worked answers to generated arithmetic problems
    alone     the cross-entropy of the shadow over the draft vocabulary; the base does not run
    together  CE of the attached model + λ · CE of the shadow + μ · KL(attached ‖ shadow)

Each stage has a separate folder and resumes after a kill.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import umbra
from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter, Collator, Record, encode_all
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import labelled_positions
from umbra.options import EMBEDDED
from umbra.shadow.draft_vocabulary import frequent_tokens
from umbra.training.runs import DEFAULTS

SEEDS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}  # item i is drawn from seed + i
LONGEST = 512  # maximum length of an example in tokens
SHADOW = umbra.ShadowConfig(
    dialect="paper",
    init="base",  # with a scaled norm: otherwise the logits would start out overconfident
    first_layer=0.5,
    shadow_num_hidden_layers=2,
    alpha=1.0,
    auxiliary_loss_weight=1.0,
    distillation_weight=0.5,
    dropout=0.0,
)


def records(split: str, count: int, skip: int = 0) -> list[Record]:
    """Return problems and their worked answers."""
    import reasoning_gym

    items = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=SEEDS[split] + skip)
    return [{"prompt": x["question"], "completion": x["metadata"]["answer_cot"]} for x in items]


class Alone(umbra.ShadowTrainer):
    """Train the shadow alone, by its loss over the draft vocabulary."""

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return CE(shadow, y) over the draft vocabulary, at labels that are part of it."""
        inputs = dict(inputs)
        positions, targets = labelled_positions(inputs.pop("labels"))
        weight, tokens = model.base_head.weight, model.shadow.draft_tokens
        places = torch.full((len(weight),), -1, device=targets.device)
        places[tokens] = torch.arange(len(tokens), device=targets.device)
        known = places[targets] >= 0
        positions, targets = positions[known], targets[known]
        with model.shadow_only():
            states = model.base_model(**inputs).last_hidden_state.flatten(0, 1)[positions]
        loss = linear_loss(states.float(), Head(weight[tokens].float()), places[targets])[0]
        loss = loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss


STAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "alone": (Alone, {"per_device_train_batch_size": 16, "learning_rate": 6e-3, "bf16": True, "use_cpu": True}),
    "together": (umbra.ShadowTrainer, {"learning_rate": 2e-3}),
}


def train(out: Path, alone: list[int], together: list[int]) -> Path:
    """Train the adapter and return its folder; finished rounds are loaded.

    Args:
        out: The folder for all rounds.
        alone: The examples of each round in which the shadow is trained alone.
        together: The examples of each round in which it is trained with the base.
    """
    rounds = [("alone", number, count) for number, count in enumerate(alone, 1)]
    rounds += [("together", number, count) for number, count in enumerate(together, 1)]
    folders = [out / f"{stage}-{number}" for stage, number, _ in rounds]
    if _is_done(folders[-1]):
        return folders[-1]
    tokenizer: Any = load_tokenizer(EMBEDDED)
    base: Any = load_base(EMBEDDED, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model: Any = umbra.attach(base, SHADOW)
    seen = 0
    for (stage, _, count), folder in zip(rounds, folders, strict=True):
        data = _examples(tokenizer, count, seen)
        if seen == 0:
            ends = [tokenizer.eos_token_id]
            model.set_draft_vocabulary(frequent_tokens([e["labels"] for e in data], also=ends))
        seen += count
        if not _is_done(folder):
            trainer, settings = STAGES[stage]
            _fit(trainer, model, tokenizer, data, folder, **settings)
        model = umbra.load(folder, base=model.unload(), trainable=True)
    return folders[-1]


def _examples(tokenizer: Any, count: int, skip: int) -> list[dict[str, Any]]:
    return encode_all(records("train", count, skip), tokenizer, max_length=LONGEST)


def _is_done(out: Path) -> bool:
    return (out / "adapter_config.json").exists()


def _fit(trainer: Any, model: Any, tokenizer: Any, data: list, out: Path, **settings: Any) -> None:
    steps = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}
    arguments = TrainingArguments(output_dir=str(out), **{**DEFAULTS, **steps, **settings})
    made = trainer(
        model=model, args=arguments, train_dataset=data, data_collator=Collator(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
    )  # fmt: skip
    made.train(resume_from_checkpoint=any(out.glob("checkpoint-*/trainer_state.json")))
    made.save_model()


def prompts(tokenizer: Any, split: str, count: int) -> list[Tensor]:
    """Return the token ids of ``count`` problems, (1, T) each."""
    writer = ChatFormatter(tokenizer)
    return [torch.tensor([writer.tokens(writer.prompt(r))]) for r in records(split, count)]
