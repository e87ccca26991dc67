"""The pretrained shadow of the tasks: two copied blocks, distilled from the base on given and on generated text."""

from pathlib import Path
from typing import Any

from umbra.training.pretrain import pretrain

from .text import write_prompts, write_text

SETTINGS: dict[str, Any] = {
    "dialect": "paper",
    "dtype": "bfloat16", "shadow_num_hidden_layers": 2, "init": "base", "dropout": 0.0, "auxiliary_loss_every": 4,
    "stages": "distillation", "max_length": 256, "held_out": 48, "max_steps": 600, "per_device_train_batch_size": 8,
    "learning_rate": 4e-3, "own_documents": 400, "own_new_tokens": 160, "per_device_eval_batch_size": 16,
    "save_steps": 50, "logging_steps": 10, "bf16": True,
}  # fmt: skip


def run(data: Path, out: Path, folder: Path) -> dict[str, Any]:
    """Pretrain the shadow in ``folder``, and return its metrics before and after."""
    files, prompts = write_text(data, out / "text"), write_prompts(data, out)
    return pretrain({**SETTINGS, "data": ",".join(files), "prompts": prompts, "output_dir": str(folder)})
