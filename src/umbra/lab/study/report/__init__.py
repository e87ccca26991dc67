"""The report of a study, ``umbra report``: Markdown, one self-contained HTML page, and figures. Losses come first.

wording.py      numbers as text
comparisons.py  the pairs of methods that are compared
lead.py         the paragraphs before the first table
performance.py  scores, differences, costs, transfer, forgetting
analysis.py     scaling, ablations, learning-rate search
appendix.py     failures and reproduction
page.py         templates; plots.py: figures
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.lab.study.archive import FIGURES
from umbra.lab.study.report import analysis, appendix, performance, plots
from umbra.lab.study.report.lead import lead
from umbra.lab.study.report.page import Section, html, markdown
from umbra.lab.study.results import Results

MAKERS = (
    performance.scores, performance.verdicts, performance.costs, performance.transfer, performance.forgetting,
    analysis.scaling, analysis.ablations, analysis.search, appendix.failures, appendix.reproduction,
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The rendered content of a report.

    Args:
        title: The headline.
        lead: Paragraphs before the first section.
        sections: The sections.
        drawings: By name, a function that draws a figure.
    """

    title: str
    lead: list[str]
    sections: list[Section]
    drawings: dict[str, Callable[[], Figure]]

    @classmethod
    def of(cls, results: Results) -> "Report":
        """Return the report of a study's results."""
        sections, drawings = [], {}
        for make in MAKERS:
            section, draw = make(results)
            if section is not None:
                sections.append(section)
                if draw is not None and section.figure:
                    drawings[section.figure] = draw
        return cls(results.study["title"], lead(results), sections, drawings)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The figures by name."""
        return {name: draw() for name, draw in self.drawings.items()}

    def markdown(self, figures: Collection[str] | None = None) -> str:
        """Return the report as Markdown, with links to these figures; default all."""
        names = self.drawings.keys() if figures is None else self.drawings.keys() & set(figures)
        return markdown(self.title, self.lead, self.sections, {n: f"{FIGURES}/{n}.png" for n in names})

    def html(self) -> str:
        """Return the report as an HTML page that contains its figures."""
        return html(self.title, self.lead, self.sections, {name: plots.svg(f) for name, f in self.figures.items()})


def write_report(out: Path, to: Path | None = None) -> list[Path]:
    """Write the report of a study.

    Args:
        out: The folder of the study, with single records or an archive of them.
        to: The folder to write to; default ``out``.

    Returns:
        The paths of ``report.html`` and ``report.md``; the figures of the latter are in the folder `FIGURES`.

    Raises:
        CheckpointError: ``out`` holds no study, or the report cannot be written.
    """
    report, to = Report.of(Results(out)), to or out
    files = {"report.html": report.html(), "report.md": report.markdown()}
    try:
        (to / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, figure in report.figures.items():
            (to / FIGURES / f"{name}.png").write_bytes(plots.png(figure))
    except OSError as error:
        raise CheckpointError(f"The report cannot be written to {to}: {error}") from error

    def write(staging: Path) -> None:
        for name, text in files.items():
            folder.write_text(staging / name, text)

    folder.write_together(to, write)
    return [to / n for n in files]
