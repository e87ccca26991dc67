"""The demo's own code; its training takes minutes and is not run here."""

import json

import pytest
from demo import run

from support.tiny import make
from support.tokenizer import make_tokenizer
from umbra.deploy.opening import MODES, open_model


@pytest.fixture
def opened(tmp_path):
    """A trained-looking adapter on a tiny base, as the demo opens it."""
    model = make()
    model.base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", tokenizer=make_tokenizer())
    return open_model(str(tmp_path / "adapter"), str(tmp_path / "base"), allow_other_base=True)


def test_demo_scores_every_mode(opened):
    records = [{"prompt": [{"role": "user", "content": text}], "completion": "a"} for text in ("one", "two")]
    scores, samples = run.measure(opened, records)
    assert [s.mode for s in scores] == list(MODES) and all(s.total == 2 and s.tokens_per_second for s in scores)
    assert all({"prompt", "reference", *MODES} == set(sample) for sample in samples)
    assert scores[0].parameters == sum(p.numel() for p in opened.model.base.parameters())


def test_demo_splits_share_no_question(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(run, "OUT", tmp_path)
    monkeypatch.setattr(run, "SPLITS", {name: (8, seed) for name, (_, seed) in run.SPLITS.items()})
    run.make_data()
    asked = [r["prompt"][-1]["content"] for split in run.SPLITS for r in run.read(split)]
    assert len(asked) == len(set(asked)) == 24
    assert json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])["prompt"][0]["content"] == run.SYSTEM
