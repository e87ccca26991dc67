"""Umbra without the lab: nothing but the command line knows it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import umbra

IMPORT_ALL = """
import importlib, pkgutil, sys
import umbra

assert umbra.__file__.startswith(sys.argv[1]), umbra.__file__
names = [m.name for m in pkgutil.walk_packages(umbra.__path__, "umbra.") if not m.name.endswith("__main__")]
for name in names:
    if name.endswith("export.run"):
        continue  # a script for other machines
    try:
        importlib.import_module(name)
    except ImportError as error:  # of an optional package that is not installed, or of the lab by its verbs
        is_verb = name in ("umbra.cli.study", "umbra.cli.report", "umbra.cli.bench")
        assert is_verb or not str(error.name).startswith("umbra"), (name, error)
print(len(names))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package without the lab."""
    root = tmp_path_factory.mktemp("without")
    shutil.copytree(Path(umbra.__file__).parent, root / "umbra", ignore=shutil.ignore_patterns("lab", "__pycache__"))
    return root


def run(package: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, *command], cwd=package, env=environment, capture_output=True, text=True, check=False
    )


def test_every_module_can_be_imported_without_the_lab(package):
    result = run(package, "-c", IMPORT_ALL, str(package))
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 50


def test_the_command_line_gives_its_help_without_the_lab(package):
    result = run(package, "-m", "umbra", "--help")
    assert result.returncode == 0 and "train" in result.stdout, result.stderr[-2000:]
