"""``umbra predict``: predict a label or an answer for every line."""

import sys

from umbra.cli.parsing import parse
from umbra.cli.results import trainer_output
from umbra.cli.terminal import raw_output
from umbra.options import PredictOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra predict", PredictOptions, arguments)
    with trainer_output(True):  # some packages print or keep the stream when they are imported
        from umbra.evaluation.predict import predict

    stdout = sys.stdout
    with raw_output(), trainer_output(True):
        count, skipped = predict(options, lambda line: print(line, file=stdout, flush=True))
    more = f", {skipped} bad lines skipped" if skipped else ""
    if options.output is not None or skipped:
        print(f"umbra: {count} predictions{more}", file=sys.stderr)
    return 0
