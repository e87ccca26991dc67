"""``umbra generate``: answer one prompt."""

import json

from umbra.cli.parsing import parse
from umbra.cli.results import trainer_output
from umbra.cli.terminal import raw_output, say
from umbra.options import GenerateOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra generate", GenerateOptions, arguments)
    with trainer_output(True) if options.json else raw_output():
        from umbra.evaluation.generate import generate

        answer = generate(options)
    if options.json:
        say(json.dumps(answer, indent=2, ensure_ascii=False))
    return 0
