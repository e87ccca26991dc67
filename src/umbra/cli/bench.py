"""``umbra bench``: measure time and memory beside other methods."""

import json

from umbra.cli.parsing import parse
from umbra.cli.terminal import say
from umbra.lab.options import BenchOptions


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code: 1 if a method was refused."""
    options = parse("umbra bench", BenchOptions, arguments)
    from umbra.lab.bench import bench

    result = bench(options)
    if options.json:
        say(json.dumps(result, indent=2, ensure_ascii=False))
    return 1 if any("refused" in row for rows in result["cases"].values() for row in rows.values()) else 0
