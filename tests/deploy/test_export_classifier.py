"""Exported classifiers: text in, label and probabilities out, as in PyTorch; README.md, and the errors of run.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import umbra
from support.tiny import CLASSIFIERS, make_base
from support.tokenizer import make_tokenizer
from umbra.data import encode_plain
from umbra.deploy.export import classifier as room
from umbra.deploy.export import export, table
from umbra.options import ExportOptions

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

NAMES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
TEXTS = ["one", "a longer text of several words", "x", "Who?"]
LONGER = {"max_position_embeddings": 24}


def make_folder(folder: Path, problem: str = "single", name: str = "llama") -> str:
    names = NAMES if problem != "regression" else {}
    make_base(name, classifier=True, **CLASSIFIERS[problem], **names, **LONGER).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=CLASSIFIERS)
def exported(request, tmp_path_factory):
    """Stock classifier, its export, and the comparison."""
    root = tmp_path_factory.mktemp(request.param)
    path = make_folder(root / "model", request.param)
    (root / "texts.txt").write_text("\n".join(TEXTS))
    options = ExportOptions(adapter=path, to="onnx", out=str(root / "out"), prompts=str(root / "texts.txt"))
    return request.param, Path(path), root / "out", export(options)[0]


def call(folder: Path, *arguments: str, python: str = sys.executable, flags: tuple = (), **options):
    command = [python, *flags, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_onnx_classifier_matches_model(exported):
    _, _, out, rows = exported
    assert [row.file for row in rows] == ["model-fp32.onnx", "model-int8.onnx"]
    assert rows[0].same_answers == rows[0].answers == len(TEXTS)
    assert rows[0].logits_max < 1e-4
    assert 0 < rows[1].logits_max < 0.5
    assert json.loads((out / "parity.json").read_text())[0]["classifies"]
    assert "same class" in table(rows)


@torch.no_grad()
@pytest.mark.parametrize("text", ["a green one", "a text of more than twenty-four characters, which is cut"])
def test_run_py_prints_label_and_probabilities(exported, text):
    problem, path, out, _ = exported
    done = call(out, "--model", "model-fp32.onnx", text)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    z = model(input_ids=torch.tensor([encode_plain(tokenizer, text)[:24]])).logits[0]
    if problem == "regression":
        assert printed == {"prediction": pytest.approx(float(z[0]), abs=1e-4)}
        return
    p = (z.sigmoid() if problem == "multi" else z.softmax(-1)).tolist()
    assert list(printed["probabilities"]) == ["red", "green", "blue"]
    assert list(printed["probabilities"].values()) == pytest.approx(p, abs=1e-4)
    names = list(NAMES["label2id"])
    assert printed["prediction"] == (
        [n for n, x in zip(names, p, strict=True) if x > 0.5] if problem == "multi" else names[z.argmax()]
    )


def test_adapter_of_a_classifier_exports(tmp_path):
    path = make_folder(tmp_path / "base")
    model = umbra.attach(AutoModelForSequenceClassification.from_pretrained(path), umbra.ShadowConfig(rank=4))
    model.save_pretrained(tmp_path / "adapter")
    options = ExportOptions(
        adapter=str(tmp_path / "adapter"), to="onnx", out=str(tmp_path / "out"), quantization="int8"
    )
    [row] = export(options)[0]
    assert row.file == "model-int8.onnx"
    assert not (tmp_path / "out" / "model-fp32.onnx").exists()
    readme = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "onnxruntime tokenizers numpy",
        "python out/run.py",
        "## Agreement",
        "model-int8.onnx",
        "## License",
        "red, green, blue",
    ):
        assert part in readme, part
    assert str(tmp_path) not in readme, "the path of the base is nobody's business"


def test_classifier_with_another_class_is_refused(tmp_path, monkeypatch):
    """An export whose logits differ is not written."""
    monkeypatch.setattr(room, "TOLERANCE", -1.0)
    options = ExportOptions(adapter=make_folder(tmp_path / "base"), to="onnx", out=str(tmp_path / "out"))
    with pytest.raises(umbra.ExportError, match="Nothing was written"):
        export(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "more", "message"), [("gguf", {}, "llama.cpp needs"), ("onnx", {"vocabulary": "{}"}, "leave it out")]
)
def test_unsupported_export_of_classifier_is_refused(tmp_path, to, more, message):
    (tmp_path / "text.txt").write_text("one")
    more = {key: str(tmp_path / "text.txt") for key in more}
    with pytest.raises(umbra.ExportError, match=message):
        export(ExportOptions(adapter=make_folder(tmp_path / "base"), to=to, out=str(tmp_path / "out"), **more))
    assert not (tmp_path / "out").exists()


# -- run.py ------------------------------------------------------------------------------------------------------------

MISSING = ["prompt.json", "tokenizer.json", "model-fp32.onnx", "model-fp32.onnx.data"]


@pytest.fixture
def copied(exported, tmp_path):
    problem, _, out, _ = exported
    if problem != "single":
        pytest.skip("one export is enough")
    for file in out.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def assert_one_line(done, message: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"run\.py: .+\n", done.stderr), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("name", MISSING)
def test_missing_file_is_one_line(copied, name):
    (copied / name).unlink()
    assert_one_line(call(copied, "--model", "model-fp32.onnx", "a"), f"{name} is missing: copy the whole")


@pytest.mark.parametrize("name", ["prompt.json", "tokenizer.json", "model-fp32.onnx"])
def test_damaged_file_is_one_line(copied, name):
    (copied / name).write_text("{")
    assert_one_line(call(copied, "--model", "model-fp32.onnx", "a"), "run.py: ")


@pytest.mark.parametrize("package", ["numpy", "onnxruntime", "tokenizers"])
def test_missing_package_is_one_line(copied, package, tmp_path):
    """A package that raises ImportError stands before the installed one on the import path."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    done = call(copied, "a", env={"PYTHONPATH": str(blocked)})
    assert_one_line(done, f"{package} is missing: pip install onnxruntime tokenizers numpy")


def test_help_needs_no_package_and_no_file(copied):
    for file in ("prompt.json", "model-int8.onnx"):
        (copied / file).unlink()
    done = call(copied, "--help", flags=("-I", "-S"))  # without installed packages
    assert done.returncode == 0, done.stderr
    assert "usage: run.py" in done.stdout


def test_empty_text_is_one_line(copied):
    assert_one_line(call(copied, " "), "the text is empty")


def test_old_python_is_one_line(copied):
    script = (copied / "run.py").read_text()
    (copied / "run.py").write_text(script.replace("OLDEST = (3, 10)", "OLDEST = (9, 9)"))
    assert_one_line(call(copied, "a"), "Python 9.9 or later is needed")
