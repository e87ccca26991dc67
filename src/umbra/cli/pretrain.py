"""``umbra pretrain``: pretrain a shadow alone."""

import json

from umbra.cli.parsing import run_settings
from umbra.cli.results import flattened, lines, trainer_output
from umbra.cli.terminal import say
from umbra.options import PretrainOptions

DESCRIPTION = (
    "Pretrain a shadow alone, from text and from the frozen base; the folder then serves as `--shadow` of umbra train. Each "
    "field below can be set in a flat YAML file and overridden by a flag; so can each field of transformers' TrainingArguments "
    "(max_steps, learning_rate, …), for each stage. Running the same command again resumes a killed run."
)


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    values, as_json = run_settings("umbra pretrain", DESCRIPTION, PretrainOptions, arguments)
    from umbra.training.pretrain import pretrain

    with trainer_output(as_json):
        metrics = pretrain(values)
    say(json.dumps(metrics, indent=2) if as_json else lines(flattened(metrics)))
    return 0
