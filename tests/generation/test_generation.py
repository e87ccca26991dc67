"""Every way to generate that transformers has gives, with one cache for base and shadow, what it gives without a cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, DynamicCache, StaticCache

import umbra
from support.generating import generate, repetitive
from support.tiny import ARCHITECTURES, CONFIGS, DIALECTS, LAYERS, VOCAB, make, make_base, tokens

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
dialects = pytest.mark.parametrize("dialect", DIALECTS)

SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam_sequences": {"num_beams": 4, "num_return_sequences": 3},
    "sampled_sequences": {"do_sample": True, "num_return_sequences": 3},
}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "chunked_prefill": {"prefill_chunk_size": 4}}


def assert_bare_base_can(name: str, ids, **options):
    """The mode works with the bare base, so that a difference further on is ours."""
    bare = make_base(name)
    assert torch.equal(generate(bare, ids, **options), generate(bare, ids, use_cache=False))


@architectures
@pytest.mark.parametrize(
    ("dialect", "search"), [*(("paper", s) for s in SEARCHES), ("peft", "greedy"), ("peft", "beams")]
)
def test_cached_generation_equals_uncached(name, dialect, search):
    model, ids = make(name, dialect=dialect), tokens()
    found = generate(model, ids, **SEARCHES[search])
    assert torch.equal(found, generate(model, ids, **SEARCHES[search], use_cache=False))
    assert len({tuple(row) for row in found.tolist()}) == len(found), (
        "rows of a random model that do not differ test little"
    )


@architectures
@pytest.mark.parametrize("search", ["greedy", "beams"])
@pytest.mark.parametrize("cache", ["static", "chunked_prefill"])
def test_other_caches_equal_uncached(name, cache, search):
    ids = tokens()
    if cache == "chunked_prefill":
        assert_bare_base_can(name, ids, **CACHES[cache])
    model = make(name)
    found = generate(model, ids, **SEARCHES[search], **CACHES[cache])
    assert torch.equal(found, generate(model, ids, **SEARCHES[search], use_cache=False))


@architectures
@pytest.mark.parametrize("form", [{"shadow_num_hidden_layers": 3}, {"shadow": "dense"}, {"embeddings": "own"}], ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_other_shadow_forms_cached_equal_uncached(name, cache, form):
    model, ids = make(name, **form), tokens()
    assert torch.equal(generate(model, ids, **CACHES[cache]), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("form", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_other_pretrained_shadows_cached_equal_uncached(name, form, tmp_path):
    """A shadow whose attention is of another kind than the base's, a sliding window of another width included."""
    window = {} if form == "llama" else {"sliding_window": 10}
    small = {**CONFIGS[form], **window, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    AutoModel.from_config(AutoConfig.for_model(form, **small)).save_pretrained(tmp_path)
    model, ids = make(name, shadow=str(tmp_path)), tokens(2, 24)
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        steps = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([9, *[1] * 15], dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


@architectures
@dialects
@pytest.mark.parametrize("parts", [[1] * 24, [9, *[1] * 15], [4, 1, 7, 3, 1, 8]], ids=["tokens", "decode", "chunks"])
@torch.no_grad()
def test_chunked_logits_equal_full_forward(name, dialect, parts):
    model, ids, cache = make(name, dialect=dialect), tokens(2, 24), None
    found = []
    for part in ids.split(parts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    assert len(cache.layers) == LAYERS + 1
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@architectures
@torch.no_grad()
def test_cropped_cache_continues_correctly(name):
    """What drafting does after a rejection; at most what a window still holds."""
    model, ids, other = make(name), tokens(1, 16), tokens(1, 16, seed=8)
    start = 5 if name in ("gemma3_text", "mistral") else 9
    wrong = torch.cat([ids[:, : start - 2], other[:, :2]], dim=1)
    cache = model(wrong, use_cache=True).past_key_values
    cache.crop(-2)
    found = [model(ids[:, [t]], past_key_values=cache, use_cache=True).logits for t in range(start - 2, 16)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits[:, start - 2 :], rtol=1e-4, atol=1e-4)


@architectures
def test_prompt_lookup_equals_plain_decoding(name):
    ids = repetitive()
    assert_bare_base_can(name, ids, prompt_lookup_num_tokens=3)
    model = make(name)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)


@architectures
def test_detached_shadow_can_assist(name):
    """A draft model that agrees sometimes and fails sometimes: first the detached shadow, then the bare base."""
    ids = tokens(1)
    model = make(name)
    for assistant in (model.detached(), make_base(name)):
        assistant.generation_config.eos_token_id = None
        assert_bare_base_can(name, ids, assistant_model=assistant)
        expected = generate(model, ids, use_cache=False)
        assert torch.equal(generate(model, ids, assistant_model=assistant), expected)


@architectures
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_inputs_embeds_equal_plain_decoding(name, cache):
    ids = tokens()
    embedded = make_base(name).get_input_embeddings()(ids)
    model = make(name)
    expected = generate(model, ids, use_cache=False)[:, ids.shape[1] :]
    assert torch.equal(generate(model, None, inputs_embeds=embedded, **CACHES[cache]), expected)


@architectures
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_left_padded_rows_equal_rows_alone(name, search, cache):
    model, ids, pads = make(name), tokens(3, 12), (0, 4, 9)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    found = generate(model, ids, attention_mask=mask, **SEARCHES[search], **CACHES[cache])
    for row, pad in enumerate(pads):
        alone = generate(model, ids[row : row + 1, pad:], **SEARCHES[search], use_cache=False)
        assert torch.equal(found[row, pad:], alone[0])


@architectures
def test_generation_between_evaluations_leaves_no_state(name):
    """Generating leaves nothing behind, and answers the same twice."""
    model, ids = make(name), tokens()
    before, first = model(ids).logits, generate(model, ids)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(generate(model, ids), first)
    assert int(first.max()) < VOCAB


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("mode", ["prompt_lookup", "assisted"])
def test_dropped_drafts_roll_back_with_inactive_shadows(name, mode):
    """Windows of theirs are empty, which transformers cannot cut."""
    model, ids = make(name), repetitive()[:1]
    model.add_adapter(umbra.ShadowConfig(rank=4), "second")
    more = {"prompt_lookup_num_tokens": 3} if mode == "prompt_lookup" else {"assistant_model": make_base(name, seed=5)}
    assert torch.equal(generate(model, ids, **more), generate(model, ids))
    with model.disable_adapter():
        assert torch.equal(generate(model, ids, **more), generate(model, ids))
