"""A report as Markdown, and as one HTML page that needs nothing else: light and dark, tables that scroll, pictures within."""

import html
import re
from dataclasses import dataclass, field

from umbra.errors import one_line, plain

TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what Markdown would take for HTML

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --soft: #5d6068; --line: #d9dbe0; --paper: #fdfdfc; --raised: #f3f4f6;
  --accent: #2f6db3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e5e8; --soft: #9da1aa; --line: #383b43; --paper: #17181b; --raised: #212328; --accent: #7fb2ea }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem }
p, li { max-width: 46rem } .soft { color: var(--soft) } a { color: var(--accent) }
nav { margin: 1rem 0 0; font-size: .92rem } nav a { margin-right: 1rem; white-space: nowrap }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: var(--soft) }
tbody tr:hover { background: var(--raised) }
code { background: var(--raised); padding: .1em .35em; border-radius: 4px; font-size: .9em }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto; color: var(--ink) }
"""


@dataclass
class Section:
    """A heading, paragraphs (with `code` and **bold** of Markdown), a table and a picture, each of which may be missing.

    Args:
        header, rows: the first column is of names, the others of numbers.
        figure: a name under which the picture is kept.
    """

    title: str
    text: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figure: str | None = None


def markdown(title: str, lead: list[str], sections: list[Section], pictures: dict[str, str]) -> str:
    """The report; ``pictures`` are file names by figure."""
    lines = [f"# {one_line(title)}", "", *(line for p in lead for line in (p, ""))]
    for s in sections:
        lines += [f"## {one_line(s.title)}", "", *(line for p in s.text for line in (p, ""))]
        if s.header:
            rule = "|---|" + "---:|" * (len(s.header) - 1)
            lines += [_row(s.header), rule, *map(_row, s.rows), ""]
        if s.figure in pictures:
            lines += [f"![{one_line(s.title)}]({pictures[s.figure]})", ""]
    return TAG.sub("&lt;", plain("\n".join(lines)))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(one_line(c).replace("|", "\\|") for c in cells) + " |"


def page(title: str, lead: list[str], sections: list[Section], pictures: dict[str, str]) -> str:
    """The same; ``pictures`` are SVG by figure."""
    links = " ".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{_inline(p)}</p>" for p in lead), f"<nav>{links}</nav>"]
    for s in sections:
        parts += [f'<h2 id="{_anchor(s.title)}">{html.escape(s.title)}</h2>', *(f"<p>{_inline(p)}</p>" for p in s.text)]
        if s.header:
            head = "".join(f"<th>{_inline(c)}</th>" for c in s.header)
            body = "".join("<tr>" + "".join(f"<td>{_inline(c)}</td>" for c in row) + "</tr>" for row in s.rows)
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            )
        if s.figure in pictures:
            parts.append(f'<figure role="img" aria-label="{html.escape(s.title)}">{pictures[s.figure]}</figure>')
    return plain(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _inline(text: str) -> str:
    """HTML of a line of Markdown's `code` and **bold**."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
