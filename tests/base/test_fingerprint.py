"""Which bases an adapter is loaded beside: the one that it was trained on in any precision, and no other."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import GgufConfig

import umbra
from support.families import build
from support.folders import CONFIG
from support.tiny import LAYERS, make_base, tokens
from umbra.base.architectures import locate
from umbra.base.fingerprint import deciding_fields, fingerprint

BASES = ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "gpt_neox", "qwen3_moe"]


def saved_beside(base, folder, **fields):
    model = umbra.attach(base, umbra.ShadowConfig(rank=2, **fields))
    model.save_pretrained(folder)
    model.unload()
    return folder


def refused(folder, base, message):
    """Refused by name, and loaded where the user insists."""
    with pytest.raises(umbra.BaseModelError, match=message) as error:
        umbra.load(folder, base)
    assert "allow_other_base=True" in str(error.value)
    umbra.load(folder, base, allow_other_base=True)


def parameters_outside(base) -> list[str]:
    """Names of all parameters that are not of a block."""
    inside = {id(p) for block in locate(base).blocks for p in block.parameters()}
    return [n for n, p in base.named_parameters() if id(p) not in inside]


OUTSIDE = [(name, n) for name in BASES for n in parameters_outside(make_base(name))]


@pytest.mark.parametrize(("name", "parameter"), OUTSIDE, ids=[f"{a}-{b}" for a, b in OUTSIDE])
@torch.no_grad()
def test_every_tensor_outside_blocks_is_fingerprinted(name, parameter, tmp_path):
    folder = saved_beside(make_base(name), tmp_path / "a")
    umbra.load(folder, make_base(name)).unload()
    other = make_base(name)
    p = other.get_parameter(parameter)
    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    refused(folder, other, "other weights in")


@torch.no_grad()
def test_tied_and_equal_untied_heads_have_one_fingerprint(tmp_path):
    folder = saved_beside(make_base("llama", tie_word_embeddings=True), tmp_path / "a")
    other = make_base("llama", tie_word_embeddings=True)
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.clone())
    umbra.load(folder, other).unload()
    other.lm_head.weight[40:] += 0.2
    refused(folder, other, "other weights in head weight")


FIELDS = [
    ("llama", "rms_norm_eps", 1e-3),
    ("llama", "hidden_act", "gelu"),
    ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ("qwen3", "attention_bias", True),
    ("gemma3_text", "query_pre_attn_scalar", 16),
    ("gemma3_text", "final_logit_softcapping", 3.0),
    ("gemma3_text", "attn_logit_softcapping", 3.0),
    ("gemma3_text", "sliding_window", 4),
    ("gemma3_text", "layer_types", ["full_attention"] * LAYERS),
    ("mistral", "sliding_window", None),
    ("gpt2", "layer_norm_epsilon", 1e-3),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "activation_function", "relu"),
    ("gpt_neox", "use_parallel_residual", False),
    ("gpt_neox", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 10000.0}),
    ("qwen3_moe", "num_experts_per_tok", 1),
    ("qwen3_moe", "norm_topk_prob", True),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
@torch.no_grad()
def test_every_setting_that_affects_logits_is_fingerprinted(name, field, value, tmp_path):
    first = make_base(name)
    folder, other = saved_beside(first, tmp_path / "a"), make_base(name, **{field: value})
    weights = first.state_dict()
    other.load_state_dict({k: weights.get(k, v) for k, v in other.state_dict().items()})
    refused(folder, other, field)


INDIFFERENT = {
    "use_cache": False, "initializer_range": 0.5, "attention_dropout": 0.3, "pad_token_id": 5, "eos_token_id": 4,
    "name_or_path": "moved/elsewhere", "output_hidden_states": True, "max_position_embeddings": 4096, "pretraining_tp": 2,
    "tie_word_embeddings": True, "problem_type": "regression", "id2label": {0: "a"},
}  # fmt: skip


@pytest.mark.parametrize("field", INDIFFERENT)
def test_settings_without_effect_on_logits_are_ignored(field):
    base = make_base()
    before = deciding_fields(base.config)
    setattr(base.config, field, INDIFFERENT[field])
    assert deciding_fields(base.config) == before and {"rms_norm_eps", "rope_parameters", "hidden_act"} <= before.keys()


def test_version_specific_fields_are_ignored(tmp_path):
    folder = saved_beside(make_base(), tmp_path / "a")
    values = json.loads((folder / CONFIG).read_text())
    values["base"]["config"] |= {"of_another_version": 3}
    values["base"]["config"]["rope_parameters"]["of_another_version"] = 3
    del values["base"]["config"]["hidden_act"]
    (folder / CONFIG).write_text(json.dumps({**values, "sha256": None}))
    umbra.load(folder, make_base())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_in_another_precision_is_the_same_base(name, dtype, tmp_path):
    first = make_base(name)
    folder = saved_beside(first, tmp_path / "a")
    umbra.load(folder, copy.deepcopy(first).to(dtype)).unload()
    other = saved_beside(copy.deepcopy(first).to(dtype), tmp_path / "b")
    umbra.load(other, first)


@torch.no_grad()
def test_base_head_is_ignored_where_adapter_trains_heads(tmp_path):
    folder = saved_beside(make_base(classifier=True), tmp_path / "a")
    other = make_base(classifier=True)
    other.score.weight.normal_()
    umbra.load(folder, other).unload()
    folder = saved_beside(make_base(classifier=True), tmp_path / "b", train_heads=False)
    refused(folder, other, "head")


@pytest.mark.parametrize("untied", [False, True])
@torch.no_grad()
def test_last_vocabulary_rows_are_fingerprinted(untied, tmp_path):
    """Where a base was resized before a shadow was put beside it, tokens of its own lie there."""
    folder = saved_beside(make_base(tie_word_embeddings=not untied), tmp_path / "a")
    for row in (-1, -2, -9):
        other = make_base(tie_word_embeddings=not untied)
        (other.lm_head if untied else other.model.embed_tokens).weight[row].normal_()
        refused(folder, other, "last rows")


def test_fingerprint_reads_few_values():
    size = len(json.dumps(fingerprint(locate(make_base()))))
    assert size < 9000


def test_hybrid_base_is_fingerprinted(tmp_path):
    first = build("mamba")
    folder = saved_beside(first, tmp_path / "a", shadow="dense")
    umbra.load(folder, build("mamba")).unload()
    first.backbone.norm_f.weight.data.normal_()
    refused(folder, first, "norm_f")
    assert umbra.load(folder, build("mamba"))(tokens()).logits.isfinite().all()


@torch.no_grad()
def test_gguf_copy_is_accepted_and_another_model_refused(tmp_path):
    """Where there is no kernel for its blocks, transformers unpacks them into plain weights, which have lost digits."""

    def unpacked(seed):
        copied = make_base(seed=seed)
        copied.config.quantization_config = GgufConfig()
        for p in copied.parameters():
            if p.ndim > 1:
                scale = p.abs().max() / 7
                p.copy_((p / scale).round() * scale)
        return copied

    folder = saved_beside(make_base(), tmp_path / "a")
    umbra.load(folder, unpacked(0)).unload()
    refused(folder, unpacked(1), "other")
    umbra.load(saved_beside(unpacked(0), tmp_path / "b"), make_base())
    norm = unpacked(0)
    norm.model.norm.weight.normal_()
    refused(folder, norm, "other weights in model.norm.weight")
