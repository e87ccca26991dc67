"""Shadows made of a base's blocks, narrower than they are."""

import pytest
import torch
from transformers import AutoConfig

import umbra
from support.tiny import CONFIGS, HIDDEN, LAYERS, LLAMA_LIKE, make_base, randomise, tokens

WIDTH, INNER, DIM = 16, 24, 8
NARROW = {
    "init": "base", "constants": {"init_scale": 1.0}, "shadow_num_hidden_layers": LAYERS, "shadow_hidden_size": WIDTH,
    "shadow_intermediate_size": INNER, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1, "shadow_head_dim": DIM,
}  # fmt: skip


@torch.no_grad()
def roomy_base(name: str, width: int = WIDTH):
    """A base that uses `width` directions of its states, one of two groups of heads, and half of its neurons."""
    base = make_base(name, head_dim=DIM)
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(HIDDEN, width, generator=generator))[0]
    inside = turn @ turn.T
    base.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight @ inside)
    for block in base.model.layers:
        for out in (block.self_attn.o_proj, block.mlp.down_proj):
            out.weight.copy_(inside @ out.weight)
        block.self_attn.v_proj.weight[:DIM] = 0
        block.mlp.gate_proj.weight[1::2] = 0
    return base


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("embeddings", ["base", "own"])
@torch.no_grad()
def test_unused_units_can_be_pruned_exactly(name, embeddings):
    base, ids = roomy_base(name), tokens()
    expected = base(ids).logits
    model = umbra.attach(base, umbra.ShadowConfig(**NARROW, embeddings=embeddings))
    assert model.shadow.backbone.config.hidden_size == WIDTH
    torch.testing.assert_close(model.detached()(ids).logits, expected, rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_equal_width_prunes_heads_and_neurons_only():
    base, ids = roomy_base("llama", HIDDEN), tokens()
    same = {k: v for k, v in NARROW.items() if k != "shadow_hidden_size"}
    model = umbra.attach(base, umbra.ShadowConfig(**same))
    assert model.shadow.projection is None
    torch.testing.assert_close(model.detached()(ids).logits, base_logits(model, ids), rtol=1e-3, atol=2e-4)


def base_logits(model, ids):
    with model.disable_adapter():
        return model(ids).logits


@torch.no_grad()
def test_pruned_copy_is_closer_than_random_shadow():
    """Of a base that uses all it has."""
    ids = tokens(4, 12)
    apart = {}
    for init in ("base", "random"):
        torch.manual_seed(0)
        base = make_base("llama", head_dim=DIM)
        one = make_base("llama", head_dim=DIM)
        del one.model.layers[1:]
        sizes = {
            **NARROW,
            "shadow_num_hidden_layers": 1,
            "shadow_hidden_size": 24,
            "shadow_intermediate_size": 40,
            "init": init,
        }
        found = umbra.attach(base, umbra.ShadowConfig(**sizes)).detached()(ids).logits
        expected = one(ids, use_cache=False).logits
        apart[init] = float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean())
    assert apart["base"] > 0.4 > 0.2 > apart["random"]


FAMILIES = ["gpt2", "gemma3_text", "phi3", "gpt_neox", "stablelm", "olmo", "bitnet", "diffllama"]


@pytest.mark.parametrize("name", FAMILIES)
def test_unsupported_blocks_are_refused(name):
    """Norms with a bias or without a weight, parameters that nothing would be copied into, parts of other names."""
    base = randomise(AutoConfig.for_model(name, **CONFIGS.get(name, LLAMA_LIKE)))
    sizes = (
        {"shadow_intermediate_size": 16}
        if name != "gpt_neox"
        else {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}
    )
    with pytest.raises(umbra.ConfigError, match=r"Llama's form|does not fit"):
        umbra.attach(base, umbra.ShadowConfig(init="base", **sizes))


@torch.no_grad()
def test_pruned_embedding_keeps_module_scale():
    """Gemma's multiplies by the root of its own width."""
    base = randomise(AutoConfig.for_model("gemma", **{**LLAMA_LIKE, "head_dim": DIM}))
    states = []
    for embeddings in ("base", "own"):
        model = umbra.attach(base, umbra.ShadowConfig(**NARROW, embeddings=embeddings))
        states.append(model.runner.initial_state({"input_ids": tokens(), "inputs_embeds": None}))
        model.unload()
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shadow_intermediate_size": 64}, "more than its 48"),
        ({"shadow_head_dim": 4}, "shadow_head_dim must be 8"),
        ({"shadow_num_attention_heads": 4}, "at most 2 heads may share"),
    ],
)
def test_sizes_larger_than_base_are_refused(change, says):
    with pytest.raises(umbra.ConfigError, match=says):
        umbra.attach(make_base("llama", head_dim=DIM), umbra.ShadowConfig(**{**NARROW, **change}))


def test_pruned_copy_round_trips(tmp_path):
    base = make_base("llama", head_dim=DIM)
    model, ids = umbra.attach(base, umbra.ShadowConfig(**NARROW)), tokens()
    model.save_pretrained(tmp_path)
    expected = model.detached()(ids).logits
    again = umbra.load(tmp_path, base=model.unload())
    torch.testing.assert_close(again.detached()(ids).logits, expected)
