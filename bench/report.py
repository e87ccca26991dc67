"""Render every page of bench/results from its records: ``python -m bench.report``.

    python -m bench.report                             write all pages and the figures that README and docs show
    python -m bench.report pack OUT bench/results/NAME pack the records of a finished study into one file

A study is a folder with ``runs.jsonl.gz``; everything else is one JSON file beside its page. tests/lab/test_results.py checks that
the committed pages are those of the committed records.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import quality
from bench.drafting import report as drafting
from bench.shipping import report as shipping
from umbra.errors import plain
from umbra.files import folder
from umbra.lab.bench import report_of
from umbra.lab.study.archive import ARCHIVE_FILE, FIGURES
from umbra.lab.study.records import pack_study
from umbra.lab.study.report import Report, plots
from umbra.lab.study.results import Results

RESULTS = Path(__file__).parent / "results"
STUDY_FIGURES = {"scaling": ("scaling",)}  # figures of studies that docs/explanation/results.md shows
FIGURES_SHOWN: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "drafting": drafting.picture,
    "shipping-edge": shipping.picture_of_edge,
}


def studies(results: Path = RESULTS) -> dict[str, Report]:
    """Return the report of every packed study by the name of its folder."""
    return {file.parent.name: Report.of(Results(file.parent)) for file in sorted(results.glob(f"*/{ARCHIVE_FILE}"))}


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Return the text of every page by its path."""
    texts = {
        results / name / "report.md": report.markdown(STUDY_FIGURES.get(name, ()))
        for name, report in studies(results).items()
    }
    for file in sorted(results.glob("*.json")):
        text = _page(file.stem, json.loads(file.read_text(encoding="utf-8")))
        if text is not None:
            texts[file.with_suffix(".md")] = plain(text)
    runs = [json.loads(line) for line in (results / "quality.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**texts, results / "quality.md": quality.text(runs)}


def _page(name: str, values: dict[str, Any]) -> str | None:
    """Return the page of one JSON file; None if it has none."""
    if "cases" in values:
        return report_of(values).text()
    if name.startswith("drafting"):
        return drafting.text(values)
    table = shipping.TABLES.get(name.removeprefix("shipping-")) if name.startswith("shipping-") else None
    return None if table is None else table(values)


def write(results: Path = RESULTS) -> list[Path]:
    """Write all pages and figures, and return their paths."""
    texts, written = pages(results), []
    for path, text in texts.items():
        folder.write_text(path, text)
        written.append(path)
    for name, report in studies(results).items():
        for figure in STUDY_FIGURES.get(name, ()):
            path = results / name / FIGURES / f"{figure}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(plots.png(report.figures[figure]))
            written.append(path)
    for name, draw in FIGURES_SHOWN.items():
        path = results / f"{name}.png"
        draw(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), path)
        written.append(path)
    return written


def main() -> None:
    """Render all pages, or pack a study."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    packing = commands.add_parser("pack", help="pack the records of a study into one file")
    packing.add_argument("study", type=Path, help="folder that umbra study has written")
    packing.add_argument("to", type=Path, help="folder of the packed file")
    arguments = parser.parse_args()
    written = [pack_study(arguments.study, arguments.to)] if arguments.command == "pack" else write()
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
