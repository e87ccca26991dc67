"""Adapter folders of earlier formats load as they did."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

import umbra
from support.folders import FIXTURES, edit_config
from support.tiny import make_base, tokens
from umbra.adapters.files import read_config

FORMATS = ["format2", "format3"]  # 3 was written by the code of commit c737554
BASES = {
    "causal": lambda: make_base("llama"),
    "classifier": lambda: make_base("gpt2", classifier=True, num_labels=3, problem_type="single_label_classification"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_folder_of_an_earlier_format_loads_bit_for_bit(name, form, tmp_path):
    folder = FIXTURES / form / name
    model = umbra.load(folder, BASES[name]())
    weights, expected = load_file(folder / "adapter_model.safetensors"), load_file(folder / "expected.safetensors")
    own = model.shadow.state_dict(prefix="shadow.")
    assert own.keys() == weights.keys() and all(torch.equal(own[k], v) for k, v in weights.items())
    torch.testing.assert_close(model(tokens()).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.detached()(tokens()).logits, expected["shadow"], rtol=1e-5, atol=1e-5)
    assert model.shadow.draft_tokens == (list(range(3, 40)) if name == "causal" else None)
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["format_version"] == 4
    again = umbra.load(tmp_path, BASES[name]())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_format_2_folder_is_still_checked():
    config = umbra.load(FIXTURES / "format3" / "causal", BASES["causal"]()).shadow_config
    assert (config.input_scale, config.gate_rank, config.distillation_weight) == ("measured", 3, 0.25)
    constants = {"norm": False, "activation": "silu", "bias": True, "dropout_position": "rank", "down_init": "scaled"}
    assert asdict(config.constants) == {**constants, "init_scale": 0.5}


@pytest.mark.parametrize("form", FORMATS)
def test_a_removed_field_of_a_folder_is_explained(form, tmp_path):
    shutil.copytree(FIXTURES / form / "causal", tmp_path / "a")
    shadow = json.loads((tmp_path / "a/adapter_config.json").read_text())["shadow"]
    edit_config(tmp_path / "a", shadow={**shadow, "update": "none"}, sha256=None)
    with pytest.raises(umbra.CheckpointError, match=r"update='none' is no longer supported: .*umbra study"):
        umbra.load(tmp_path / "a", BASES["causal"]())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BASES)
def test_a_folder_of_an_earlier_format_keeps_its_checks(name, form, tmp_path):
    shutil.copytree(FIXTURES / form / name, tmp_path / "a")
    other = BASES[name]()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "mlp" in n).normal_()
    with pytest.raises(umbra.BaseModelError, match="other weights"):
        umbra.load(tmp_path / "a", other)
    edit_config(tmp_path / "a", task_type="SEQ_CLS" if name == "causal" else "CAUSAL_LM")
    with pytest.raises(umbra.CheckpointError):
        umbra.load(tmp_path / "a", BASES[name]())
