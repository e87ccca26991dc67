"""``umbra predict``: predict a label or an answer for every line."""

import sys

from umbra.cli.parsing import parse
from umbra.cli.terminal import raw_output
from umbra.options import PredictOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra predict", PredictOptions, arguments)
    from umbra.evaluation.predict import predict

    with raw_output():
        count, skipped = predict(options, lambda line: print(line, flush=True))
    more = f", {skipped} bad lines skipped" if skipped else ""
    if options.output is not None or skipped:
        print(f"umbra: {count} predictions{more}", file=sys.stderr)
    return 0
