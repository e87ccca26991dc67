"""The fenced code blocks of README and docs/, and a runner for the blocks of one page on a tiny base.

A block runs unless a comment in the line above says ``<!-- not run: REASON -->`` or ``<!-- run by TEST_FILE -->``. Python blocks
of a page share one namespace; commands of ``sh`` blocks run in this process. A block with a title, as in ``json title="a.jsonl"``,
is written as a file.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from umbra.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not run: [^\n]+|run by [^\n]+) -->\n\s*$")
RUNNABLE = {"python", "sh"}
FILES = {"json", "yaml", "text"}
FEW_STEPS = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2"]
FURTHER = {  # of each verb, so that it takes a second on a tiny base
    "train": FEW_STEPS,
    "pretrain": [*FEW_STEPS, "--max_length", "32", "--held_out", "1"],
    "generate": ["--max_new_tokens", "4"],
}


class Block(NamedTuple):
    """A fenced block: its language, title, code, and the text of the comment above it."""

    language: str
    title: str | None
    code: str
    mark: str | None

    @property
    def runs(self) -> bool:
        return self.mark is None and self.language in RUNNABLE


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page; an indented block loses its indentation."""
    for match in FENCE.finditer(text):
        language, _, rest = match[2].strip().partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', rest)
        mark = MARK.search(text[: match.start()])
        code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
        yield Block(language, title and title[1], code, mark and mark[1])


def unexplained(text: str) -> list[str]:
    """Return the first lines of blocks that neither run, nor are files or output, nor say why not."""
    unmarked = []
    for block in blocks(text):
        is_output = block.language == "text"
        is_file = block.language in FILES and block.title is not None
        if not (block.mark or block.runs or is_file or is_output):
            unmarked.append(f"{block.language}: {block.code.partition(chr(10))[0]}")
    return unmarked


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_page(text: str, folder: Path) -> int:
    """Run a page's blocks in order in the current folder, and return how many ran.

    Args:
        text: of the page.
        folder: the working directory, in which titled blocks become files.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for block in blocks(text):
        if block.title is not None:
            (folder / block.title).write_text(block.code, encoding="utf-8")
        if not block.runs:
            continue
        ran += 1
        if block.language == "python":
            torch.manual_seed(0)
            exec(compile(block.code, f"<block {ran}>", "exec"), namespace)
            continue
        for words in commands(block.code):
            run_command(words)
    return ran


def run_command(words: list[str]) -> None:
    """Run one command of a page, with few steps and short answers."""
    program, verb, *rest = words
    assert program == "umbra", f"this test cannot run {words}: mark the block"
    further = FURTHER.get(verb, [])
    given = {word.replace("-", "_") for word in rest if word.startswith("--")}
    pairs = zip(further[::2], further[1::2], strict=True)
    more = [word for flag, value in pairs if flag.replace("-", "_") not in given for word in (flag, value)]
    assert main([verb, *rest, *more]) == 0, words
