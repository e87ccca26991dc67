"""Every cache of transformers, in every way to generate: the tokens of the uncached run, or the base's own refusal."""

import copy
import functools
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

import umbra
from test_generation import generate, repetitive
from tiny import LAYERS, make, make_base, tokens

BASES = ["llama", "gpt2", "mistral", "gemma3_text"]
SLIDING = ["mistral", "gemma3_text"]
FULL = ["llama", "gpt2"]
bases = pytest.mark.parametrize("name", BASES)

model_of = functools.cache(make)
base_of = functools.cache(make_base)


class Stream(AbstractContextManager):
    """Stands in for the streams of an accelerator, whose copies here are done when they are asked for."""

    def wait_stream(self, other: Any) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


@pytest.fixture
def streams(monkeypatch):
    """Offloaded caches on a CPU: transformers asks torch.cuda for its streams, whatever the device is."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


# A cache as options of `generate` for a model: named, or built by the user.
CACHES = {
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static"},
    "static_sized": lambda model: {"cache_implementation": "static", "max_cache_len": 40},
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda model: {"cache_implementation": "offloaded_static"},
    "own_dynamic": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "own_without_config": lambda model: {"past_key_values": DynamicCache()},
    "own_static": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=40)},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "padded": {"attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])},
    "padded_beams": {"attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9]), "num_beams": 2},
    "chunked_prefill": {"prefill_chunk_size": 4},
    "padded_chunks": {"attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]), "prefill_chunk_size": 4},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}
STATIC = {cache for cache in CACHES if "static" in cache}
NEEDS_CROP = {"prompt_lookup", "assisted"}


def prompt(mode: str) -> torch.Tensor:
    return repetitive() if mode == "prompt_lookup" else tokens(1 if mode == "assisted" else 2)


def options_for(name: str, mode: str) -> dict[str, Any]:
    assistant = {"assistant_model": base_of(name, seed=5)} if mode == "assisted" else {}
    return {**MODES[mode], **assistant}


@functools.cache
def uncached(model, mode: str) -> torch.Tensor:
    """What the mode must give; chunks, look-ups and assistants change nothing."""
    kept = {k: v for k, v in MODES[mode].items() if k in ("attention_mask", "num_beams")}
    return generate(model, prompt(mode), use_cache=False, **kept)


def outcome(model, ids: torch.Tensor, **options: Any) -> Any:
    """The tokens, or what is raised."""
    try:
        return generate(model, ids, **options)
    except Exception as error:
        return type(error), str(error)


@bases
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.compat("Caches", "dynamic, static, offloaded and one's own cache × beams, padding, chunks, assistants")
def test_every_cache_in_every_mode(name, cache, mode, streams):
    """As the uncached run; where transformers refuses the bare base, it refuses the pair in the same words."""
    base, model = base_of(name, seed=0), model_of(name)
    base.generation_config.eos_token_id = None
    bare, found = (
        outcome(m, prompt(mode), **options_for(name, mode), **CACHES[cache](m)) for m in (base, model)
    )
    refused = isinstance(bare, tuple)
    assert refused == ((cache in STATIC and mode in NEEDS_CROP) or (cache.startswith("own") and "beams" in mode)), bare
    if refused:
        assert found == bare
        return
    assert torch.equal(bare, uncached(base, mode))
    assert not isinstance(found, tuple), found
    assert torch.equal(found, uncached(model, mode))
