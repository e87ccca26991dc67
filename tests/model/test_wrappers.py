"""One adapter a model: a second wrapper around a shadow, or a shadow around a wrapped model, is refused with the reason."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import umbra
from support.tiny import make, make_base, tokens
from support.tokenizer import make_tokenizer

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's and TRL's own use of old names
LORA = {"r": 2, "target_modules": ["q_proj"]}
TUNERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "lora for a task": lambda: peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "shadow": lambda: peft.ShadowConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("around", ["model", "base"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_peft_wrapper_is_refused_before_any_change(tuner, around):
    model, ids = make(), tokens()
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(umbra.ConfigError, match=r"unload\(\)"):
        peft.get_peft_model(model if around == "model" else model.base, TUNERS[tuner]())
    assert [name for name, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(model(ids).logits, before)


def test_other_peft_entry_points_are_refused(tmp_path):
    lora = peft.get_peft_model(make_base(), TUNERS["lora"]())
    lora.save_pretrained(tmp_path)
    model = make()
    for act in (
        lambda: peft.PeftModel.from_pretrained(model, tmp_path),
        lambda: peft.get_peft_model(model, TUNERS["lora"](), mixed=True),
        lambda: peft.inject_adapter_in_model(TUNERS["lora"](), model),
        lambda: model.base.add_adapter(TUNERS["lora"]()),
        lambda: model.add_adapter(TUNERS["lora"]()),
        lambda: model.add_adapter(TUNERS["lora"](), "second"),
        lambda: model.load_adapter(str(tmp_path), "second"),
        lambda: model.load_adapter(str(tmp_path)),
        model.enable_adapters,
        model.disable_adapters,
        model.get_adapter_state_dict,
        model.enable_peft_hotswap,
        lambda: model.set_adapter(["default"]),
    ):
        with pytest.raises(umbra.UmbraError):
            act()
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize(
    "config",
    [lambda: peft.LoraConfig(**LORA), lambda: peft.ShadowConfig(), dict, lambda: 16],
    ids=["LoraConfig", "PEFT's ShadowConfig", "dict", "int"],
)
def test_foreign_configuration_is_refused(config):
    with pytest.raises(umbra.ConfigError, match=r"umbra\.ShadowConfig, got"):
        umbra.attach(make_base(), config())


def injected():
    return peft.get_peft_model(make_base(), TUNERS["lora"]()).base_model.model


def added():
    base = make_base()
    base.add_adapter(TUNERS["lora"]())
    return base


def compiled_in_place():
    base = make_base()
    base.compile()
    return base


def parallel():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(make_base())
    finally:
        torch.distributed.destroy_process_group()


WRAPPED = {
    "peft": (lambda: peft.get_peft_model(make_base(), TUNERS["lora"]()), "merge_and_unload"),
    "prompt tuning": (lambda: peft.get_peft_model(make_base(), TUNERS["prompt"]()), "merge_and_unload"),
    "peft's shadow": (lambda: peft.get_peft_model(make_base(), TUNERS["shadow"]()), "merge_and_unload"),
    "injected": (injected, "merge_and_unload"),
    "added": (added, "merge_and_unload"),
    "shadow": (make, "add_adapter"),
    "its base": (lambda: make().base, r"unload\(\)"),
    "compiled": (lambda: torch.compile(make_base()), "compile the ShadowModel"),
    "compiled in place": (compiled_in_place, "compile the ShadowModel"),
    "data parallel": (lambda: torch.nn.DataParallel(make_base()), "wrap the ShadowModel"),
    "distributed": (parallel, "wrap the ShadowModel"),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_base_is_refused(form, tmp_path):
    build, way_out = WRAPPED[form]
    with pytest.raises(umbra.BaseModelError, match=way_out):
        umbra.attach(build())
    make().save_pretrained(tmp_path)
    with pytest.raises(umbra.BaseModelError, match=way_out):
        umbra.load(tmp_path, build())


def test_merged_adapter_is_accepted_as_base():
    merged = peft.get_peft_model(make_base(), TUNERS["lora"]()).merge_and_unload()
    assert umbra.attach(merged)(tokens()).logits.shape == (2, 9, 99)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainer_peft_config_is_refused(kind, ours, tmp_path):
    rows = {"SFT": [{"text": "abc"}], "DPO": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}[kind]
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    trainer = umbra.with_shadow_loss(trainer) if ours else trainer
    with pytest.raises(umbra.ConfigError, match="PEFT"):
        trainer(
            model=make(), args=config(str(tmp_path), use_cpu=True, report_to="none", bf16=False), peft_config=TUNERS["lora"](),
            train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(),
        )  # fmt: skip
