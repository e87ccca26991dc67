"""``umbra report``: write the report of a study again."""

import json
from pathlib import Path

from umbra.cli.parsing import parse
from umbra.cli.results import check_installed
from umbra.cli.terminal import say
from umbra.lab.options import ReportOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra report", ReportOptions, arguments)
    check_installed("umbra report", "evaluate", ("scipy", "matplotlib"))
    from umbra.files.locks import locked
    from umbra.lab.study.report import write_report

    out = Path(options.out or options.study)
    with locked(out):
        files = write_report(Path(options.study), out)
    say(json.dumps({"report": [str(f) for f in files]}) if options.json else "\n".join(map(str, files)))
    return 0
