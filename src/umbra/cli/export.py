"""``umbra export``: write the shadow alone for another runtime."""

import dataclasses
import json

from umbra.cli.parsing import parse
from umbra.cli.results import trainer_output
from umbra.cli.terminal import say
from umbra.options import ExportOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = parse("umbra export", ExportOptions, arguments)
    with trainer_output(options.json):
        from umbra.deploy.export import export, table

        rows, answer = export(options)
    if options.json:
        result = {"path": options.out, "files": [dataclasses.asdict(r) for r in rows], "answer": answer}
        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        say("\n\n".join([table(rows), *([answer] if answer is not None else [])]))
    return 0
