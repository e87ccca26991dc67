"""The documentation names existing code, and its examples run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import umbra
from support import tables
from support.pages import PAGES, ROOT, Block, blocks, commands, run_command, run_page, unexplained
from umbra.cli import VERBS
from umbra.options import EMBEDDED

README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    """Return a page's path, as the name of its test."""
    return path.relative_to(ROOT).as_posix()


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


def test_design_page_names_every_room():
    tree = (ROOT / "docs/explanation/design.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "src/umbra").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in (ROOT / "src/umbra").glob("*/__init__.py")}
    for name in modules | packages:
        assert f"  {name} " in tree, f"the page's tree lacks {name}"


def test_modules_page_is_up_to_date(request):
    """The page lists each module with its docstring's first line; ``make tables`` writes it."""
    page, text = ROOT / "docs/reference/modules.md", tables.list_modules(ROOT / "src/umbra")
    if request.config.getoption("--write-tables"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text, "run `make tables`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_code_block_runs_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    assert unexplained(text) == []
    for block in blocks(text):
        if block.mark and block.mark.startswith("run by "):
            assert (ROOT / block.mark.split()[2]).is_file(), block.mark


def test_unmarked_block_that_cannot_run_is_reported():
    text = "```sh\numbra inspect out\n```\n\n```yaml\na: 1\n```\n\n<!-- not run: slow -->\n```c\nx\n```\n\n```c\nint x;\n```\n"
    assert unexplained(text) == ["yaml: a: 1", "c: int x;"]
    titled = '```json title="a.jsonl"\n{}\n```\n'
    assert list(blocks(titled)) == [Block("json", "a.jsonl", "{}\n", None)] and unexplained(titled) == []
    with pytest.raises(AssertionError, match="mark the block"):
        run_command(["pip", "install", "x"])


@pytest.fixture
def tiny_base(monkeypatch, tmp_path, base_folder):
    """Let the embedded base's name lead to a tiny base, and change to a temporary folder."""
    monkeypatch.setattr("umbra.base.loading._resolve", lambda name: base_folder if name == EMBEDDED else name)
    monkeypatch.setattr("umbra.files.hub.embedded_wheel", lambda: Path(base_folder))
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUNNING = [page for page in PAGES[1:] if any(block.runs for block in blocks(page.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("page", RUNNING, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_code_blocks_of_page_run(page, tiny_base):
    assert run_page(page.read_text(encoding="utf-8"), tiny_base) > 0


def test_commands_of_readme_run(tiny_base):
    (tiny_base / "train.jsonl").write_text('{"prompt": "lamp red", "completion": "red"}\n' * 4)
    (tiny_base / "test.jsonl").write_text('{"prompt": "lamp blue", "completion": "blue"}\n' * 2)
    [block] = [b for b in blocks(README) if b.mark and "run by tests/test_docs.py" in b.mark]
    verbs = []
    for words in commands(block.code):
        verbs.append(words[1])
        if words[1] != "export":  # tests/deploy/test_export.py runs it
            run_command(words)
    assert verbs == ["train", "eval", "generate", "detach", "export"]


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_commands_page_has_every_verb():
    page = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    for verb in [verb for group in VERBS.values() for verb in group]:
        assert f"## `umbra {verb}`" in page
        assert verb == "lm_eval" or f"<!-- help: {verb} -->" in page


def test_api_page_has_every_public_name():
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    errors = re.findall(r"[├└]── (\w+)", page)
    for name in umbra.__all__:
        assert f"::: umbra.{name}\n" in page or name in [*errors, "UmbraError"], name


def test_citation_has_version_of_changelog_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert newest is not None and citation["version"] == newest[1] == umbra.__version__
    assert citation["references"][0]["url"].endswith("arxiv.org/abs/2604.19254")


def test_navigation_lists_every_page():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in settings, page


NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_runs(path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env=environment)
    written = [o.text for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", ())]
    assert written, "save the notebook with the outputs that its readers see"


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
def test_python_of_readme_runs(tmp_path):
    """Run all Python blocks in order, as one program, on the embedded base."""
    code = "\n".join(block.code for block in blocks(README) if block.language == "python" and block.runs)
    assert "umbra.attach" in code
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:umbra", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lamp.set('yellow')" in done.stdout
