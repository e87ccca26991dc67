"""The adapter folder: exact round trips, what lies in it, which base it takes, the hub."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import umbra
from support.folders import (
    CARD,
    CONFIG,
    FILES,
    WEIGHTS,
    assert_same_model,
    assert_same_weights,
    hook_count,
    names,
)
from support.tiny import ARCHITECTURES, CLASSIFIERS, class_labels, make, make_base, scramble, tokens
from umbra import BaseModelError, CheckpointError, ConfigError
from umbra.adapters.files import PEFT_TYPE, TOKENIZER_PATTERNS

# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dialect", ["paper", "peft"])
def test_language_model_round_trips_bit_for_bit(tmp_path, name, dialect):
    model = make(name, dialect=dialect)
    model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, base=make_base(name))
    assert_same_model(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize(
    "fields",
    [
        {"train_heads": True},
        {"shadow_num_hidden_layers": 3, "shadow_hidden_size": 16},
        {"embeddings": "own", "shadow_hidden_size": 48},
        {"init": "base"},
        {"shadow": "dense", "first_layer": 2},
        {"gate_rank": 3, "constants": {"norm": False, "bias": True, "activation": "gelu"}, "auxiliary_loss_weight": 0},
    ],
    ids=str,
)
def test_every_shadow_form_round_trips(tmp_path, fields):
    model = make(**fields)
    model.save_pretrained(tmp_path)
    assert_same_model(umbra.load(tmp_path, base=make_base()), model)


def test_pretrained_shadow_loads_without_its_source(tmp_path):
    make_base(seed=7, num_hidden_layers=2).save_pretrained(tmp_path / "source")
    model = make(shadow=str(tmp_path / "source"))
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "source")
    assert_same_model(umbra.load(tmp_path / "adapter", base=make_base()), model)


LABELS = {"id2label": {0: "sad", 1: "so so", 2: "glad"}, "label2id": {"sad": 0, "so so": 1, "glad": 2}}


@pytest.mark.parametrize("problem", CLASSIFIERS)
def test_classifier_round_trips_with_trained_heads(tmp_path, problem):
    model = make(classifier=True, base_options=CLASSIFIERS[problem])
    assert set(model.shadow.heads) == {"attached", "shadow"}
    model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, base=make_base(classifier=True, **CLASSIFIERS[problem]))
    assert_same_model(loaded, model)
    x, y = tokens(rows=4), class_labels(problem)
    assert torch.equal(loaded(x, labels=y).shadow_loss, model(x, labels=y).shadow_loss)


def test_base_is_loaded_by_recorded_name(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = umbra.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), umbra.ShadowConfig(rank=4)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_model(umbra.load(tmp_path / "adapter"), model)
    assert_same_model(umbra.load(str(tmp_path / "adapter"), base=str(tmp_path / "base")), model)
    assert_same_model(umbra.ShadowModel.from_pretrained(tmp_path / "adapter"), model)


def test_moved_base_can_be_given_as_path(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "elsewhere")
    assert_same_weights(umbra.load(saved, base=str(tmp_path / "elsewhere")), make())
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*base="):
        umbra.load(saved)  # a base built in memory has no name
    with pytest.raises(BaseModelError, match="nowhere"):
        umbra.load(saved, base=str(tmp_path / "nowhere"))


def test_damaged_base_is_named_in_error(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "base")
    os.truncate(tmp_path / "base" / "model.safetensors", 1000)
    with pytest.raises(BaseModelError, match="base"):
        umbra.load(saved, base=str(tmp_path / "base"))


def test_base_options_reach_from_pretrained(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "base")
    assert umbra.load(saved, base=str(tmp_path / "base"), dtype=torch.bfloat16).base.dtype == torch.bfloat16


def test_classifier_loaded_by_name_keeps_its_labels(tmp_path):
    base = make_base(classifier=True, **CLASSIFIERS["single"])
    base.save_pretrained(tmp_path / "base")
    base.config.id2label, base.config.label2id = LABELS["id2label"], LABELS["label2id"]
    base.name_or_path = str(tmp_path / "base")
    model = umbra.attach(base).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = umbra.load(tmp_path / "adapter")
    assert_same_model(loaded, model)
    for config in (loaded.config, loaded.base.config, loaded.detached().config):
        assert config.id2label == LABELS["id2label"]
        assert config.label2id == LABELS["label2id"]
        assert config.problem_type == "single_label_classification"


def test_classifier_adapter_brings_heads_to_headless_base(tmp_path):
    """The usual case: the recorded base is a language model, whose classification head is random at each loading."""
    make_base().save_pretrained(tmp_path / "base")
    options = {"num_labels": 3, "problem_type": "single_label_classification", "pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    model = umbra.attach(base).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_model(umbra.load(tmp_path / "adapter"), model)


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_adapter_is_trainable_only_on_request(saved, trainable):
    model = umbra.load(saved, base=make_base(), trainable=trainable)
    assert all(p.requires_grad is trainable for n, p in model.shadow.named_parameters() if not n.endswith(".channels"))
    assert not any(p.requires_grad for p in model.base.parameters())


# -- what lies in the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [False, True])
def test_adapter_folder_has_three_files_and_no_base_weights(tmp_path, classifier):
    model = make("qwen3", classifier=classifier, base_options={"num_labels": 3})
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES
    weights = load_file(tmp_path / WEIGHTS)
    assert weights.keys() == {f"shadow.{key}" for key in model.shadow.state_dict()}
    heads = {"shadow.heads.attached", "shadow.heads.shadow"} if classifier else set()
    assert {k.rpartition(".")[0] for k in weights if k.startswith("shadow.heads")} == heads
    base = {(v.shape, v.double().sum().item()) for v in model.base.state_dict().values()} - {
        (v.shape, v.double().sum().item()) for v in model.shadow.heads.state_dict().values()
    }
    assert not base & {(v.shape, v.double().sum().item()) for v in weights.values()}


def test_configuration_is_plain_json(saved):
    values = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    assert (values["peft_type"], values["task_type"], values["format_version"]) == (PEFT_TYPE, "CAUSAL_LM", 4)
    assert umbra.ShadowConfig.from_dict(values["shadow"]) == make().shadow_config
    assert values["shadow_model_config"]["model_type"] == "llama"
    assert "quantization_config" not in values["shadow_model_config"]


@pytest.mark.parametrize(
    "name", ["base", "Qwen/Qwen3-0.6B", "a base: 50% #1 [x] {y}", "@home", "- 'quoted\" name", "Ünïcode 影"]
)
def test_card_front_matter_parses(tmp_path, name):
    model = make()
    model.base.name_or_path = name
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    is_id = name in ("base", "Qwen/Qwen3-0.6B")  # the hub refuses a card that names another base
    assert front.get("base_model") == (name if is_id else None)
    assert front["library_name"] == "umbra"
    assert front["pipeline_tag"] == "text-generation"
    assert ModelCard(text).data.base_model == (name if is_id else None)
    assert name in ModelCard(text).text


def test_classifier_card_names_its_task(tmp_path):
    make(classifier=True).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / CARD).data.pipeline_tag == "text-classification"


# -- which base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_another_precision_is_accepted(tmp_path, name, dtype):
    make(name).save_pretrained(tmp_path / "of fp32")
    umbra.load(tmp_path / "of fp32", base=make_base(name).to(dtype))
    umbra.attach(make_base(name).to(dtype)).save_pretrained(tmp_path / "of half")
    umbra.load(tmp_path / "of half", base=make_base(name))
    umbra.load(tmp_path / "of half", base=make_base(name).to(dtype).float())


def other_seed():
    return make_base(seed=1)


def merged_lora(block: int):
    """A base into one linear of which a rank-1 change was merged."""
    base = make_base()
    with torch.no_grad():
        weight = base.model.layers[block].mlp.up_proj.weight
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(n, 1, generator=generator) for n in weight.shape)
        weight += 0.05 * up @ down.T
    return base


def with_noise():
    """A base trained a little further: each weight one per cent off."""
    base = make_base()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in base.parameters():
            p *= 1 + 0.01 * torch.randn(p.shape, generator=generator)
    return base


OTHER_WEIGHTS = {
    "another seed": other_seed,
    "a change merged into the first block": lambda: merged_lora(0),
    "a change merged into the second block": lambda: merged_lora(1),
    "a change merged into the third block": lambda: merged_lora(2),
    "a change merged into the last block": lambda: merged_lora(3),
    "small noise": with_noise,
}
OTHER_SIZES = {
    "model_type": lambda: make_base("mistral"),
    "hidden_size": lambda: make_base(hidden_size=64),
    "num_hidden_layers": lambda: make_base(num_hidden_layers=5),
    "vocab_size": lambda: make_base(vocab_size=100),
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_base_with_different_weights_is_refused(saved, kind):
    base = OTHER_WEIGHTS[kind]()
    with pytest.raises(BaseModelError, match=r"other weights.*allow_other_base=True"):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())
    model = umbra.load(saved, base=base, allow_other_base=True)
    assert_same_weights(model, make())
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_base_with_different_sizes_is_refused(saved, kind):
    base = OTHER_SIZES[kind]()
    with pytest.raises(BaseModelError, match=kind):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


@pytest.mark.parametrize("kind", ["hidden_size", "num_hidden_layers"])
def test_allowing_another_base_still_checks_tensor_shapes(saved, kind):
    base = OTHER_SIZES[kind]()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        umbra.load(saved, base=base, allow_other_base=True)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


def test_model_for_another_task_is_refused(saved):
    base = make_base(classifier=True)
    with pytest.raises(CheckpointError, match=r"CAUSAL_LM.*SEQ_CLS"):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


# -- the hub --------------------------------------------------------------------------------------------------------


def test_adapter_is_loaded_from_hub_by_id(tmp_path, monkeypatch):
    model = make("llama")
    model.save_pretrained(tmp_path / "hub")
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = umbra.load("owner/name@v1", base=make_base("llama"))
    own = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    package = ["shadow_adapter.safetensors", "shadow_config.json", "shadow_modules.safetensors"]
    assert asked == [("owner/name", "v1", sorted([*own, *package, *TOKENIZER_PATTERNS]))]
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_push_to_hub_uploads_adapter(tmp_path, monkeypatch):
    """The one that was saved, with its card, to a repository as it was asked for."""

    class Hub:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, repo_id, **how):
            asked.append((repo_id, how))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, **how):
            asked.append((repo_id, how))

        def upload_folder(self, repo_id, folder_path, **how):
            folder = Path(folder_path)
            found = json.loads((folder / "adapter_config.json").read_text())["adapter_id"]
            asked.append((repo_id, found, "umbra" in (folder / "README.md").read_text(), how))

    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = make("llama")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    plain = {"commit_message": "Upload adapter", "revision": None, "commit_description": None, "create_pr": False}
    assert asked == [
        None, ("mine", {"private": None, "exist_ok": True}), ("mine", model.shadow.adapter_id, True, plain),
    ]  # fmt: skip
    model.add_adapter(umbra.ShadowConfig(rank=4), "second")
    asked.clear()
    how = {"private": True, "token": "t", "revision": "dev", "commit_message": "m", "repo_id": "owner/name"}
    model.save_pretrained(tmp_path / "two", adapter_name="second", push_to_hub=True, **how)
    assert asked == [
        "t", ("owner/name", {"private": True, "exist_ok": True}), ("owner/name", {"branch": "dev", "exist_ok": True}),
        ("owner/name", model.adapter("second").adapter_id, True, {**plain, "commit_message": "m", "revision": "dev"}),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"overwrit": True}, {"safe_serialization": False}, {"variant": "fp16"}])
def test_meaningless_load_arguments_are_refused(tmp_path, wrong):
    model = make("llama")
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        model.save_pretrained(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a", safe_serialization=True, variant=None, max_shard_size="5GB")
    for options in ({"trainble": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(ConfigError, match="for loading a base by its name"):
            umbra.load(tmp_path / "a", base=make_base("llama"), **options)


def test_gathered_state_dict_belongs_to_named_adapter(tmp_path):
    model = make("llama")
    model.add_adapter(model.shadow_config, "second")
    scramble(model.adapter("second"), 9)
    model.save_pretrained(tmp_path / "a", adapter_name="second")
    model.save_pretrained(tmp_path / "b", adapter_name="second", state_dict=model.state_dict())
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_label_names_and_problem_type_survive_headless_base(tmp_path):
    names = {0: "bad", 1: "ok", 2: "good"}
    told = {
        "id2label": names,
        "label2id": {v: k for k, v in names.items()},
        "problem_type": "multi_label_classification",
    }
    make(classifier=True, base_options=told).save_pretrained(tmp_path / "a")
    model = umbra.load(tmp_path / "a", base=make_base(classifier=True, num_labels=3))
    for config in (model.config, model.detached().config):
        assert config.id2label == names and config.problem_type == told["problem_type"]
    model.save_pretrained(tmp_path / "a")
    assert umbra.load(tmp_path / "a", base=make_base(classifier=True, num_labels=3)).config.id2label == names
    with pytest.raises(CheckpointError, match="knows 3 labels, the base's head 5"):
        umbra.load(tmp_path / "a", base=make_base(classifier=True, num_labels=5))


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.rand(4, 1), "regression"), (torch.ones(4, 3), "multi_label_classification"),
        (torch.arange(4) % 3, "single_label_classification"),
    ],
)  # fmt: skip
def test_inferred_problem_type_is_saved(tmp_path, labels, kind):
    """As transformers' classifiers do it: pipelines ask for it."""
    model = make(classifier=True, base_options={"num_labels": 1 if kind == "regression" else 3})
    model(input_ids=tokens(4), labels=labels)
    model.save_pretrained(tmp_path)
    assert model.config.problem_type == model.detached().config.problem_type == kind
    assert json.loads((tmp_path / "adapter_config.json").read_text())["classifier"]["problem_type"] == kind
