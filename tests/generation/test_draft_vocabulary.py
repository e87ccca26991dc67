"""The tokens that a shadow drafts: chosen from data, saved with the adapter, of no effect on the text."""

import json

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

import umbra
from support.drafts import close_draft, drafted, each_architecture, plain
from support.families import build, cast
from support.tables import FAMILIES
from support.tiny import VOCAB, make, tokens
from umbra.adapters.files import read_config
from umbra.generation.draft_model import DraftHead
from umbra.shadow.draft_vocabulary import frequent_tokens


@each_architecture
@pytest.mark.compat("Drafting", "a trimmed draft vocabulary")
def test_draft_vocabulary_changes_no_token(name):
    """One of the tokens to come, one of all others, one of a few."""
    model, ids = close_draft(name), tokens(1)
    expected, whole = plain(model, ids), drafted(model, ids)
    right = expected[0, 9:].unique().tolist()
    model.set_draft_vocabulary(right)
    of_right = drafted(model, ids)
    model.set_draft_vocabulary(set(range(VOCAB)) - set(right))
    of_wrong = drafted(model, ids)
    model.set_draft_vocabulary(torch.tensor([5, 90, 5]))
    of_few = drafted(model, ids)
    model.set_draft_vocabulary(None)
    for out in (of_right, of_wrong, of_few, drafted(model, ids)):
        assert torch.equal(out.sequences, expected)
    assert of_right.accepted >= whole.accepted > 0 == of_wrong.accepted


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_draft_head_equals_shadow_logits(name):
    """Scaled and capped as the base's own code does; of a part of the vocabulary, those of its tokens."""
    model, ids = cast(build(name)), tokens(1)
    state = model.runner.initial_state({"input_ids": ids, "inputs_embeds": None})[:, -1]
    expected = model.losses.logits_alone(state[:, None])
    for part in (None, [7, 3, 90]):
        model.set_draft_vocabulary(part)
        found = DraftHead(model, model.shadow, ids.device)(state)
        torch.testing.assert_close(found, expected if part is None else expected[:, part], rtol=1e-4, atol=1e-4)


def test_draft_vocabulary_accepts_numpy():
    model = make()
    for given in (np.array([5, 90, 5]), [np.int64(5), torch.tensor(90)]):
        model.set_draft_vocabulary(given)
        assert model.shadow.draft_tokens == [5, 90]


@pytest.mark.parametrize("wrong", [[], [VOCAB], [-1], [1.5], ["a"], [True]], ids=str)
def test_invalid_draft_vocabulary_is_refused(wrong):
    with pytest.raises(umbra.ConfigError, match="draft vocabulary"):
        make().set_draft_vocabulary(wrong)


def test_frequent_tokens_are_counted():
    labels = [torch.tensor([-100, 5, 6, 6]), [7, 7, 7, -100, 9]]
    assert frequent_tokens(labels) == [7, 6, 5, 9]
    assert frequent_tokens(labels, also=[2, 7], most=3) == [2, 7, 6]
    assert frequent_tokens([], also=[2]) == [2]


def test_draft_vocabulary_is_saved_with_adapter(tmp_path):
    model = make()
    model.set_draft_vocabulary([7, 3, 90])
    model.save_pretrained(tmp_path / "one")
    loaded = umbra.load(tmp_path / "one", make().unload())
    assert loaded.shadow.draft_tokens == [7, 3, 90]
    loaded.load_adapter(tmp_path / "one", "second")
    loaded.set_draft_vocabulary(None)
    assert loaded.adapter("second").draft_tokens == [7, 3, 90]
    assert loaded.shadow.draft_tokens is None
    loaded.set_draft_vocabulary([4], "second")
    loaded.resize_token_embeddings(5)
    assert loaded.adapter("second").draft_tokens == [4]
    loaded.resize_token_embeddings(4)
    assert loaded.adapter("second").draft_tokens is None


def test_adapter_without_draft_vocabulary_is_unchanged(tmp_path):
    """Its folder has no such entry, and its digest does not know of it."""
    make().save_pretrained(tmp_path)
    assert "draft_tokens" not in read_config(tmp_path)
    assert umbra.load(tmp_path, make().unload()).shadow.draft_tokens is None


def test_trainer_checkpoint_restores_draft_vocabulary(tmp_path):
    def trainer(model):
        data = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        return umbra.ShadowTrainer(model=model, args=arguments, train_dataset=data)

    model = make()
    model.set_draft_vocabulary([7, 3])
    trainer(model).train()
    again = make()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.shadow.draft_tokens == [7, 3]


@pytest.mark.parametrize("value", [[], [7, 7], [VOCAB], [-1], ["a"], [[1]], "7", {"7": 3}, [8, 3], None], ids=str)
def test_damaged_draft_vocabulary_is_refused(tmp_path, value):
    """Other tokens, or none, do not match the digest."""
    model = make()
    model.set_draft_vocabulary([7, 3])
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "draft_tokens": value}))
    with pytest.raises(umbra.CheckpointError):
        umbra.load(tmp_path, make().unload())
