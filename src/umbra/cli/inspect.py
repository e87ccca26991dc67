"""``umbra inspect``: explain an adapter folder."""

import json

from umbra.cli.parsing import parse
from umbra.cli.terminal import say
from umbra.options import InspectOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra inspect", InspectOptions, arguments)
    from umbra.adapters.inspect import explain, inspect

    facts = inspect(options.path)
    say(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else explain(facts))
    return 0
