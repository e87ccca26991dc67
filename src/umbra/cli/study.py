"""``umbra study``: compare methods over tasks and seeds."""

import json

from umbra.cli.parsing import parse
from umbra.cli.results import check_installed, trainer_output
from umbra.cli.terminal import say
from umbra.lab.options import StudyOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code: 1 if a run failed."""
    options = parse("umbra study", StudyOptions, arguments)
    check_installed("umbra study", "evaluate", ("peft", "scipy", "matplotlib"))
    from umbra.lab.study.sweep import run_study

    with trainer_output(options.json):
        result = run_study(options)
    say(json.dumps(result, indent=2) if options.json else "\n".join(result["report"]))
    return 1 if result["failed"] else 0
