"""Run one rank of `test_trl.test_two_ranks_equal_one`: python -m torch.distributed.run --nproc_per_node 2 ranks_trl.py FOLDER"""

import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.tiny import make, step_gradients
from support.trl_runs import LAMBDA, dpo, sft, steps

RUNS = {
    "sft": lambda path, model, **options: sft(path, model, **options),
    "smoothed": lambda path, model, **options: sft(path, model, label_smoothing_factor=0.1, **options),
    "dpo": lambda path, model, **options: dpo(path, model, **options),
}


def gradients_of(name: str, path: Path, micro_batches: int) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, on 8 examples in total."""
    model = make("llama", auxiliary_loss_weight=LAMBDA, train_heads=True)
    return step_gradients(RUNS[name](path, model, **steps(micro_batches)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in RUNS:
        found = gradients_of(name, folder, 4)  # 2 ranks of 2 examples, twice
        if torch.distributed.get_rank() == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # native threads of the trainers' libraries may abort an interpreter that shuts down under them
