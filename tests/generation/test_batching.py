"""Continuous batching: requests that come and go share pages of keys and values; each is answered as if it were alone."""

import functools
import gc

import pytest
import torch
from transformers import AutoConfig, AutoModel, ContinuousBatchingConfig, GenerationConfig

import umbra
from support.tiny import CONFIGS, make, make_base, tokens

NEW = 6
BASES = ["llama", "gpt2", "mistral", "gemma3_text"]
make_once = functools.cache(make)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Each end of a batching collects all garbage of the process, twice: what lives already is spared."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def prompts() -> list[list[int]]:
    """Of several lengths; two share their first 8 tokens, which are two pages."""
    whole = tokens(4, 17)
    return [
        whole[0, :9].tolist(),
        whole[1, :1].tolist(),
        whole[2].tolist(),
        whole[0, :8].tolist() + whole[3, :5].tolist(),
    ]


def batch(model, said: list[list[int]]) -> list[list[int]]:
    """What continuous batching says to each prompt, by pages of 4 tokens and forwards of at most 16."""
    out = model.generate_batch(
        said,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=40, page_size=4, max_batch_tokens=16),
    )
    assert [o.error for o in out.values()] == [None] * len(said)
    return [o.generated_tokens for o in out.values()]


@torch.no_grad()
def alone(model, said: list[list[int]]) -> list[list[int]]:
    """Each prompt by itself, without any cache."""
    answers = []
    for ids in said:
        row = torch.tensor([ids])
        for _ in range(NEW):
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(row[0, len(ids) :].tolist())
    return answers


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.compat("Caches", "continuous batching (`generate_batch`)", "shadows whose attention has the base's sizes")
def test_batched_request_equals_request_alone(name, attention):
    """Prompts longer than a forward, a window and a page; the attention implementation is put back afterwards."""
    model = make(name, base_options={"attn_implementation": attention})
    parts = model, model.base, model.shadow.backbone
    assert {part.config._attn_implementation for part in parts} == {attention}
    assert batch(model, prompts()) == alone(model, prompts())
    assert {part.config._attn_implementation for part in parts} == {attention}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_paged_prefix_is_shared(name):
    """By requests of the same manager, one after the other."""
    model = make_once(name)
    model.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=40, page_size=4, max_batch_tokens=32)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=pages
    ) as manager:
        found, hits = [], []
        for ids in prompts():
            manager.add_request(ids)
            found.append(manager.get_result(timeout=60).generated_tokens)
        hits = manager.batch_processor.cache.use_prefix_sharing
    assert hits
    assert found == alone(model, prompts())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("form", ["llama", "mistral"])
def test_dense_shadow_is_batched(name, form, tmp_path):
    """With a window where the base has none, and the other way round: each path reads its own masks."""
    sizes = {**CONFIGS[form], "num_hidden_layers": 2, "num_key_value_heads": 4 if name == "gpt2" else 2, "head_dim": 8}
    AutoModel.from_config(AutoConfig.for_model(form, **sizes)).save_pretrained(tmp_path)
    model = make(name, shadow=str(tmp_path))
    assert batch(model, prompts()) == alone(model, prompts())


@pytest.mark.parametrize("name", BASES)
def test_pages_may_have_another_dtype_than_shadow(name):
    """The pages have the base's dtype. Casting up and back loses nothing; down, as beside a bf16 base, it rounds."""
    model = make(name)
    model.shadow.backbone.to(torch.float32)
    model.base.double()
    assert batch(model, prompts()[:2]) == alone(model, prompts()[:2])

    half = umbra.attach(make_base(name).bfloat16(), umbra.ShadowConfig(rank=4))
    assert half.shadow.dtype == torch.float32
    assert [len(said) for said in batch(half, prompts()[:2])] == [NEW, NEW]


def test_generate_with_paged_cache_equals_plain():
    """``cache_implementation="paged"``; transformers warns of its options, and answers with all rows in one more dimension."""
    model, ids = make_once("llama"), tokens(2)
    model.generation_config.eos_token_id = None
    pages = ContinuousBatchingConfig(num_blocks=40, page_size=4, max_batch_tokens=16)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    found = model.generate(
        ids, cache_implementation="paged", generation_config=config, continuous_batching_config=pages
    )
    assert found[0].tolist() == [a + b for a, b in zip(ids.tolist(), alone(model, ids.tolist()), strict=True)]


def test_states_that_pages_cannot_hold_are_refused(tmp_path):
    """Before a thread is started, whose errors would only be logged."""
    heads = make("llama", shadow_num_key_value_heads=1)
    width = make("llama", shadow_head_dim=4)
    small = {**CONFIGS["mistral"], "sliding_window": 10}
    AutoModel.from_config(AutoConfig.for_model("mistral", **small)).save_pretrained(tmp_path)
    window = make("mistral", shadow=str(tmp_path))
    for model, named in (
        (heads, r"\(2, 8\); the shadow has \(1, 8\)"),
        (width, "key and value heads"),
        (window, "window: 6"),
    ):
        with pytest.raises(umbra.BaseModelError, match=named):
            batch(model, prompts())
        model.generate(tokens(), max_new_tokens=2)


def test_mixed_adapter_requests_are_refused():
    with pytest.raises(umbra.ConfigError, match="one adapter"):
        make_once("llama").generate_batch(prompts(), adapter_names=["default"] * 4)


def test_disabled_adapter_is_refused():
    """Its context is this thread's; the batching's own would answer with the adapter."""
    model = make_once("llama")
    with model.disable_adapter(), pytest.raises(umbra.StateError, match="unload"):
        batch(model, prompts())
