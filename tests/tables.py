"""docs/compatibility.md, written from the outcomes of the tests that prove its lines (a pytest plugin).

A test that shows that something works with Umbra is marked ``@pytest.mark.compat("Trainers", "TRL DPOTrainer")``; a third
argument is a note for the reader. ``make tables`` runs the tests and rewrites the page; `test_docs.py` holds it up to date.
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
SECTIONS = ["Adapters of others", "Trainers", "Distributed", "Bases", "Caches", "Compiled", "Many adapters"]
HEADER = """# What Umbra works with

Each line is proven by the number of tests beside it. Written by `make tables` from their outcomes: do not edit by hand.
The architectures have a page of their own: [architectures.md](architectures.md).
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="rewrite the pages of docs/ that tests prove")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "compat(section, what, note): a line of docs/compatibility.md that this test proves"
    )
    config.pluginmanager.register(_Recorder(config), "tables")


class _Recorder:
    def __init__(self, config: pytest.Config):
        self.writes = config.getoption("--write-tables") and not hasattr(config, "workerinput")
        self.outcomes: dict[tuple[str, str, str], list[bool]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.user_properties += [("compat", line) for line in lines(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for name, line in report.user_properties:
            if name == "compat":
                self.outcomes.setdefault(tuple(line), []).append(report.passed)

    def pytest_sessionfinish(self) -> None:
        if self.writes:
            PAGE.write_text(render(self.outcomes), encoding="utf-8")


def lines(item: pytest.Item) -> list[tuple[str, str, str]]:
    """The (section, what, note) that a test is marked with."""
    return [(*mark.args, "")[:3] for mark in item.iter_markers("compat")]


def render(outcomes: dict[tuple[str, str, str], list[bool]]) -> str:
    """The page, from the outcomes of each line's tests."""
    page = [HEADER]
    for section in SECTIONS:
        page += [f"## {section}\n", "| what | tests | note |", "|---|---:|---|"]
        for (_, what, note), passed in sorted(o for o in outcomes.items() if o[0][0] == section):
            page.append(f"| {what} | {f'{len(passed)}' if all(passed) else f'{passed.count(False)} fail'} | {note} |")
        page.append("")
    return "\n".join(page)
