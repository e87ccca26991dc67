"""`ShadowConfig` and `attach` validate their arguments, and a refused base is unchanged."""

import dataclasses
import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

import umbra
from support.tiny import HIDDEN, LAYERS, make_base, tokens
from umbra import BaseModelError, ConfigError, ShadowConfig
from umbra.config import DialectConstants

NAN, INFINITY = float("nan"), float("inf")
SIZES = [f.name for f in dataclasses.fields(ShadowConfig) if f.name.startswith("shadow_")]
COUNTS = ["rank", "gate_rank", *SIZES]

# -- the fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, "8", True, [8]])
def test_count_must_be_positive_integer(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} .*{'' if isinstance(value, list) else value}"):
        ShadowConfig(**{name: value})


BAD = [
    *[("alpha", value) for value in (NAN, INFINITY, -INFINITY, "0.1", True, [0.1], 10**400)],
    *[("dropout", value) for value in (-0.1, 1, 1.0, 1.5, NAN, "0.2", False)],
    *[("auxiliary_loss_weight", value) for value in (-0.05, NAN, INFINITY, "0", None, True, 10**400)],
    *[("first_layer", value) for value in (-1, 0.0, -0.5, 1.0, NAN, "1", True)],
    *[("train_heads", value) for value in (0, 1, "true", [])],
    *[("dialect", value) for value in ("Paper", "lora", "", None, 1)],
    *[("init", value) for value in ("copy", True)],
    *[("embeddings", value) for value in ("shared", None, False)],
    *[("constants", value) for value in (3, "norm", [True])],
    *[("shadow", value) for value in ("", None, 3, ["mirror"])],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:20])
def test_value_outside_range_is_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must"):
        ShadowConfig(**{name: value})


BAD_CONSTANTS = [
    *[(name, value) for name in ("norm", "bias") for value in (0, 1, "true", [])],
    *[("activation", value) for value in ("relu", "SiLU", True)],
    *[("dropout_position", value) for value in ("up", 0)],
    *[("down_init", value) for value in ("zeros", False)],
    *[("init_scale", value) for value in (0, -1.0, NAN, INFINITY, "1", True)],
]


@pytest.mark.parametrize(("name", "value"), BAD_CONSTANTS, ids=lambda v: str(v)[:20])
def test_a_constant_outside_its_range_is_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must"):
        ShadowConfig(constants={name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0},
        {"alpha": -0.5},
        {"dropout": 0},
        {"dropout": 0.99},
        {"auxiliary_loss_weight": 0},
        {"first_layer": 0},
        {"first_layer": 0.01},
        *({name: 1} for name in COUNTS),
    ],
)
def test_range_edges_are_accepted(fields):
    assert ShadowConfig(**fields).to_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rnk", "rank"),
        ("r", "rank"),
        ("Alpha", "alpha"),
        ("droput", "dropout"),
        ("aux_loss_weight", "auxiliary_loss_weight"),
        ("shadow_hidden", "shadow_hidden_size"),
        ("num_hidden_layers", "shadow_num_hidden_layers"),
        ("quite_something_else", "rank"),  # nothing near: all are listed
    ],
)
@pytest.mark.parametrize("make", [lambda d: ShadowConfig(**d), ShadowConfig.from_dict], ids=["init", "from_dict"])
def test_unknown_key_suggests_nearest(make, wrong, right):
    with pytest.raises(ConfigError, match=rf"{wrong}.*\b{right}\b"):
        make({wrong: 8})


@pytest.mark.parametrize("name", SIZES)
def test_pretrained_shadow_sets_its_sizes(name):
    with pytest.raises(ConfigError, match=name):
        ShadowConfig(shadow="some/model", **{name: 1})


def test_pretrained_shadow_copies_no_blocks():
    with pytest.raises(ConfigError, match="init"):
        ShadowConfig(shadow="some/model", init="base")


@pytest.mark.parametrize(("shadow", "expected"), [("mirror", False), ("dense", False), ("./a/folder", True)])
def test_pretrained_shadow_is_a_path(shadow, expected):
    assert ShadowConfig(shadow=shadow).is_pretrained is expected


def test_config_error_is_value_error_and_umbra_error():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, umbra.UmbraError)


# -- as a value ----------------------------------------------------------------------------------------------------


def test_config_is_frozen_and_comparable():
    config = ShadowConfig(rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8  # type: ignore[misc]
    assert config == ShadowConfig(rank=4)
    assert hash(config) == hash(ShadowConfig(rank=4))


@pytest.mark.parametrize("dialect", ["paper", "peft"])
@pytest.mark.parametrize("resolved", [False, True])
def test_config_round_trips_through_json(dialect, resolved):
    config = ShadowConfig(
        dialect=dialect, gate_rank=3, alpha=0.25, shadow_hidden_size=16, embeddings="own", constants={"norm": True}
    )
    config = config.resolve() if resolved else config
    assert ShadowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_defaults():
    assert ShadowConfig.from_dict({"rank": 3}) == ShadowConfig(rank=3)
    assert ShadowConfig.from_dict({}) == ShadowConfig()


def test_every_field_is_documented():
    fields = [*dataclasses.fields(ShadowConfig), *dataclasses.fields(DialectConstants)]
    assert [f.name for f in fields if not f.metadata.get("help")] == []


def test_at_most_24_fields_are_at_the_top_level():
    assert len(ShadowConfig.keys()) <= 24


# -- former keys, and LoRA's ---------------------------------------------------------------------------------------


def test_former_keys_are_migrated():
    values = {"channel_scale": "none", "norm": False, "init_scale": 0.5, "rank": 4}
    values |= {"backbone_rate": 1.0, "distillation_schedule": "constant", "update": "gated"}
    expected = ShadowConfig(rank=4, input_scale="none", constants=DialectConstants(norm=False, init_scale=0.5))
    assert ShadowConfig.from_dict(values) == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"backbone_rate": 0.5}, r"backbone_rate=0\.5 is no longer supported: .*learning_rate"),
        ({"distillation_schedule": "rise"}, "distillation_schedule='rise' is no longer supported"),
        ({"update": "none"}, "update='none' is no longer supported: .*umbra study"),
        ({"channel_scale": "none", "input_scale": "none"}, "channel_scale is the former name of input_scale"),
        ({"norm": True, "constants": {"norm": False}}, "norm is given by itself and in constants"),
        ({"r": 8}, "r=8 is a setting of LoRA: write rank"),
        ({"lora_alpha": 16}, "lora_alpha=16 is a setting of LoRA: write alpha.*lora_alpha / r"),
        ({"lora_dropout": 0.1}, "write dropout"),
        ({"target_modules": ["q_proj"]}, "write first_layer or layers"),
        ({"bias": "none"}, "bias='none' is a setting of LoRA"),
        ({"modules_to_save": ["lm_head"]}, "train_heads"),
        ({"use_rslora": True}, "lora_alpha / √r"),
        ({"constants": {"nrm": True}}, "'nrm' in constants. Did you mean 'norm'"),
    ],
    ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
)
def test_a_key_that_cannot_be_migrated_is_explained(values, says):
    with pytest.raises(ConfigError, match=says):
        ShadowConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"channel_scale": "none"}, "channel_scale is now input_scale"),
        ({"down_init": "normal"}, r"write constants=\{'down_init': 'normal'\}"),
        ({"lora_alpha": 16}, "multiplies directly"),
        ({"update": "gated"}, "no longer supported"),
    ],
)
def test_the_constructor_takes_current_names_alone(values, says):
    with pytest.raises(ConfigError, match=says):
        ShadowConfig(**values)


@pytest.mark.parametrize(
    ("fields", "warns"),
    [({"alpha": 16}, True), ({"alpha": 8.5, "rank": 8}, True), ({"alpha": 4}, False), ({"alpha": 16.0, "rank": 1}, False),
     ({"rank": 1}, False)],
)  # fmt: skip
def test_a_large_alpha_is_compared_with_loras(fields, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShadowConfig(**fields).resolve()
    assert bool(caught) == warns
    assert not warns or "LoRA's alpha is divided by r" in str(caught[0].message)


# -- the dialects --------------------------------------------------------------------------------------------------

TABLE = {
    "paper": {
        "rank": 16,
        "gate_rank": 10,
        "first_layer": 1,
        "norm": True,
        "activation": "silu",
        "bias": False,
        "dropout_position": "rank",
        "down_init": "normal",
        "alpha": 0.1,
        "dropout": 0.2,
        "input_scale": "none",
        "init": "random",
    },
    "peft": {
        "rank": 8,
        "gate_rank": 8,
        "first_layer": 0,
        "norm": False,
        "activation": "gelu",
        "bias": True,
        "dropout_position": "delta",
        "down_init": "linear",
        "alpha": 0.1,
        "dropout": 0.2,
        "input_scale": "none",
        "init": "random",
    },
}
OURS = {
    "rank": 64,
    "alpha": 0.25,
    "dropout": 0.0,
    "input_scale": "measured",
    "init": "auto",
    "first_layer": 0.25,
    "down_init": "scaled",
}
TABLE["umbra"] = {**TABLE["paper"], **OURS}


def flat(config: ShadowConfig) -> dict:
    values = config.to_dict()
    return values | values.pop("constants")


@pytest.mark.parametrize("dialect", TABLE)
def test_dialect_fills_in_design_table(dialect):
    resolved = ShadowConfig(dialect=dialect).resolve()
    assert flat(resolved).items() >= {**TABLE[dialect], "auxiliary_loss_weight": 0.05}.items()
    assert resolved.resolve() == resolved


@pytest.mark.parametrize("dialect", TABLE)
@pytest.mark.parametrize("name", TABLE["paper"])
def test_explicit_field_overrides_dialect(dialect, name):
    other = {"paper": "umbra", "umbra": "peft", "peft": "paper"}[dialect]
    resolved = ShadowConfig.from_dict({"dialect": dialect, name: TABLE[other][name]}).resolve()
    expected = {**TABLE[dialect], name: TABLE[other][name]}
    if (dialect, name) == ("peft", "rank"):
        expected["gate_rank"] = expected["rank"]
    if (dialect, name) == ("umbra", "rank"):
        expected["alpha"] = 16 / expected["rank"]
    assert flat(resolved).items() >= expected.items()


def test_gate_rank_follows_rank_in_peft_dialect_only():
    assert ShadowConfig(dialect="peft", rank=5).resolve().gate_rank == 5
    assert ShadowConfig(dialect="paper", rank=5).resolve().gate_rank == 10


def test_alpha_depends_on_rank_in_umbra_dialect_only():
    assert [ShadowConfig(rank=r).resolve().alpha for r in (4, 16, 64)] == [4.0, 1.0, 0.25]
    assert ShadowConfig(rank=4, alpha=0.5).resolve().alpha == 0.5
    assert {ShadowConfig(dialect=d, rank=4).resolve().alpha for d in ("paper", "peft")} == {0.1}


def test_replacing_dialect_replaces_all_its_fields():
    config = dataclasses.replace(ShadowConfig(dialect="paper", alpha=0.3), dialect="peft")
    assert config.resolve() == ShadowConfig(dialect="peft", alpha=0.3).resolve()


def test_best_measured_values_are_defaults():
    assert (
        ShadowConfig().resolve() == ShadowConfig(dialect="umbra").resolve() != ShadowConfig(dialect="paper").resolve()
    )


def test_replacing_with_invalid_value_raises():
    with pytest.raises(ConfigError, match="rank"):
        dataclasses.replace(ShadowConfig(), rank=0)


# -- bases and shapes ----------------------------------------------------------------------------------------------


def outputs(base: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if not hasattr(base, "config"):
            return base(torch.ones(1, 4))
        more = {"decoder_input_ids": tokens()} if base.config.is_encoder_decoder else {}
        return base(tokens(), **more)[0]


def hook_count(base: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())


@contextmanager
def refused(base: nn.Module, error: type[Exception], match: str):
    """Assert that the block raises this error and leaves the base unchanged: weights, modes, hooks, requires_grad, outputs."""
    next(base.parameters()).requires_grad_(False)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    modules, wanted, expected = list(base.named_modules()), [p.requires_grad for p in base.parameters()], outputs(base)
    with pytest.raises(error, match=match):
        yield
    assert hook_count(base) == 0
    assert not base.training
    assert [p.requires_grad for p in base.parameters()] == wanted
    assert list(base.named_modules()) == modules
    assert all(torch.equal(v, weights[k]) for k, v in base.state_dict().items())
    assert torch.equal(outputs(base), expected)


TINY_BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TINY_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
BASES = {
    "one block": (lambda: make_base("llama", num_hidden_layers=1), "1 block"),
    "an encoder with a classifier": (lambda: BertForSequenceClassification(BertConfig(**TINY_BERT)), "encoder-only"),
    "an encoder with a masked head": (lambda: BertForMaskedLM(BertConfig(**TINY_BERT)), "encoder-only"),
    "an encoder with a causal head": (lambda: BertLMHeadModel(BertConfig(**TINY_BERT)), "encoder-only"),
    "an encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config(**TINY_T5)), "encoder-decoder"),
    "a headless llama": (lambda: AutoModel.from_config(make_base("llama").config), "AutoModelForCausalLM"),
    "a headless gpt2": (lambda: AutoModel.from_config(make_base("gpt2").config), "AutoModelForCausalLM"),
    "no transformers model": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "PreTrainedModel"),
}


@pytest.mark.parametrize("kind", BASES)
def test_unsupported_base_is_refused(kind):
    build, words = BASES[kind]
    base = build().eval()
    with refused(base, BaseModelError, words):
        umbra.attach(base)


def test_base_with_shadow_refuses_second_one():
    base = make_base()
    model = umbra.attach(base)
    expected, hooks = model(tokens()).logits, hook_count(base)
    with pytest.raises(BaseModelError, match="already carries a shadow"):
        umbra.attach(base)
    assert hook_count(base) == hooks
    assert torch.equal(model(tokens()).logits, expected)
    umbra.attach(model.unload())


SHAPES = {
    "heads that do not divide the width": ("gpt2", {"shadow_num_attention_heads": 5}, "shadow_num_attention_heads=5"),
    "a width that heads do not divide": ("gpt_neox", {"shadow_hidden_size": 30}, "shadow_hidden_size=30"),
    "heads that are no multiple of kv heads": ("llama", {"shadow_num_attention_heads": 3}, "key_value_heads=2"),
    "more kv heads than heads": ("qwen3", {"shadow_num_key_value_heads": 8}, "shadow_num_key_value_heads=8"),
    "kv heads that do not divide heads": ("mistral", {"shadow_num_key_value_heads": 3}, "shadow_num_key_value_heads=3"),
    "an odd head with rotary positions": ("llama", {"shadow_head_dim": 7}, "shadow_head_dim=7"),
    "gpt2 has no head_dim": ("gpt2", {"shadow_head_dim": 8}, "shadow_head_dim=8.*gpt2"),
    "gpt2 has no kv heads": ("gpt2", {"shadow_num_key_value_heads": 2}, "shadow_num_key_value_heads=2.*gpt2"),
    "gpt_neox has no kv heads": ("gpt_neox", {"shadow_num_key_value_heads": 2}, "shadow_num_key_value_heads=2.*neox"),
    "copies of another width": ("gpt2", {"init": "base", "shadow_hidden_size": 16}, "of Llama's form"),
    "copies of another inner width": (
        "gemma3_text",
        {"init": "base", "shadow_intermediate_size": 16},
        "of Llama's form",
    ),
    "copies of a larger inner width": (
        "llama",
        {"init": "base", "shadow_intermediate_size": 64},
        "is more than its 48",
    ),
    "copies of more blocks than there are": ("llama", {"init": "base", "shadow_num_hidden_layers": 5}, "init='base'"),
    "copies into another architecture": ("gpt2", {"init": "base", "shadow": "dense"}, "init='base'"),
    "a copy of a block that is not there": ("llama", {"init": "base", "init_layers": (4,)}, "the base's are 0 to 3"),
    "no block left to couple": ("llama", {"first_layer": LAYERS}, f"first_layer={LAYERS}"),
    "far behind the last block": ("gpt2", {"first_layer": 99}, "first_layer=99"),
    "a dense shadow with odd kv heads": (
        "gpt2",
        {"shadow": "dense", "shadow_num_key_value_heads": 3},
        "shadow_num_key_value_heads=3",
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_mismatched_sizes_are_refused(kind):
    name, fields, words = SHAPES[kind]
    base = make_base(name)
    with refused(base, ConfigError, words):
        umbra.attach(base, ShadowConfig(**fields))


@pytest.mark.parametrize("first_layer", [0, 2, LAYERS - 1])
def test_any_block_may_be_first_coupled(first_layer):
    model = umbra.attach(make_base(), ShadowConfig(first_layer=first_layer))
    assert list(model.shadow.couplings.injections) == [str(l) for l in range(first_layer, LAYERS)]
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(("share", "first"), [(0.01, 0), (0.25, 1), (0.5, 2), (0.7, 3)])
def test_first_coupled_block_may_be_fraction(share, first, tmp_path):
    model = umbra.attach(make_base(), ShadowConfig(first_layer=share))
    assert model.shadow.couplings.layers == tuple(range(first, LAYERS))
    model.save_pretrained(tmp_path)
    assert umbra.load(tmp_path, model.unload()).shadow_config.first_layer == share
    with pytest.raises(ConfigError, match=r"first_layer=0\.99"):
        umbra.attach(make_base(), ShadowConfig(first_layer=0.99))


@pytest.mark.parametrize(
    ("kind", "std"), [("scaled", 3 / HIDDEN**0.5), ("normal", 0.02), ("linear", (3 * HIDDEN) ** -0.5)]
)
def test_injection_initialisation_follows_config(kind, std):
    injections = umbra.attach(
        make_base(), ShadowConfig(rank=64, constants={"down_init": kind})
    ).shadow.couplings.injections.values()
    down = torch.cat([i.down.weight.detach().flatten() for i in injections])
    assert float(down.std()) == pytest.approx(std, rel=0.05) and abs(float(down.mean())) < 0.05 * std
    assert all(float(i.up.weight.abs().max()) == 0 for i in injections)


AUTO = {
    "the base's sizes": ("llama", {}, "base"),
    "two blocks": ("gemma3_text", {"shadow_num_hidden_layers": 2}, "base"),
    "told otherwise": ("llama", {"init": "random"}, "random"),
    "another dialect": ("llama", {"dialect": "paper"}, "random"),
    "narrower": ("llama", {"shadow_intermediate_size": 24}, "random"),
    "experts": ("qwen3_moe", {}, "random"),
    "dense": ("llama", {"shadow": "dense"}, "random"),
    "deeper than the base": ("llama", {"shadow_num_hidden_layers": LAYERS + 1}, "random"),
}


@pytest.mark.parametrize("case", AUTO)
def test_mirror_shadow_starts_as_first_blocks(case, tmp_path):
    name, fields, expected = AUTO[case]
    model = umbra.attach(make_base(name), ShadowConfig(rank=4, **fields))
    assert model.shadow_config.init == expected
    mine, theirs = (
        model.shadow.backbone.layers[0].self_attn.q_proj.weight,
        model.base.model.layers[0].self_attn.q_proj.weight,
    )
    assert torch.equal(mine, theirs) == (expected == "base")
    model.save_pretrained(tmp_path)
    assert umbra.load(tmp_path, model.unload()).shadow_config.init == expected


# -- pretrained shadows --------------------------------------------------------------------------------------------


def test_missing_pretrained_shadow_is_refused(tmp_path):
    base, path = make_base(), str(tmp_path / "nowhere")
    with refused(base, ConfigError, "nowhere"):
        umbra.attach(base, ShadowConfig(shadow=path))


def test_folder_without_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    base = make_base()
    with refused(base, ConfigError, "no model that transformers can load"):
        umbra.attach(base, ShadowConfig(shadow=str(tmp_path)))


def test_adapter_as_pretrained_shadow_must_be_detached(tmp_path):
    umbra.attach(make_base()).save_pretrained(tmp_path)
    base = make_base()
    with refused(base, ConfigError, "umbra detach"):
        umbra.attach(base, ShadowConfig(shadow=str(tmp_path)))


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_damaged_pretrained_shadow_is_refused(tmp_path, damage):
    make_base(seed=7).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage)
    base = make_base()
    with refused(base, ConfigError, "no model that transformers can load"):
        umbra.attach(base, ShadowConfig(shadow=str(tmp_path)))


def test_pretrained_shadow_with_smaller_vocabulary_is_refused(tmp_path):
    make_base(vocab_size=98).save_pretrained(tmp_path)
    base = make_base()
    with refused(base, BaseModelError, "98 tokens, the base 99"):
        umbra.attach(base, ShadowConfig(shadow=str(tmp_path)))


@pytest.mark.parametrize(
    "build", [lambda: BertModel(BertConfig(**TINY_BERT)), lambda: T5Model(T5Config(**TINY_T5))], ids=["bert", "t5"]
)
def test_pretrained_shadow_must_be_causal_decoder(tmp_path, build):
    """An encoder would leak later tokens to each position."""
    build().save_pretrained(tmp_path)
    base = make_base()
    with refused(base, BaseModelError, "decoder"):
        umbra.attach(base, ShadowConfig(shadow=str(tmp_path)))


@pytest.mark.parametrize("vocab_size", [99, 120])
def test_pretrained_shadow_with_larger_vocabulary_is_accepted(tmp_path, vocab_size):
    make_base(seed=7, vocab_size=vocab_size, num_hidden_layers=2).save_pretrained(tmp_path)
    model = umbra.attach(make_base(), ShadowConfig(shadow=str(tmp_path)))
    assert len(model.shadow.backbone.layers) == 2
    assert model(tokens()).logits.isfinite().all()
