"""``umbra train``: train a shadow."""

import json

from umbra.cli.parsing import run_settings
from umbra.cli.results import lines, trainer_output
from umbra.cli.terminal import say
from umbra.options import TrainOptions, is_main_process

DESCRIPTION = (
    "Train a shadow. Each field below can be set in a flat YAML file and overridden by a flag; so can each field of "
    "transformers' TrainingArguments (learning_rate, num_train_epochs, activation_checkpointing, …). Running the same command "
    "again resumes a killed run."
)


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    values, as_json = run_settings("umbra train", DESCRIPTION, TrainOptions, arguments)
    from umbra.training.train import train

    with trainer_output(as_json):
        metrics = train(values)
    if is_main_process():
        say(json.dumps(metrics, indent=2) if as_json else lines(metrics))
    _end_process_group()
    return 0


def _end_process_group() -> None:
    """End the process group of a launched run while the interpreter is whole, which its threads need."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
