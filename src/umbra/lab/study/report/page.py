"""Render a report with jinja2: as Markdown, and as one self-contained HTML page for light and dark screens."""

import html as escaping
import re
from dataclasses import dataclass, field
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from umbra.errors import one_line, plain

TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what Markdown would read as HTML


@dataclass
class Section:
    """A heading with paragraphs, a table and a figure, each of which may be missing.

    Args:
        title: The heading.
        text: Paragraphs, with Markdown's `code` and **bold**.
        header: The column titles; the first column has names, the others numbers.
        rows: The cells of the table.
        figure: The name of the figure.
    """

    title: str
    text: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figure: str | None = None

    @property
    def anchor(self) -> str:
        """The identifier for links within the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def markdown(title: str, lead: list[str], sections: list[Section], figures: dict[str, str]) -> str:
    """Return a report as Markdown; ``figures`` are paths by name."""
    template = _environment(is_html=False).get_template("report.md.j2")
    return TAG.sub("&lt;", plain(template.render(title=title, lead=lead, sections=sections, figures=figures)))


def html(title: str, lead: list[str], sections: list[Section], figures: dict[str, str]) -> str:
    """Return a report as an HTML page; ``figures`` are SVG by name."""
    template = _environment(is_html=True).get_template("report.html.j2")
    return plain(template.render(title=title, lead=lead, sections=sections, figures=figures))


@cache
def _environment(is_html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("umbra.lab.study.report"), autoescape=is_html, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"inline": _inline, "cell": _cell, "one_line": one_line}
    return environment


def _cell(text: str) -> str:
    """Return the text of a Markdown table's cell."""
    return one_line(text).replace("|", "\\|")


def _inline(text: str) -> Markup:
    """Convert Markdown's `code` and **bold** to HTML; a Markdown library would read more than these two into the texts."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaping.escape(text, quote=False))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))
