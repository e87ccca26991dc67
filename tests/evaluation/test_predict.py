"""``umbra predict``: one line per record, in order, with PyTorch's label and probabilities; nothing is lost on a bad line."""

import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from support.runs import write
from support.tiny import CLASSIFIERS, LLAMA_LIKE, make, make_base
from support.tokenizer import make_tokenizer
from umbra.cli import main
from umbra.data import encode_plain
from umbra.evaluation.predict import asked

NAMES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
TEXTS = ["one", "a longer text of words", "two", "x", "some more", "last one"]


@pytest.fixture(params=CLASSIFIERS)
def classifier(request, tmp_path):
    """A folder with a stock classifier, and its problem."""
    problem = request.param
    names = NAMES if problem != "regression" else {}
    make_base(classifier=True, **CLASSIFIERS[problem], **names).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", problem


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def test_prediction_is_that_of_transformers(classifier, tmp_path, capsys):
    path, problem = classifier
    data = write(tmp_path / "data.jsonl", [{"id": i, "text": text, "label": "?"} for i, text in enumerate(TEXTS)])
    assert main(["predict", str(path), data, "--batch-size", "4"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [(row["id"], row["text"], row["label"]) for row in rows] == [(i, t, "?") for i, t in enumerate(TEXTS)]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    for row, text in zip(rows, TEXTS, strict=True):
        z = model(input_ids=torch.tensor([encode_plain(tokenizer, text)])).logits[0]
        if problem == "regression":
            assert row["prediction"] == pytest.approx(float(z[0]), abs=1e-4)
            assert "probabilities" not in row
            continue
        p = z.sigmoid() if problem == "multi" else z.softmax(-1)
        assert list(row["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-4)
        names = list(NAMES["label2id"])
        expected = [n for n, x in zip(names, z, strict=True) if x > 0] if problem == "multi" else names[int(z.argmax())]
        assert row["prediction"] == expected


@pytest.fixture
def single(tmp_path):
    make_base(classifier=True, **CLASSIFIERS["single"], **NAMES).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


BAD = {
    "no JSON": ("{'text': 1}", "is not JSON"),
    "no object": ("[1]", "not an object"),
    "no text": ('{"prompt": "a"}', "needs a column 'text'"),
    "empty text": ('{"text": " "}', "'text' is"),
    "a number": ('{"text": 3}', "'text' is 3"),
    "a taken column": ('{"text": "a", "prediction": 1}', "rename it"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_line_is_named_before_any_prediction(single, tmp_path, capsys, what):
    line, message = BAD[what]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"text": "a"}\n\n' + line + "\n")
    out.write_text("earlier\n")
    assert main(["predict", single, str(data), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "data.jsonl:3" in error
    assert out.read_text() == "earlier\n"


def test_bad_line_is_skipped_on_request(single, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\nno\n{"text": "b"}\n')
    assert main(["predict", single, str(tmp_path / "data.jsonl"), "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert [row["text"] for row in rows_of(captured.out)] == ["a", "b"]
    assert "data.jsonl:2 is not JSON" in captured.err
    assert "2 predictions, 1 bad lines skipped" in captured.err


def test_lines_before_a_bad_one_are_predicted_on_stdin(single, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\n{"text": "b"}\nno\n{"text": "c"}\n'))
    assert main(["predict", single, "-"]) == 2
    captured = capsys.readouterr()
    assert [row["text"] for row in rows_of(captured.out)] == ["a", "b"]
    assert "standard input:3 is not JSON" in captured.err


def test_partial_output_stays_after_an_error(single, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\nno\n'))
    assert main(["predict", single, "-", "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert len(rows_of((tmp_path / "out.partial").read_text())) == 1
    assert "out.partial" in capsys.readouterr().err


def test_predictions_are_written_while_stdin_is_open(single):
    """The first line is answered before the second one is sent."""
    command = [sys.executable, "-m", "umbra", "predict", single, "-", "--batch-size", "1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("a", "b"):
        process.stdin.write(json.dumps({"text": text}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def escalating(tmp_path):
    """An adapter whose shadow escalates, of a base with a character tokenizer."""
    base = make_base(**LLAMA_LIKE)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = make(escalation="zz")
    model.save_pretrained(tmp_path / "adapter")
    return ["predict", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_language_model_answers_as_generate(escalating, tmp_path, capsys, mode):
    data = write(tmp_path / "data.jsonl", [{"prompt": "abc", "key": 7}, {"prompt": "what is this"}])
    more = ["--max-new-tokens", "5", "--mode", mode]
    assert main([*escalating, data, *more]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[0]["key"] == 7
    assert [row["escalated"] for row in rows] == [row["prediction"].strip().startswith("zz") for row in rows]
    for row in rows:
        assert main(["generate", *escalating[1:], row["prompt"], *more, "--json"]) == 0
        assert row["prediction"] == json.loads(capsys.readouterr().out)["answer"]


def test_answer_of_a_record_is_not_read():
    """A conversation may end with the user or with the assistant; both are the same request."""
    turns = [{"role": "user", "content": "a"}]
    answered = [*turns, {"role": "assistant", "content": "secret"}]
    assert asked({"messages": turns}, "x") == asked({"messages": answered}, "x")
    assert "secret" not in str(asked({"prompt": "a", "completion": "secret"}, "x"))
