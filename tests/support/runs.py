"""Short runs of ``umbra train`` and ``umbra pretrain``: settings, data, and readers of their results."""

import json
from pathlib import Path

from safetensors.torch import load_file

RECORDS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)][:24]


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


def train_settings(folder: Path, base: str) -> dict:
    """Settings of a short ``umbra train`` on `RECORDS`, written into this folder."""
    return {
        "base": base,
        "train_data": write(folder / "train.jsonl", RECORDS),
        "output_dir": str(folder / "out"),
        "rank": 4,
        "gate_rank": 4,
        "alpha": 1.0,
        "init": "random",
        "auxiliary_loss_weight": 0.5,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 7,
    }


def weights(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def losses(folder):
    with open(f"{folder}/run.json") as file:
        return [(h["loss"], h["shadow_loss"]) for h in json.load(file)["history"] if "loss" in h]


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    return all((a[k] - b[k]).abs().max() <= tolerance for k in a)


TEXT = "\n\n".join(f"{a} plus {b} is {a + b}, and {b} plus {a} is {a + b}." for a in range(12) for b in range(12))
NARROW = {
    "shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 2, "shadow_head_dim": 8,
}  # fmt: skip


def pretrain_settings(folder: Path, base: str) -> dict:
    """Settings of a short ``umbra pretrain`` on `TEXT`, written into this folder."""
    (folder / "text.txt").write_text(TEXT)
    return {
        "base": base, "data": str(folder / "text.txt"), "output_dir": str(folder / "out"), "max_length": 32, "held_out": 8,
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 4, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
