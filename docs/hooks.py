"""What the site adds to the pages of docs/ (a hook of mkdocs): linked files of the repository, notebooks, and help texts.

Pages link to files as GitHub shows them, such as ``../../bench/results/drafting.md``. A linked file outside docs/ becomes part of
the site, below ``repository/``. Each notebook of docs/notebooks becomes a page. A line ``<!-- help: train -->`` becomes the output
of ``umbra train --help``, and ``<!-- fields: umbra.config ShadowConfig -->`` a table of the fields of a dataclass.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)((?:#[^)\s]*)?\))")
FIELDS = re.compile(r"^<!-- fields: ([\w.]+) (\w+) -->$", re.MULTILINE)
TABLE_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
HELP = re.compile(r"^<!-- help: ?(\w*) -->$", re.MULTILINE)


def site_path(path: Path) -> str:
    """Return the place of a repository's file on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).with_suffix(".md" if path.suffix == ".ipynb" else path.suffix).as_posix()
    return "repository/" + path.relative_to(ROOT).as_posix()


def targets(text: str, folder: Path) -> list[Path]:
    """Return the files that a page in this folder links to."""
    linked = [Path(os.path.normpath(folder / match[2])) for match in LINK.finditer(text)]
    return [path for path in linked if path.is_file() and path.is_relative_to(ROOT)]


def linked_files(pages: Iterable[Path]) -> set[Path]:
    """Return the files outside docs/ that the pages link to, directly or through each other."""
    found: set[Path] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        new = {path for path in targets(page.read_text(encoding="utf-8"), page.parent) if not path.is_relative_to(DOCS)}
        waiting += [path for path in new - found if path.suffix == ".md"]
        found |= new
    return found


def relinked(text: str, folder: Path, here: str) -> str:
    """Return a page's text with links to files of the repository as the site has them."""

    def replace(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match[2]))
        if not path.is_file() or not path.is_relative_to(ROOT):
            return match[0]
        return match[1] + relpath(site_path(path), str(Path(here).parent)) + match[3]

    return LINK.sub(replace, text)


def help_text(verb: str) -> str:
    """Return the output of ``umbra VERB --help`` as a block of text."""
    command = [
        sys.executable,
        "-c",
        "import sys; from umbra.cli import main; sys.exit(main())",
        *verb.split(),
        "--help",
    ]
    environment = {**os.environ, "COLUMNS": "84", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return f"```text\n{done.stdout.rstrip()}\n```"


def field_table(module: str, name: str) -> str:
    """Return the fields of a dataclass of options as a table: name, type, default, help text."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(getattr(import_module(module), name)):
        written = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        is_plain = field.default is not dataclasses.MISSING and field.default not in (None, "")
        default = (
            f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`" if is_plain else ""
        )
        cells = (f"`{field.name}`", f"`{written}`", default, field.metadata.get("help", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def plain_pipes(row: re.Match[str]) -> str:
    r"""Return a table's row with ``|`` for ``\|`` in code, where GitHub reads an escape and Python-Markdown does not."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add linked files of the repository, and a page for each notebook."""
    pages = [Path(file.abs_src_path or "") for file in files.documentation_pages()]
    for path in sorted(linked_files(pages)):
        files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(path))
        note = f'!!! note\n    This page is a notebook: <a href="{path.name}" download>download {path.name}</a>.\n\n'
        title, _, rest = text.lstrip().partition("\n")
        files.append(File.generated(config, site_path(path), content=f"{title}\n\n{note}{rest}"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend links that leave docs/, and fill in help texts."""
    source = page.file.abs_src_path
    folder = Path(source).parent if source else (DOCS / page.file.src_uri).parent
    if page.is_homepage:
        page.meta.setdefault("hide", ["navigation"])  # its sidebar would hold the page's own name alone
    text = FIELDS.sub(lambda match: field_table(match[1], match[2]), relinked(markdown, folder, page.file.src_uri))
    return HELP.sub(lambda match: help_text(match[1]), TABLE_ROW.sub(plain_pipes, text))
