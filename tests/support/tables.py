"""Write docs/reference/compatibility.md and docs/reference/architectures.md from test outcomes (a pytest plugin).

A test that shows that something works with Umbra is marked ``@pytest.mark.compat("Trainers", "TRL DPOTrainer")``; a third
argument is a note for the reader. A test of every family of decoders is marked ``@pytest.mark.architecture("trains")``: a
column of the other page. ``make tables`` runs the tests and rewrites both; `test_docs.py` and `test_architectures.py` hold
them up to date.
"""

import ast
from pathlib import Path

import pytest

from support import architectures, architectures_hybrid, architectures_vision
from support.architectures import ELSEWHERE, Family
from umbra.base.architectures import refusal

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
SECTIONS = ["Adapters of others", "Trainers", "Distributed", "Bases", "Caches", "Drafting", "Compiled", "Many adapters"]
HEADER = """# What Umbra works with

Each line is proven by the number of tests beside it. Written by `make tables` from their outcomes: do not edit by hand.
The architectures have a page of their own: [architectures.md](architectures.md).
"""

FAMILIES = architectures.FAMILIES | architectures_hybrid.FAMILIES
LISTED = FAMILIES | architectures_vision.FAMILIES
REFUSED = architectures.REFUSED | architectures_hybrid.REFUSED
ARCHITECTURES = PAGE.with_name("architectures.md")
COLUMNS = {
    "attaches": "equals the base at first; nothing but the shadow's own weights is trainable, no embedding table among them",
    "trains": "both dialects: finite loss, every trainable weight has a gradient other than 0, no weight of the base has one",
    "generates": "greedy, a left-padded batch: with a cache equal to without",
    "left padding": "a padded row generates as the row alone",
    "hidden states": "plain tensors, as many and as wide as the base's",
    "saves": "the adapter, saved and loaded beside another copy of the base, gives the same logits",
    "unloads": "the base gives the same logits as before, bit for bit; no hook is left",
    "detaches": "the stock model's logits are those that the auxiliary loss is computed from",
    "without Umbra": "the same, read from a folder in a process that cannot import Umbra",
    "dense shadow": '`shadow="dense"` detaches exactly too (for families that are mirrored by default)',
}
ARCHITECTURES_HEADER = """# Which base models Umbra works with

Decoder families of transformers, each from a tiny random configuration; one line a family, ✓ where its test passes, – where a
check does not apply (the note says why). *Shadow* is the form of the default shadow: *mirror*, one block of the base's own
architecture; *dense*, one block of a stock Llama (of a Gemma 3 where the base soft-caps its logits), beside experts, recurrence
and the like. Written by `make tables` from the tests' outcomes: do not edit by hand.
"""


def list_modules(source: Path) -> str:
    """Return docs/reference/modules.md: each module of a package with its docstring's first line."""
    lines = ["# Modules", "", "Each module with its purpose. Written by `make tables`: do not edit by hand.", ""]
    for path in sorted(source.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"- `{path.relative_to(source).as_posix()}`: {summary}")
    return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="rewrite the pages of docs/ that tests prove")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "compat(section, what, note): a line of docs/reference/compatibility.md that this test proves"
    )
    config.addinivalue_line(
        "markers", "architecture(column): a column of docs/reference/architectures.md that this test fills"
    )
    config.pluginmanager.register(_Recorder(config), "tables")


class _Recorder:
    def __init__(self, config: pytest.Config):
        self.writes = config.getoption("--write-tables") and not hasattr(config, "workerinput")
        self.outcomes: dict[tuple[str, str, str], list[bool]] = {}
        self.cells: dict[tuple[str, str], list[bool]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.user_properties += [("compat", line) for line in lines(item)]
            item.user_properties += [("architecture", cell) for cell in cells(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for name, line in report.user_properties:
            if name == "compat":
                self.outcomes.setdefault(tuple(line), []).append(report.passed)
            if name == "architecture":
                self.cells.setdefault(tuple(line), []).append(report.passed)

    def pytest_sessionfinish(self) -> None:
        if self.writes:
            if self.outcomes:
                PAGE.write_text(render(self.outcomes), encoding="utf-8")
            if self.cells:
                ARCHITECTURES.write_text(render_architectures(self.cells), encoding="utf-8")


def lines(item: pytest.Item) -> list[tuple[str, str, str]]:
    """Return the (section, what, note) of a test's marks."""
    return [(*mark.args, "")[:3] for mark in item.iter_markers("compat")]


def render(outcomes: dict[tuple[str, str, str], list[bool]]) -> str:
    """Return docs/reference/compatibility.md from the outcomes of each line's tests."""
    page = [HEADER]
    for section in SECTIONS:
        page += [f"## {section}\n", "| what | tests | note |", "|---|---:|---|"]
        for (_, what, note), passed in sorted(o for o in outcomes.items() if o[0][0] == section):
            page.append(f"| {what} | {f'{len(passed)}' if all(passed) else f'{passed.count(False)} fail'} | {note} |")
        page.append("")
    return "\n".join(page)


def cells(item: pytest.Item) -> list[tuple[str, str]]:
    """Return the (family, column) of a test's marks."""
    parameters = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    return [
        (parameters.get("pair") or parameters["name"], mark.args[0])
        for mark in item.iter_markers("architecture")
        if parameters
    ]


def render_architectures(outcomes: dict[tuple[str, str], list[bool]]) -> str:
    """Return docs/reference/architectures.md from the outcomes of each family's checks."""
    page = [ARCHITECTURES_HEADER, *(f"- **{column}**: {what}" for column, what in COLUMNS.items()), ""]
    page += [f"{len(LISTED)} families.\n", f"| family | kind | shadow | {' | '.join(COLUMNS)} | note |"]
    page.append(f"|---|---|---|{':---:|' * len(COLUMNS)}---|")
    for name, family in sorted(LISTED.items()):
        marks = [_mark(outcomes.get((name, column))) for column in COLUMNS]
        page.append(f"| `{name}` | {family.kind} | {family.shadow} | {' | '.join(marks)} | {_note(family)} |")
    page += ["\n## What cannot carry a shadow\n", "`umbra.attach` says so in one error.\n"]
    page += [f"- `{name}`: {refusal(name)}" for name in sorted(REFUSED)]
    page += ["\n## Not tried\n"] + [f"- {name}: {reason}" for name, reason in sorted(ELSEWHERE.items())]
    return "\n".join(page) + "\n"


def _mark(passed: list[bool] | None) -> str:
    return "–" if passed is None else "✓" if all(passed) else "fails"


def _note(family: Family) -> str:
    skipped = [f"{column}: {reason}" for column, reason in family.skip.items()]
    return "; ".join(filter(None, [family.note, *skipped]))
