"""The adapter folder: exact round trips, refused bases, damaged files, full disks and kills in the middle of a save."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import umbra
from tiny import ARCHITECTURES, CLASSIFIERS, class_labels, make, make_base, tokens
from umbra import BaseModelError, CheckpointError, UmbraError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hook_count(base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())


def assert_same_weights(found: umbra.ShadowModel, expected: umbra.ShadowModel) -> None:
    weights, wanted = found.shadow.state_dict(), expected.shadow.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[k], v) and weights[k].dtype == v.dtype for k, v in wanted.items())


def assert_same_model(found: umbra.ShadowModel, expected: umbra.ShadowModel) -> None:
    """Bit for bit: weights of the shadow, logits, configuration."""
    assert_same_weights(found, expected)
    assert found.shadow_config == expected.shadow_config
    assert found.adapter_id == expected.adapter_id
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, expected(tokens()).logits)


def edit_config(folder: Path, **changes) -> None:
    """Set keys of adapter_config.json; a value of ``...`` removes the key."""
    values = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.fixture
def saved(tmp_path) -> Path:
    """An adapter folder of a tiny llama."""
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dialect", ["paper", "peft"])
def test_a_language_model_comes_back_bit_for_bit(tmp_path, name, dialect):
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
        {"gate_rank": 3, "norm": False, "bias": True, "activation": "gelu", "auxiliary_loss_weight": 0},
    ],
    ids=str,
)
def test_every_form_of_shadow_comes_back(tmp_path, fields):
    model = make(**fields)
    model.save_pretrained(tmp_path)
    assert_same_model(umbra.load(tmp_path, base=make_base()), model)


def test_a_pretrained_shadow_comes_back_without_its_source(tmp_path):
    make_base(seed=7, num_hidden_layers=2).save_pretrained(tmp_path / "source")
    model = make(shadow=str(tmp_path / "source"))
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "source")
    assert_same_model(umbra.load(tmp_path / "adapter", base=make_base()), model)


LABELS = {"id2label": {0: "sad", 1: "so so", 2: "glad"}, "label2id": {"sad": 0, "so so": 1, "glad": 2}}


@pytest.mark.parametrize("problem", CLASSIFIERS)
def test_a_classifier_comes_back_with_its_trained_heads(tmp_path, problem):
    model = make(classifier=True, base_options=CLASSIFIERS[problem])
    assert set(model.shadow.heads) == {"attached", "shadow"}
    model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, base=make_base(classifier=True, **CLASSIFIERS[problem]))
    assert_same_model(loaded, model)
    x, y = tokens(rows=4), class_labels(problem)
    assert torch.equal(loaded(x, labels=y).shadow_loss, model(x, labels=y).shadow_loss)


def test_the_base_is_found_by_the_recorded_name(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = umbra.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), umbra.ShadowConfig(rank=4)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_model(umbra.load(tmp_path / "adapter"), model)
    assert_same_model(umbra.load(str(tmp_path / "adapter"), base=str(tmp_path / "base")), model)
    assert_same_model(umbra.ShadowModel.from_pretrained(tmp_path / "adapter"), model)


def test_a_base_that_moved_is_given_as_a_path(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "elsewhere")
    assert_same_weights(umbra.load(saved, base=str(tmp_path / "elsewhere")), make())
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*base="):
        umbra.load(saved)  # a base built in memory has no name
    with pytest.raises(BaseModelError, match="nowhere"):
        umbra.load(saved, base=str(tmp_path / "nowhere"))


def test_a_damaged_base_is_named(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "base")
    os.truncate(tmp_path / "base" / "model.safetensors", 1000)
    with pytest.raises(BaseModelError, match="base"):
        umbra.load(saved, base=str(tmp_path / "base"))


def test_options_for_the_base_reach_it(tmp_path, saved):
    make_base().save_pretrained(tmp_path / "base")
    assert umbra.load(saved, base=str(tmp_path / "base"), dtype=torch.bfloat16).base.dtype == torch.bfloat16


def test_a_classifier_found_by_name_keeps_its_labels(tmp_path):
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


def test_a_classifier_on_a_base_without_one_brings_its_heads(tmp_path):
    """The usual case: the recorded base is a language model, whose classification head is random at each loading."""
    make_base().save_pretrained(tmp_path / "base")
    options = {"num_labels": 3, "problem_type": "single_label_classification", "pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    model = umbra.attach(base).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_model(umbra.load(tmp_path / "adapter"), model)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_is_trainable_only_on_request(saved, trainable):
    model = umbra.load(saved, base=make_base(), trainable=trainable)
    assert all(p.requires_grad is trainable for p in model.shadow.parameters())
    assert not any(p.requires_grad for p in model.base.parameters())


# -- what lies in the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [False, True])
def test_the_folder_holds_three_files_and_nothing_of_the_base(tmp_path, classifier):
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


def test_the_configuration_is_plain_json(saved):
    values = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    assert (values["peft_type"], values["task_type"], values["format_version"]) == ("UMBRA", "CAUSAL_LM", 1)
    assert umbra.ShadowConfig.from_dict(values["shadow"]) == make().shadow_config
    assert values["shadow_model_config"]["model_type"] == "llama"
    assert "quantization_config" not in values["shadow_model_config"]


@pytest.mark.parametrize("name", ["base", "a base: 50% #1 [x] {y}", "@home", "- 'quoted\" name", "Ünïcode 影"])
def test_the_card_has_front_matter_that_parses(tmp_path, name):
    model = make()
    model.base.name_or_path = name
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == name
    assert front["library_name"] == "umbra"
    assert front["pipeline_tag"] == "text-generation"
    assert ModelCard(text).data.base_model == name
    assert name in ModelCard(text).text


def test_the_card_of_a_classifier_says_so(tmp_path):
    make(classifier=True).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / CARD).data.pipeline_tag == "text-classification"


# -- which base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision_is_the_same_base(tmp_path, name, dtype):
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
def test_a_base_with_other_weights_is_refused(saved, kind):
    base = OTHER_WEIGHTS[kind]()
    with pytest.raises(BaseModelError, match=r"other weights.*allow_other_base=True"):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())
    model = umbra.load(saved, base=base, allow_other_base=True)
    assert_same_weights(model, make())
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_a_base_of_other_sizes_is_refused(saved, kind):
    base = OTHER_SIZES[kind]()
    with pytest.raises(BaseModelError, match=kind):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


@pytest.mark.parametrize("kind", ["hidden_size", "num_hidden_layers"])
def test_allowing_another_base_does_not_make_tensors_fit(saved, kind):
    base = OTHER_SIZES[kind]()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        umbra.load(saved, base=base, allow_other_base=True)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_for_another_task_is_refused(saved):
    base = make_base(classifier=True)
    with pytest.raises(CheckpointError, match=r"CAUSAL_LM.*SEQ_CLS"):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


# -- damage --------------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, match: str) -> None:
    base = make_base()
    with pytest.raises(CheckpointError, match=match):
        umbra.load(folder, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    assert_refused(saved, file)


def test_a_missing_card_is_no_harm(saved):
    (saved / CARD).unlink()
    umbra.load(saved, base=make_base())


@pytest.mark.parametrize("path", ["nowhere", "./owner/name", "adapter/README.md"])
def test_what_is_no_folder_is_named(saved, path):
    assert_refused(saved.parent / path, str(Path(path)))


def test_a_folder_in_place_of_a_file_is_refused(saved):
    for file in (WEIGHTS, CONFIG):
        (saved / file).unlink()
        (saved / file).mkdir()
        assert_refused(saved, file)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_weights_are_refused(saved, share):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    assert_refused(saved, WEIGHTS)


def header(values: dict) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGES = {
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "noise after the header's size": lambda data: data[:8] + random.Random(0).randbytes(len(data) - 8),
    "an absurd header size": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "the largest header size": lambda data: b"\xff" * 8 + data[8:],
    "a header beyond the end": lambda data: len(data).to_bytes(8, "little") + data[8:],
    "offsets beyond the end": lambda _: header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "a shape that overflows": lambda _: header({"x": {"dtype": "F32", "shape": [2**40] * 2, "data_offsets": [0, 0]}}),
    "a git-lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    "a pickle": lambda _: pickle.dumps({"x": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(saved, damage):
    (saved / WEIGHTS).write_bytes(DAMAGES[damage]((saved / WEIGHTS).read_bytes()))
    assert_refused(saved, WEIGHTS)


TENSOR = "shadow.couplings.injections.1.down.weight"
OTHER_TENSORS = {
    "missing": lambda w: {k: v for k, v in w.items() if k != TENSOR},
    "left over": lambda w: {**w, TENSOR + "s": w[TENSOR].clone()},
    "renamed": lambda w: {k.replace(TENSOR, TENSOR + "s"): v for k, v in w.items()},
    "of another shape": lambda w: {**w, TENSOR: w[TENSOR][:-1].contiguous()},
    "transposed": lambda w: {**w, TENSOR: w[TENSOR].T.contiguous()},
    "with one dimension more": lambda w: {**w, TENSOR: w[TENSOR][None]},
    "a scalar": lambda w: {**w, TENSOR: torch.tensor(1.0)},
    "of integers": lambda w: {**w, TENSOR: w[TENSOR].to(torch.int64)},
    "of truth values": lambda w: {**w, TENSOR: w[TENSOR] > 0},
}


@pytest.mark.parametrize("change", OTHER_TENSORS)
def test_other_tensors_are_refused_by_name(saved, change):
    save_file(OTHER_TENSORS[change](load_file(saved / WEIGHTS)), saved / WEIGHTS)
    assert_refused(saved, rf"{WEIGHTS}.*{TENSOR}")


def test_no_tensors_at_all_are_refused(saved):
    save_file({}, saved / WEIGHTS)
    assert_refused(saved, WEIGHTS)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[]", "null", "3", '"UMBRA"', b"\xff\xfe\x00", '{"peft_type": "UMBRA"', "[" * 100_000],
    ids=lambda t: str(t)[:16],
)
def test_a_configuration_that_is_no_json_object_is_refused(saved, text):
    (saved / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(saved, CONFIG)


@pytest.mark.parametrize("peft_type", ["LORA", "SHADOW", None, 3, ...])
def test_the_adapter_of_another_method_is_refused(saved, peft_type):
    edit_config(saved, peft_type=peft_type)
    assert_refused(saved, f"{CONFIG}.*not written by Umbra")


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, ...])
def test_another_format_is_refused(saved, version):
    edit_config(saved, format_version=version)
    assert_refused(saved, f"{CONFIG}.*format")


@pytest.mark.parametrize("key", ["shadow", "shadow_model_config", "base", "task_type"])
@pytest.mark.parametrize("value", [..., None, [], "x", 3], ids=str)
def test_a_part_that_is_missing_or_of_another_kind_is_refused(saved, key, value):
    edit_config(saved, **{key: value})
    assert_refused(saved, CONFIG if key != "task_type" or value is ... else "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"rnk": 8},
        {"rank": 0},
        {"alpha": float("nan")},
        {"dialect": "other"},
        {"shadow": "mirror", "activation": "__import__('os')"},
        {"first_layer": "1"},
    ],
    ids=str,
)
def test_a_shadow_configuration_with_bad_values_is_refused(saved, changes):
    shadow = json.loads((saved / CONFIG).read_text())["shadow"]
    edit_config(saved, shadow={**shadow, **changes})
    assert_refused(saved, rf"{CONFIG}.*{next(iter(changes))}" if len(changes) == 1 else CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "umbra_of_the_moon"},
        {"model_type": None},
        {"model_type": 3},
        {"model_type": "../llama"},
        {"hidden_size": "wide"},
        {"hidden_size": -32},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"head_dim": 7},
        {"layer_types": ["mystery"]},
        {"hidden_act": "os.system"},
    ],
    ids=str,
)
def test_a_shadow_model_that_cannot_be_built_is_refused(saved, changes):
    model = json.loads((saved / CONFIG).read_text())["shadow_model_config"]
    edit_config(saved, shadow_model_config={**model, **changes})
    base = make_base()
    with pytest.raises(UmbraError):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": []},
        {"weights": {"embeddings": "not base64!"}},
        {"weights": {"embeddings": ""}},
        {"weights": {"embeddings": "AAA="}},
        {"weights": {"embeddings": 3}},
    ],
    ids=str,
)
def test_a_damaged_fingerprint_is_refused(saved, changes):
    values = json.loads((saved / CONFIG).read_text())["base"]
    edit_config(saved, base={**values, **changes})
    base = make_base()
    with pytest.raises(UmbraError):
        umbra.load(saved, base=base)
    assert hook_count(base) == 0


@pytest.mark.parametrize("value", [..., None, [], {}, {"id2label": None}, {"id2label": {"x": "y"}}], ids=str)
def test_a_damaged_classifier_entry_is_refused(tmp_path, value):
    make_base(classifier=True).save_pretrained(tmp_path / "base")
    make(classifier=True).save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", classifier=value)
    with pytest.raises(CheckpointError, match=CONFIG):
        umbra.load(tmp_path / "adapter", base=str(tmp_path / "base"))


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", WEIGHTS])
def test_a_pickle_is_never_opened(saved, file):
    marker = saved.parent / "unpickled"
    (saved / WEIGHTS).unlink()
    (saved / file).write_bytes(pickle.dumps(Marker(marker)))
    assert_refused(saved, WEIGHTS)
    assert not marker.exists()
    pickle.loads((saved / file).read_bytes()).close()
    assert marker.exists(), "the trap itself must work"


def test_no_code_named_in_a_file_is_run(saved):
    marker = saved.parent / "imported"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    model = json.loads((saved / CONFIG).read_text())["shadow_model_config"]
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "auto_mapping": {"base": "evil"}}
    edit_config(saved, shadow_model_config={**model, **code}, **code)
    umbra.load(saved, base=make_base())
    assert not marker.exists()


# -- overwriting ---------------------------------------------------------------------------------------------------


def test_another_adapter_is_not_overwritten_without_leave(saved):
    before, other = contents(saved), make(seed=5)
    with pytest.raises(CheckpointError, match=r"another adapter.*overwrite=True"):
        other.save_pretrained(saved)
    assert contents(saved) == before
    other.save_pretrained(saved, overwrite=True)
    assert names(saved) == FILES
    assert_same_model(umbra.load(saved, base=make_base(seed=5)), other)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA"}', "damaged", "[]"])
def test_an_adapter_without_an_id_is_another_adapter(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="another adapter"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).read_text() == text


def test_an_adapter_is_saved_over_itself_also_after_loading(saved):
    model = umbra.load(saved, base=make_base())
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1
    model.save_pretrained(saved)
    assert_same_model(umbra.load(saved, base=make_base()), model)


def test_a_trainer_owns_its_folders(saved):
    other = make(seed=5)
    other.save_pretrained(saved, is_main_process=True, state_dict=other.state_dict(), safe_serialization=True)
    assert_same_model(umbra.load(saved, base=make_base(seed=5)), other)


def test_other_processes_write_nothing(tmp_path, saved):
    before = contents(saved)
    make(seed=5).save_pretrained(saved, is_main_process=False)
    make().save_pretrained(tmp_path / "new", is_main_process=False)
    assert contents(saved) == before
    assert not (tmp_path / "new").exists()


def test_other_files_of_the_folder_stay(saved):
    (saved / "notes.txt").write_text("mine")
    make(seed=5).save_pretrained(saved, overwrite=True)
    assert names(saved) == {*FILES, "notes.txt"}


def test_a_gathered_state_dict_is_what_is_saved(tmp_path):
    model = make()
    doubled = {k: v * 2 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert torch.equal(load_file(tmp_path / WEIGHTS)[TENSOR], doubled[TENSOR])
    del doubled[TENSOR]
    with pytest.raises(CheckpointError, match=TENSOR):
        model.save_pretrained(tmp_path, state_dict=doubled)


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, place):
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(CheckpointError, match="a file"):
        make().save_pretrained(tmp_path / place)
    assert (tmp_path / "a file").read_text() == "mine"


# -- full disks ----------------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fill_at_weights(monkeypatch):
    monkeypatch.setattr("umbra.checkpoint.save_file", full_disk)


def fill_within_weights(monkeypatch):
    def half(weights, path, **options):
        save_file(weights, path, **options)
        os.truncate(path, 100)
        full_disk()

    monkeypatch.setattr("umbra.checkpoint.save_file", half)


def fill_at_text(file: str):
    def fill(monkeypatch):
        write_text = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda path, *a, **k: (full_disk if path.name == file else write_text)(path, *a, **k)
        )

    return fill


def fill_at(target: str):
    return lambda monkeypatch: monkeypatch.setattr(target, full_disk)


FULL_DISKS = {
    "at the weights": fill_at_weights,
    "within the weights": fill_within_weights,
    "at the configuration": fill_at_text(CONFIG),
    "at the card": fill_at_text(CARD),
    "at the staging folder": fill_at("umbra.folder.tempfile.mkdtemp"),
    "at fsync": fill_at("umbra.folder.os.fsync"),
    "at the commit": fill_at("umbra.folder.Path.rename"),
}


@pytest.mark.parametrize("moment", FULL_DISKS)
def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch, moment):
    before, model = contents(saved), umbra.load(saved, base=make_base())
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1
    with monkeypatch.context() as patch:
        FULL_DISKS[moment](patch)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(saved)
    assert contents(saved) == before
    model.save_pretrained(saved)
    assert names(saved) == FILES
    assert_same_model(umbra.load(saved, base=make_base()), model)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_that_fails_after_the_commit_is_a_checkpoint_error_too(saved, monkeypatch, call):
    """The new adapter is the folder's by then, and reads as a whole."""
    model, replace, calls = umbra.load(saved, base=make_base()), Path.replace, []
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1

    def failing(path, target):
        calls.append(path)
        return full_disk() if len(calls) == call else replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(saved)
    assert_same_model(umbra.load(saved, base=make_base()), model)
    model.save_pretrained(saved)
    assert names(saved) == FILES


# -- kills ---------------------------------------------------------------------------------------------------------

# A process that forks one saver per line that it reads, and tells its pid. "loop" saves until it is killed; "crash N"
# ends at the N-th operation on the disk of one save; a saver that came through ends with 0.
SAVER = """
import dataclasses, itertools, os, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
import umbra.checkpoint
from tiny import make

def fill(model, value):
    with torch.no_grad():
        for p in model.shadow.state_dict().values():
            p.fill_(value)
    model.shadow_config = dataclasses.replace(model.shadow_config, alpha=float(value))

def crash_at(n):
    calls = [0]
    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for holder, name in [(Path, "write_text"), (Path, "rename"), (Path, "replace"), (Path, "rmdir"), (Path, "chmod"),
                         (Path, "mkdir"), (os, "fsync"), (tempfile, "mkdtemp"), (umbra.checkpoint, "save_file")]:
        setattr(holder, name, counted(getattr(holder, name)))

model = make()
model.adapter_id = "the one"
for line in sys.stdin:
    folder, order, *rest = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        if order == "loop":
            for turn in itertools.count():
                if turn == 2:
                    print("saving", os.getpid(), flush=True)
                fill(model, 1 + turn % 2)
                model.save_pretrained(folder)
        fill(model, int(rest[1]))
        crash_at(int(rest[0]))
        model.save_pretrained(folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("ended", status, flush=True)
"""


class Saver:
    """The other end of `SAVER`."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def send(self, *words) -> None:
        assert self.process.stdin is not None
        print(*words, sep="\t", file=self.process.stdin, flush=True)

    def hear(self, word: str) -> int:
        assert self.process.stdout is not None
        found, number = self.process.stdout.readline().split()
        assert found == word
        return int(number)

    def crash(self, folder: Path, call: int, value: int) -> int:
        """Exit status of a save of ``value`` that ends at a given operation: 9, or 0 where it came through before."""
        self.send(folder, "crash", call, value)
        return self.hear("ended")


@pytest.fixture(scope="module")
def saver():
    saver = Saver()
    yield saver
    saver.process.stdin.close()
    assert saver.process.wait(60) == 0


def whole_value(folder: Path) -> int:
    """1 or 2: which adapter the folder holds; weights and configuration must agree."""
    model = umbra.load(folder, base=make_base())
    value = model.shadow_config.alpha
    assert value in (1, 2)
    assert all(bool((v == value).all()) for v in model.shadow.state_dict().values())
    return int(value)


def test_a_killed_save_leaves_one_whole_adapter(saver, tmp_path):
    assert saver.crash(tmp_path, 10**9, 1) == 0
    chance, seen = random.Random(0), set()
    for _ in range(15):
        start = time.perf_counter()
        saver.send(tmp_path, "loop")
        pid = saver.hear("saving")
        two_saves = time.perf_counter() - start
        time.sleep(chance.uniform(0, 2) * two_saves)
        os.kill(pid, signal.SIGKILL)
        assert saver.hear("ended") == -signal.SIGKILL
        seen.add(whole_value(tmp_path))
    assert seen == {1, 2}, "the savers did not get to save"
    assert saver.crash(tmp_path, 10**9, 2) == 0
    assert names(tmp_path) == FILES
    assert whole_value(tmp_path) == 2


def test_a_save_may_end_at_any_operation(saver, tmp_path):
    """Over an old adapter: until the commit it is still the old one, from then on the new one."""
    found = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        assert saver.crash(folder, 10**9, 1) == 0
        if saver.crash(folder, call, 2) == 0:
            break
        found.append(whole_value(folder))
        assert saver.crash(folder, 10**9, 1) == 0, "the next save puts all in order"
        assert names(folder) == FILES
        assert whole_value(folder) == 1
    assert len(found) >= 12
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_save_may_end_at_any_operation_after_one_that_did(saver, tmp_path):
    """A save first finishes what a killed one had committed, and may itself end there."""
    killed_after_commit = 0
    for first in range(1, 100):
        killed = tmp_path / f"{first}"
        assert saver.crash(killed, 10**9, 1) == 0
        if saver.crash(killed, first, 2) == 0:
            break
        if not (killed / ".umbra-commit").exists():
            continue
        killed_after_commit += 1
        for second in range(1, 8):
            folder = shutil.copytree(killed, tmp_path / f"{first} {second}")
            assert saver.crash(folder, second, 1) == 9
            assert whole_value(folder) == 2
    assert killed_after_commit >= 4


def test_a_first_save_that_ends_early_leaves_no_half_adapter(saver, tmp_path):
    whole = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        if saver.crash(folder, call, 2) == 0:
            break
        try:
            whole.append(whole_value(folder))
        except CheckpointError:
            whole.append(0)
        assert saver.crash(folder, 10**9, 1) == 0
        assert names(folder) == FILES
    assert whole == sorted(whole)
    assert set(whole) == {0, 2}


def test_an_adapter_is_loaded_from_the_hub_by_its_id(tmp_path, monkeypatch):
    model = make("llama")
    model.save_pretrained(tmp_path / "hub")
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = umbra.load("owner/name@v1", base=make_base("llama"))
    assert asked == [("owner/name", "v1", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_pushing_uploads_the_adapter(tmp_path, monkeypatch):
    model, pushed = make("llama"), []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, repo_id, token=None: pushed.append(repo_id))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="owner/name")
    assert pushed == ["mine", "owner/name"]
