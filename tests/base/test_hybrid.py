"""Hybrid and recurrent bases: what is their own, beside the pass over every family of `test_architectures.py`."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import umbra
from support.architectures_hybrid import FAMILIES
from support.families import build, cast
from support.tiny import assert_same, gradients, scramble, tokens
from umbra.base import architectures

IDS = tokens(2, 9)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
families = pytest.mark.parametrize("name", FAMILIES, scope="module")
HIDDEN_ATTENTION = ["falcon_h1", "zamba", "zamba2", "zaya"]  # attention and recurrence in one layer, no attention apart


@pytest.fixture(scope="module")
def model(name):
    return cast(build(name))


@families
@pytest.mark.parametrize("form", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_cached_generation_equals_uncached(name, model, form):
    """With the base's own kinds of cache layers, and one of keys behind them that the shadow has filled."""
    if name == "recurrent_gemma" and form:  # whose own state does not follow its beams
        base = build(name)
        assert not torch.equal(
            base.generate(IDS, **GREEDY, **form), base.generate(IDS, **GREEDY, **form, use_cache=False)
        )
        return
    cached = model.generate(IDS, **GREEDY, **form, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, model.generate(IDS, **GREEDY, **form, use_cache=False))
    layers, blocks = cached.past_key_values.layers, len(architectures.locate(model.base).blocks)
    assert len(layers) == blocks + 1
    assert type(layers[-1]) is DynamicLayer
    assert layers[-1].get_seq_length() == cached.sequences.shape[1] - 1
    if name != "minimax":
        expected = DynamicCache(config=model.base.config).layers
        assert [type(layer) for layer in layers[:-1]] == [type(layer) for layer in expected]


@families
def test_static_cache_equals_uncached(name, model):
    if name == "minimax":
        with pytest.raises(umbra.StateError, match="cache class of its own"):
            model.generate(IDS, **GREEDY, cache_implementation="static")
        return
    found = model.generate(IDS, **GREEDY, cache_implementation="static")
    assert torch.equal(found, model.generate(IDS, **GREEDY))


@families
@torch.no_grad()
def test_stepwise_logits_equal_full_forward(name, model):
    """Positions are given: without them Bamba itself counts wrongly."""
    cache, found, places = None, [], torch.arange(IDS.shape[1])[None]
    for part, at in zip(IDS.split([5, 1, 1, 1, 1], dim=1), places.split([5, 1, 1, 1, 1], dim=1), strict=True):
        out = model(part, position_ids=at, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@families
def test_second_step_gradients_equal_first(name, model):
    """No step leaves anything behind in the base."""
    losses, steps = [], []
    for _ in range(2):
        losses.append(model.train()(IDS, labels=IDS).loss)
        losses[-1].backward()
        steps.append(gradients(model.eval()))
    assert torch.equal(*losses)
    assert_same(*steps)


@families
def test_disabled_adapter_generates_like_base(name, model):
    with model.disable_adapter():
        found = model.generate(IDS, **GREEDY)
    assert torch.equal(found, build(name).generate(IDS, **GREEDY))


@pytest.mark.parametrize("name", HIDDEN_ATTENTION, scope="module")
@torch.no_grad()
def test_unmeasurable_static_cache_is_refused(name, model):
    """transformers would read the length of the base's past from the shadow's layer; `generate` prepares its masks before."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(umbra.StateError, match="DynamicCache"):
        model(IDS, past_key_values=cache)


@families
def test_shadow_configuration_keeps_all_layer_types(name, model):
    """It holds those of several shadows, is copied and pickled, and leaves the base's alone."""
    blocks = len(architectures.locate(model.base).blocks)
    model.add_adapter(umbra.ShadowConfig(rank=4, shadow_num_hidden_layers=2), "second")
    kinds = architectures.layer_types(model.config)
    assert kinds[:blocks] == architectures.layer_types(model.base.config)
    assert kinds[blocks:] == ["full_attention"] * 3
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config.model_type == name
        assert config.num_hidden_layers == blocks + 3
        assert len(DynamicCache(config=config).layers) == blocks + 3
    model.delete_adapter("second")
    assert architectures.layer_types(model.config) == kinds[: blocks + 1]
    assert model.base.config.num_hidden_layers == blocks


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "falcon_h1", "gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_mixed_batch_equals_each_row_with_its_adapter(name):
    model = cast(build(name))
    model.add_adapter(umbra.ShadowConfig(rank=4, alpha=0.5), "second")
    scramble(model.adapter("second"), 5)
    rows = []
    for row, adapter in enumerate(["default", "second"]):
        model.set_adapter(adapter)
        rows.append(model(IDS).logits[row])
    mixed = model(IDS, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-4, atol=1e-4)
    names = ["default", None]
    found = model.generate(IDS, **GREEDY, adapter_names=names)
    model.set_adapter("default")
    assert torch.equal(found[0], model.generate(IDS, **GREEDY)[0])
    with model.disable_adapter():
        assert torch.equal(found[1], model.generate(IDS, **GREEDY)[1])


@torch.no_grad()
def test_gemma3n_updates_only_active_stream():
    """AltUp runs on: block 1 is given the first stream corrected, and the others as block 0 left them."""
    model, seen = cast(build("gemma3n_text")), {}
    blocks = architectures.locate(model.base).blocks
    blocks[0].register_forward_hook(lambda _, args, out: seen.update(left=out))
    blocks[1].register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
    model(IDS)
    assert torch.equal(seen["given"][1:], seen["left"][1:])
    s = model.runner.initial_state({"input_ids": IDS, "inputs_embeds": None})
    expected = model.shadow.couplings.inject(1, seen["left"][0], s)
    torch.testing.assert_close(seen["given"][0], expected)
    assert (expected - seen["left"][0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["lfm2", "gemma4_text"])
def test_narrow_shadow_trains_and_detaches(name):
    """Of several layers and another width, with the projections that bridge them."""
    sizes = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1}
    model = cast(build(name), shadow_num_hidden_layers=2, shadow_head_dim=8, **sizes)
    assert torch.equal(model.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY, use_cache=False))
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.shadow.parameters() if p.requires_grad)


def test_irreversible_cache_is_refused_as_by_base():
    ids = torch.tensor([[5, 6, 7, 8] * 3])
    for model in (build("qwen3_5_text"), umbra.attach(build("qwen3_5_text"), umbra.ShadowConfig(rank=4))):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
