"""The advice on missing packages works without a registry entry for Umbra."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from umbra.options import extras

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["onnx", "gguf", "evaluate", "lm-eval"])
def test_command_lists_requirements_of_extra(monkeypatch, extra):
    written = [f'{name}; extra == "{key}"' for key, names in EXTRAS.items() for name in names if ";" not in name]
    monkeypatch.setattr(extras, "requires", lambda name: ["torch>=2", *written])
    assert extras.packages(extra) == sorted(EXTRAS[extra])
    command = extras.install_command(extra)
    assert command.startswith("pip install '") and all(f"'{name}'" in command for name in EXTRAS[extra])


def test_command_without_metadata_names_checkout(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", missing)
    assert extras.install_command("onnx") == "pip install -e '.[onnx]' in a checkout of Umbra"


def test_no_text_installs_umbra_from_registry():
    texts = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "examples").iterdir(),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
    ]
    for path in texts:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "pip install umbra-peft" not in text and "umbra-peft[" not in text, path
