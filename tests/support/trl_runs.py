"""Short runs of TRL's trainers: settings and data."""

import trl
from datasets import Dataset

import umbra
from support.tiny import tokens
from support.tokenizer import make_tokenizer

LAMBDA = 0.5
COMMON = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0, "num_train_epochs": 1, "bf16": False,
    "activation_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "optim": "sgd", "learning_rate": 1e-2,
}  # fmt: skip


def rows(n: int = 8) -> list[list[int]]:
    """Return Return n sequences of different lengths."""
    return [tokens(1, 5 + i % 4, seed=10 + i)[0].tolist() for i in range(n)]


def sft_data(n: int = 8) -> Dataset:
    """Return n examples; the first token of each, and one in the middle, have no label."""
    ids = rows(n)
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *r[1:3], -100, *r[4:]] for r in ids]})


def sft(tmp_path, model, data=None, **options):
    options = {"per_device_train_batch_size": 8, "max_length": None, **COMMON, **options}
    extra = {k: options.pop(k) for k in ("compute_loss_func", "eval_dataset") if k in options}
    return umbra.with_shadow_loss(trl.SFTTrainer)(
        model=model, args=trl.SFTConfig(str(tmp_path), **options), train_dataset=sft_data() if data is None else data,
        processing_class=make_tokenizer(), **extra,
    )  # fmt: skip


def steps(n: int) -> dict[str, int]:
    """Return the settings of one optimizer step on 8 examples in n micro-batches."""
    return {"per_device_train_batch_size": 8 // n, "gradient_accumulation_steps": n}


PAIRS = [{"prompt": f"{a}+{a}=", "chosen": str(2 * a), "rejected": "?!" * (1 + a % 2)} for a in range(8)]


def dpo(tmp_path, model, **options):
    options = {"per_device_train_batch_size": 8, "max_length": None, **COMMON, **options}
    return umbra.with_shadow_loss(trl.DPOTrainer)(
        model=model, args=trl.DPOConfig(str(tmp_path), **options), train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )  # fmt: skip
