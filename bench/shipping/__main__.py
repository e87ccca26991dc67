"""``python -m bench.shipping --data ../shared/data``."""

import argparse
import json
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umbra.files import folder
from umbra.lab.bench.machine import Device

from . import edge, initialise, pretrain, report, tasks, widths
from .text import TASKS

RESULTS = Path(__file__).parent.parent / "results"
STEPS = ["initialise", "pretrain", "tasks", "widths", "edge"]
EDGE_TASK, EDGE_ROW = "intents", "pretrained_alone_first_distilled"
Table = Callable[[dict[str, Any]], str]
TABLES: dict[str, tuple[Table, Callable[[dict[str, Any], Path], None] | None]] = {
    "initialise": (report.initialisations, report.picture_of_initialisations),
    "tasks": (report.tasks, report.picture_of_tasks),
    "widths": (report.widths, None),
    "edge": (report.edge, report.picture_of_edge),
}


def main() -> None:
    """Run the given steps, each on the results of the previous ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__)
    parser.add_argument("steps", nargs="*", default=STEPS, help=f"of {', '.join(STEPS)}; default all, in this order")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("out/shipping"), help="folder for runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=list(tasks.ROWS), choices=list(tasks.ROWS))
    given = parser.parse_args()
    pretrained = given.out / "pretrained"
    adapter = given.out / "adapters" / f"{EDGE_TASK}_{EDGE_ROW}_{given.seeds[0]}"
    if unknown := set(given.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    steps: dict[str, Callable[[], Any]] = {
        "initialise": lambda: initialise.run(given.data, given.out, given.seeds),
        "pretrain": lambda: pretrain.run(given.data, given.out, pretrained),
        "tasks": lambda: tasks.run(given.data, given.out, pretrained, given.tasks, given.rows, given.seeds),
        "widths": lambda: widths.run(given.data, given.out, pretrained, given.seeds),
        "edge": lambda: edge.run(given.data, given.out, adapter, EDGE_TASK),
    }
    for step in given.steps:
        result = steps[step]()
        for part in result if step == "tasks" else [result]:
            _write(given.results, step, part)


def _write(results: Path, step: str, runs: Any) -> None:
    """Write the records and the table of a step; runs of the tasks are added to earlier ones."""
    file = results / f"shipping-{step}.json"
    if step == "tasks" and file.exists():
        before = {tasks.key(r): r for r in json.loads(file.read_text(encoding="utf-8"))["runs"]}
        runs = [*{**before, **{tasks.key(r): r for r in runs}}.values()]
    values = {
        "machine": Device().describe(), "date": date.today().isoformat(), "task": EDGE_TASK,
        "versions": ", ".join(f"{p} {version(p)}" for p in ("umbra-peft", "torch", "transformers", "reasoning_gym")),
        "runs": runs,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    folder.write_text(file, json.dumps(values, indent=1) + "\n")
    if step in TABLES:
        table, picture = TABLES[step]
        folder.write_text(file.with_suffix(".md"), table(values))
        if picture is not None:
            picture(values, file.with_suffix(".png"))
        print(table(values))


if __name__ == "__main__":
    main()
