"""Training where nothing is trainable is an error in every trainer, and a warning in a loop of one's own."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from transformers import Trainer, TrainingArguments

import umbra
from support.tiny import ARCHITECTURES, CLASSIFIERS, make, make_base, tokens
from support.tokenizer import make_tokenizer

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

COMMON = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "save_strategy": "no",
    "per_device_train_batch_size": 2,
}  # fmt: skip
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "cd"}, {"prompt": "ab", "chosen": "b", "rejected": "c"}]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    make(auxiliary_loss_weight=0.0).save_pretrained(path)
    return path


def loaded(folder):
    """What forgets ``trainable=True``."""
    return umbra.load(folder, make_base())


def trainer_of(kind, model, folder):
    """A trainer of this class on data of its own."""
    name, given = kind.__name__, {"model": model, "processing_class": make_tokenizer()}
    if "SFT" in name:
        arguments, data = trl.SFTConfig(folder, bf16=False, **COMMON), [{"text": "abc"}, {"text": "de"}]
    elif "DPO" in name:
        arguments, data = trl.DPOConfig(folder, bf16=False, **COMMON), PAIRS
        given |= {} if kind.__name__.startswith("Shadow") else {"ref_model": make_base()}
    elif "GRPO" in name:
        arguments = trl.GRPOConfig(folder, bf16=False, num_generations=2, max_completion_length=3, beta=0.0, **COMMON)
        given["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]
        data = [{"prompt": "a"}, {"prompt": "b"}]
    else:
        arguments, given = TrainingArguments(folder, **COMMON), {"model": model}
        data = [{"input_ids": ids, "labels": ids} for ids in tokens(2, 6)]
        return kind(args=arguments, train_dataset=data, **given)
    return kind(args=arguments, train_dataset=Dataset.from_list(data), **given)


KINDS = [Trainer, trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_refuses_to_train_nothing(kind, ours, folder, tmp_path):
    kind = umbra.with_shadow_loss(kind) if ours else kind
    trainer = trainer_of(kind, loaded(folder), str(tmp_path))
    with pytest.raises(umbra.ConfigError, match="trainable=True"):
        trainer.train()


@pytest.mark.parametrize("classifier", [False, True])
def test_custom_loop_is_warned_once(classifier):
    model = make(classifier=classifier, base_options=CLASSIFIERS["single"] if classifier else None)
    model.requires_grad_(False).train()
    labels = torch.tensor([0, 2]) if classifier else tokens()
    with pytest.warns(UserWarning, match="trainable=True"):
        loss = model(tokens(), labels=labels).loss
    with pytest.raises(umbra.ConfigError, match="trainable=True"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(), labels=labels)


def test_no_warning_when_training_is_intended_or_off():
    model = make(auxiliary_loss_weight=0.0).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(), labels=tokens()).loss.backward()
        model.requires_grad_(False)
        embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=tokens()).loss.backward()
        assert embeds.grad.any()
        with torch.no_grad():
            model(tokens(), labels=tokens())
        model.eval()(tokens(), labels=tokens())


# -- pooling of a classifier's shadow ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["none", "right", "left", "within"])
def test_classifier_shadow_alone_pools_like_base(name, padding):
    """The detached model is a stock classifier, and raises or pools by itself."""
    ids = tokens(3, 7)
    if padding == "right":
        ids[0, 4:] = 0
    elif padding == "left":
        ids[0, :4] = 0
    elif padding == "within":
        ids[0, 2:4] = 0
    for pad in (0, None):
        model = make(name, classifier=True, base_options={**CLASSIFIERS["single"], "pad_token_id": pad})
        edge, embeds = model.detached(), model.get_input_embeddings()(ids)
        for rows in (3, 1):
            refused = pytest.raises(ValueError, match="padding token") if pad is None and rows > 1 else nullcontext()
            with torch.no_grad(), refused:
                expected = edge(input_ids=ids[:rows]).logits
            for given in ({"input_ids": ids[:rows]}, {"inputs_embeds": embeds[:rows]}):
                with torch.no_grad(), model.shadow_only(), refused:
                    found = model(**given).logits
                if pad is None and rows > 1:
                    continue
                if "input_ids" in given or padding in ("none", "left"):  # of embeddings the last one counts
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
