"""Adapter folders of earlier formats load as they did."""

import pytest
import torch
from safetensors.torch import load_file

import umbra
from support.folders import FIXTURES, edit_config
from support.tiny import make_base, tokens
from umbra.adapters.files import read_config

BASES = {
    "causal": lambda: make_base("llama"),
    "classifier": lambda: make_base("gpt2", classifier=True, num_labels=3, problem_type="single_label_classification"),
}


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_format_2_folder_loads_bit_for_bit(name, tmp_path):
    model = umbra.load(FIXTURES / name, BASES[name]())
    weights, expected = (
        load_file(FIXTURES / name / "adapter_model.safetensors"),
        load_file(FIXTURES / name / "expected.safetensors"),
    )
    own = model.shadow.state_dict(prefix="shadow.")
    assert own.keys() == weights.keys() and all(torch.equal(own[k], v) for k, v in weights.items())
    torch.testing.assert_close(model(tokens()).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.detached()(tokens()).logits, expected["shadow"], rtol=1e-5, atol=1e-5)
    assert model.shadow.draft_tokens == (list(range(3, 40)) if name == "causal" else None)
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["format_version"] == 3
    again = umbra.load(tmp_path, BASES[name]())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", BASES)
def test_format_2_folder_is_still_checked(name, tmp_path):
    import shutil

    shutil.copytree(FIXTURES / name, tmp_path / "a")
    other = BASES[name]()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "mlp" in n).normal_()
    with pytest.raises(umbra.BaseModelError, match="other weights"):
        umbra.load(tmp_path / "a", other)
    edit_config(tmp_path / "a", task_type="SEQ_CLS" if name == "causal" else "CAUSAL_LM")
    with pytest.raises(umbra.CheckpointError):
        umbra.load(tmp_path / "a", BASES[name]())
