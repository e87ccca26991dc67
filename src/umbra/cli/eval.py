"""``umbra eval``: score base, attached and detached on a held-out set."""

import json

from umbra.cli.parsing import parse
from umbra.cli.results import trainer_output
from umbra.cli.terminal import say
from umbra.options import EvalOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra eval", EvalOptions, arguments)
    with trainer_output(options.json):
        from umbra.evaluation.scores import as_json, table
        from umbra.evaluation.scoring import score_modes, write_replies

        scores, replies = score_modes(options)
    try:
        say(json.dumps(as_json(scores), indent=2) if options.json else table(scores))
    finally:
        write_replies(options.output, replies)
    return 0
