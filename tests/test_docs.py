"""The documentation names existing code, and the README's examples run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def defined(module: Path) -> set[str]:
    """Return `name` and `Class.name` of every definition in a module."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


def test_paper_page_names_existing_code():
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (ROOT / "docs/explanation/method.md").read_text(encoding="utf-8"))
    assert len(places) > 10
    for file, name in places:
        assert name in defined(ROOT / "src/umbra" / file), f"{file} has no {name}"


def test_readme_names_every_room():
    modules = {path.name for path in (ROOT / "src/umbra").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in (ROOT / "src/umbra").glob("*/__init__.py")}
    for name in modules | packages:
        assert f"  {name} " in README, f"README's tree lacks {name}"


def test_modules_page_is_up_to_date(request):
    """The page lists each module with its docstring's first line; ``make tables`` writes it."""
    page, text = ROOT / "docs/reference/modules.md", tables.list_modules(ROOT / "src/umbra")
    if request.config.getoption("--write-tables"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text, "run `make tables`"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_resolve(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).exists(), path


def test_compatibility_page_lists_tested_lines(request):
    """The page has every line of a collected test's marks; if all tests are collected, it has no other."""
    if request.config.getoption("--write-tables"):
        return
    written = set(re.findall(r"^\| (.+?) \| \d+ \|", tables.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    marked = {(section, what) for item in request.session.items for section, what, _ in tables.lines(item)}
    assert {section for section, _ in marked} <= set(tables.SECTIONS)
    assert {what for _, what in marked} <= written, "run `make tables`"
    if len({item.path for item in request.session.items}) == len(list((ROOT / "tests").rglob("test_*.py"))):
        assert written == {what for _, what in marked}, "run `make tables`"


@pytest.mark.real
def test_readme_python_runs(tmp_path):
    """Run all Python blocks in order, as one program, on the embedded base."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert "umbra.attach" in code
    (tmp_path / "data.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n' * 4)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:umbra", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
