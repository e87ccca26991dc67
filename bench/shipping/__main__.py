"""``python -m bench.shipping --data ../shared/data``."""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umbra import folder
from umbra.bench.machine import Device

from . import initialise, pretrain, report, tasks
from .text import TASKS

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Run the steps that are named, each on what those before it have left."""
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__)
    parser.add_argument("steps", nargs="*", default=["initialise", "pretrain", "tasks"], help="which, in this order")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("out/shipping"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=list(tasks.ROWS), choices=list(tasks.ROWS))
    given = parser.parse_args()
    if "initialise" in given.steps:
        _keep(given.results, "initialise", initialise.run(given.data, given.out, given.seeds))
    pretrained = given.out / "pretrained"
    if "pretrain" in given.steps:
        _keep(given.results, "pretrain", pretrain.run(given.data, given.out, pretrained))
    if "tasks" in given.steps:
        _keep(
            given.results, "tasks", tasks.run(given.data, given.out, pretrained, given.tasks, given.rows, given.seeds)
        )


WAYS = {
    "initialise": (report.initialisations, report.picture_of_initialisations),
    "tasks": (report.tasks, report.picture_of_tasks),
}


def _keep(results: Path, step: str, found: Any) -> None:
    held = {
        "machine": Device().describe(), "date": date.today().isoformat(),
        "versions": ", ".join(f"{p} {version(p)}" for p in ("umbra-peft", "torch", "transformers", "reasoning_gym")),
        "runs": found,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    folder.write_text(results / f"shipping-{step}.json", json.dumps(held, indent=1) + "\n")
    if step in WAYS:
        text, picture = WAYS[step]
        folder.write_text(results / f"shipping-{step}.md", text(held))
        picture(held, results / f"shipping-{step}.png")
        print(text(held))


main()
