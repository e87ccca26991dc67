"""A shadow that drafts: two layers that learn the answers, first alone, then beside the base.

    data      gsm_symbolic of reasoning-gym: worked answers to generated arithmetic problems
    alone     the shadow's own cross-entropy over the draft vocabulary; the base does not run
    together  CE of the attached model + λ · CE of the shadow + μ · KL(attached ‖ shadow)

Each stage lies in a folder of its own and is resumed where it was killed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import umbra
from umbra.bases import load_base, load_tokenizer
from umbra.core import labelled_positions
from umbra.data import Collator, Record, Writer, encode_all
from umbra.drafting import frequent_tokens
from umbra.kernels import Head, linear_loss
from umbra.options import EMBEDDED
from umbra.train import DEFAULTS

SEEDS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}  # item i is drawn from seed + i
LONGEST = 512  # tokens of an example
SHADOW = umbra.ShadowConfig(
    first_layer=15, shadow_num_hidden_layers=2, auxiliary_loss_weight=1.0, distillation_weight=1.0, dropout=0.0
)


def records(split: str, count: int, skip: int = 0) -> list[Record]:
    """Problems and their worked answers."""
    import reasoning_gym

    items = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=SEEDS[split] + skip)
    return [{"prompt": x["question"], "completion": x["metadata"]["answer_cot"]} for x in items]


class Alone(umbra.ShadowTrainer):
    """Trains the shadow by its own loss over the draft vocabulary."""

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE(shadow, y) at the labels in the draft vocabulary, over this vocabulary."""
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


def train(out: Path, alone: list[int], together: int) -> Path:
    """The adapter's folder, trained on so many examples in each stage; what is there already is used.

    Args:
        alone: examples of each round that the shadow learns by itself, with a learning rate that falls to 0 in each.
        together: examples that it learns beside the base.
    """
    last = out / "together"
    if _is_done(last):
        return last
    tokenizer: Any = load_tokenizer(EMBEDDED)
    base: Any = load_base(EMBEDDED, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model: Any = umbra.attach(base, SHADOW)
    seen = 0
    for number, count in enumerate(alone, 1):
        folder, data = out / f"alone-{number}", _examples(tokenizer, count, seen)
        seen += count
        if number == 1:
            ends = [tokenizer.eos_token_id]
            model.set_draft_vocabulary(frequent_tokens([e["labels"] for e in data], also=ends))
        if not _is_done(folder):
            _fit(Alone, model, tokenizer, data, folder, per_device_train_batch_size=16, learning_rate=2e-3)
        model = umbra.load(folder, base=model.unload(), trainable=True)
    _fit(umbra.ShadowTrainer, model, tokenizer, _examples(tokenizer, together, seen), last)
    return last


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
    """Token ids of as many problems, each (1, T)."""
    writer = Writer(tokenizer)
    return [torch.tensor([writer.tokens(writer.prompt(r))]) for r in records(split, count)]
