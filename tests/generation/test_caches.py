"""Every cache of transformers, in every way to generate: the tokens of the uncached run, or the base's own refusal."""

import copy
import functools
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

import umbra
from support import generating
from support.generating import repetitive
from support.tiny import LAYERS, make, make_base, tokens

BASES = ["llama", "gpt2", "mistral", "gemma3_text"]
SLIDING = ["mistral", "gemma3_text"]
FULL = ["llama", "gpt2"]
bases = pytest.mark.parametrize("name", BASES)

model_of = functools.cache(make)
base_of = functools.cache(make_base)


generate = functools.partial(generating.generate, max_new_tokens=7)


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
    "static": lambda model: {"cache_implementation": "static", "max_cache_len": 40},
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda model: {"cache_implementation": "offloaded_static"},
    "own_dynamic": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "own_without_config": lambda model: {"past_key_values": DynamicCache()},
    "own_static": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=40)},
}
MODES = {
    "greedy": {},
    "padded": {"attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])},
    "padded_beams": {"attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9]), "num_beams": 2},
    "padded_chunks": {"attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]), "prefill_chunk_size": 4},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}
STATIC = {cache for cache in CACHES if "static" in cache}
NEEDS_CROP = {"prompt_lookup", "assisted"}


def refuses(name: str, cache: str, mode: str) -> bool:
    """Whether transformers 5.23 itself cannot do it."""
    uncroppable = cache in STATIC and mode in NEEDS_CROP
    named_for_the_assistant_too = mode == "assisted" and cache in ("dynamic", "offloaded")
    nothing_to_offload = name == "mistral" and cache == "offloaded_static"
    return uncroppable or named_for_the_assistant_too or nothing_to_offload


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
def test_every_cache_equals_uncached_in_every_mode(name, cache, mode, streams):
    """As the uncached run; where transformers refuses the bare base, it refuses the pair in the same words."""
    base, model = base_of(name, seed=0), model_of(name)
    base.generation_config.eos_token_id = None
    bare, found = (outcome(m, prompt(mode), **options_for(name, mode), **CACHES[cache](m)) for m in (base, model))
    assert isinstance(bare, tuple) == refuses(name, cache, mode), bare
    if isinstance(bare, tuple):
        assert found == bare
        return
    assert torch.equal(bare, uncached(base, mode))
    assert not isinstance(found, tuple), found
    assert torch.equal(found, uncached(model, mode))


def test_offloaded_cache_needs_cuda_streams():
    """Hence the stand-ins above: without them transformers 5.23 fails on a CPU, with or without a shadow."""
    if torch.cuda.is_available():
        return
    refusals = [
        outcome(m, tokens(), cache_implementation=f"offloaded{kind}")
        for m in (base_of("llama", seed=0), model_of("llama"))
        for kind in ("", "_static")
    ]
    assert set(refusals) == {(AssertionError, "Torch not compiled with CUDA enabled")}


@bases
def test_offloading_covers_shadow_cache(name, streams, monkeypatch):
    """Each layer, the shadow's last, is taken off the device after use, and the one that is used next is fetched."""
    model, moved = model_of(name), []
    cache = DynamicCache(config=model.config, offloading=True)
    for index, layer in enumerate(cache.layers):
        for way in ("offload", "prefetch"):
            monkeypatch.setattr(layer, way, lambda way=way, index=index: moved.append((way, index)))
    model(tokens(), past_key_values=cache)
    assert [i for way, i in moved if way == "offload"] == [LAYERS, *range(LAYERS)]
    assert [i for way, i in moved if way == "prefetch"] == [0, *range(1, LAYERS + 1)]


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("cache", ["dynamic", "static", "own_without_config"])
@pytest.mark.parametrize("length", [1, 5, 6, 7])
@pytest.mark.compat("Caches", "sliding windows, up to and across their edge")
def test_window_edges_are_handled(name, cache, length):
    """Prompts and ends one before, at and behind a multiple of the window of 6."""
    model, ids = model_of(name), tokens(2, length)
    expected = generate(model, ids, max_new_tokens=14 - length, use_cache=False)
    for total in (5, 6, 7, 11, 12, 13, 14):
        if total > length:
            found = model.generate(
                ids, max_new_tokens=total - length, do_sample=False, pad_token_id=0, **CACHES[cache](model)
            )
            assert torch.equal(found, expected[:, :total])


# -- quantised -----------------------------------------------------------------------------------------------------

BACKENDS = {
    "quanto": {"backend": "quanto", "q_group_size": 16, "residual_length": 4},
    "hqq": {"backend": "hqq", "q_group_size": 16, "residual_length": 4, "axis_key": 1, "axis_value": 1},
    "fp8": {"backend": "fp8"},
}
backends = pytest.mark.parametrize("backend", BACKENDS)


@functools.cache
def powerless(name: str):
    """A shadow that is computed and cached, but corrects nothing."""
    model = make(name)
    for injection in model.shadow.couplings.injections.values():
        injection.alpha = 0.0
    return model


@pytest.mark.parametrize("name", FULL)
@backends
@pytest.mark.parametrize("mode", sorted(MODES.keys() - NEEDS_CROP))
@pytest.mark.compat("Caches", "quantised (quanto, HQQ, fp8) × beams, padding, chunks", "bases without sliding windows")
def test_quantised_cache_equals_base(name, backend, mode):
    options = {**MODES[mode], "cache_implementation": "quantized", "cache_config": BACKENDS[backend]}
    expected = generate(base_of(name, seed=0), tokens(), **options)
    assert torch.equal(generate(powerless(name), tokens(), **options), expected)


@pytest.mark.parametrize("name", FULL)
@backends
@torch.no_grad()
def test_quantised_cache_error_equals_base_error(name, backend):
    """By a quantisation that is felt, and no more than in the base alone."""
    ids, errors = tokens(2, 24), []
    for model in (base_of(name, seed=0), model_of(name)):
        cache = QuantizedCache(config=model.config, **BACKENDS[backend])
        found = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([9, *[1] * 15], dim=1)]
        expected = model(ids, use_cache=False).logits
        errors.append(float((torch.cat(found, dim=1) - expected)[:, 9:].norm() / expected[:, 9:].norm()))
    assert 0 < errors[1] < 3 * errors[0], errors


@pytest.mark.parametrize("name", SLIDING)
@backends
def test_transformers_refuses_quantised_sliding_windows(name, backend):
    options = {"cache_implementation": "quantized", "cache_config": BACKENDS[backend]}
    bare, found = (outcome(m, tokens(), **options) for m in (base_of(name, seed=0), model_of(name)))
    assert found == bare
    assert bare[0] is ValueError


# -- over several calls --------------------------------------------------------------------------------------------

KEPT = ["own_dynamic", "own_without_config", "own_static"]


@bases
@pytest.mark.parametrize(("cache", "chunks"), [*((kept, None) for kept in KEPT[:2]), (KEPT[0], 3), (KEPT[2], 3)])
@pytest.mark.compat("Caches", "one's own cache over several turns")
def test_cache_continues_over_several_turns(name, cache, chunks):
    """What the user adds each time is all that is computed; a static cache is then reset and used again."""
    model, kept = model_of(name), CACHES[cache](model_of(name))["past_key_values"]
    for again in range(1 + (cache == "own_static")):
        said, calls = tokens(2, 5, seed=again), []
        for turn in range(3):
            with counting(model, calls):
                found = generate(model, said, max_new_tokens=4, past_key_values=kept, prefill_chunk_size=chunks)
            assert torch.equal(found, generate(model, said, max_new_tokens=4, use_cache=False))
            said = torch.cat([found, tokens(2, 3, seed=turn)], dim=1)
        assert sum(calls) == found.shape[1] - 1
        kept.reset()


class counting(AbstractContextManager):
    """How many positions of each row the model's forwards compute."""

    def __init__(self, model, lengths: list[int]):
        self.handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


@bases
@pytest.mark.parametrize("cache", KEPT)
@torch.no_grad()
@pytest.mark.compat("Caches", "a prefix shared by several continuations, as copies or as rows")
def test_shared_prefix_cache_can_be_copied(name, cache):
    """Deep copies go on apart, and leave the prefix as it was; a dynamic one is also repeated into rows, and picked from."""
    model, prefix = model_of(name), tokens(1, 8)
    kept = CACHES[cache](model)["past_key_values"]
    model(prefix, past_key_values=kept)
    wholes = [torch.cat([prefix, tokens(1, length, seed=length)], dim=1) for length in (1, 4)]
    for whole in wholes:
        found = generate(model, whole, past_key_values=copy.deepcopy(kept))
        assert torch.equal(found, generate(model, whole, use_cache=False))
    if cache != "own_static":
        rows = torch.cat([prefix.expand(3, -1), tokens(3, 4)], dim=1)
        kept.batch_repeat_interleave(3)
        assert torch.equal(generate(model, rows, past_key_values=kept), generate(model, rows, use_cache=False))
        kept.batch_select_indices(torch.tensor([2, 0]))
        assert {layer.keys.shape[0] for layer in kept.layers} == {2}


@bases
@pytest.mark.compat("Caches", "as the assistant of another model, attached or detached")
def test_assistant_drafts_equal_uncached_output(name, monkeypatch):
    """The target would hide a wrong draft by refusing it: each draft is compared with the assistant's own greedy run."""
    target, ids = base_of(name, seed=7), tokens(1)
    for assistant in (model_of(name), model_of(name).detached()):
        assistant.generation_config.eos_token_id = None
        drafts, plain = [], assistant.generate

        def spy(plain=plain, drafts=drafts, **options):
            drafts.append((options, plain(**options)))
            return drafts[-1][1]

        monkeypatch.setattr(assistant, "generate", spy)
        found = generate(target, ids, assistant_model=assistant)
        monkeypatch.undo()
        assert torch.equal(found, generate(target, ids, use_cache=False))
        assert len(drafts) > 3
        for options, drafted in drafts:
            given, length = options["input_ids"], drafted.sequences.shape[1]
            alone = generate(assistant, given, max_new_tokens=length - given.shape[1], use_cache=False)
            assert torch.equal(drafted.sequences, alone)


# -- what must raise -----------------------------------------------------------------------------------------------


def foreign(base) -> dict[str, Any]:
    """Caches that were built for the base alone."""
    config = base.config
    built = {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=40),
        "encoder_decoder": EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        "tuple": tuple((torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)) for _ in range(LAYERS)),
        **(
            {} if config.model_type in SLIDING else {b: QuantizedCache(config=config, **o) for b, o in BACKENDS.items()}
        ),
    }
    return built


@bases
def test_base_cache_is_refused(name):
    model = model_of(name)
    for kind, cache in foreign(model.base).items():
        with pytest.raises(umbra.StateError, match=r"has \d layers, base and shadow need 5"):
            model(tokens(), past_key_values=cache)
        if kind not in ("tuple", "encoder_decoder"):
            with pytest.raises(umbra.StateError, match="from this model's config"):
                generate(model, tokens(), past_key_values=cache)


@bases
@pytest.mark.parametrize("cache", KEPT)
@torch.no_grad()
def test_cache_filled_by_only_one_stream_is_refused(name, cache):
    """Base and shadow would attend to different tokens, at different positions."""
    model, build = model_of(name), lambda: CACHES[cache](model_of(name))["past_key_values"]
    bare, pair, broken = build(), build(), build()
    with model.disable_adapter():
        model(tokens(), past_key_values=bare)
    with pytest.raises(umbra.StateError, match="filled by the bare base"):
        model(tokens(), past_key_values=bare)
    with model.disable_adapter():
        model(tokens(), past_key_values=bare)

    model(tokens(), past_key_values=pair)
    with model.disable_adapter(), pytest.raises(umbra.StateError, match="with the adapter enabled"):
        model(tokens(), past_key_values=pair)
    model(tokens(), past_key_values=pair)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.shadow.backbone.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), past_key_values=broken)
    handle.remove()
    with pytest.raises(umbra.StateError, match="interrupted"):
        model(tokens(), past_key_values=broken)


@pytest.mark.parametrize(
    "form", [{"shadow_num_key_value_heads": 1}, {"shadow_hidden_size": 16, "shadow_head_dim": 4}], ids=str
)
@pytest.mark.parametrize("cache", ["static", "own_static"])
def test_static_cache_chunks_with_other_head_count(form, cache):
    """For chunks transformers makes all layers of its static cache at once, in one shape and dtype."""
    model = make("llama", **form)
    expected = generate(model, tokens(), use_cache=False)
    assert torch.equal(generate(model, tokens(), prefill_chunk_size=4, **CACHES[cache](model)), expected)
    model.shadow.double()
    assert torch.equal(generate(model, tokens(), prefill_chunk_size=4, **CACHES[cache](model)), expected)


def test_early_exit_is_refused():
    with pytest.raises(umbra.BaseModelError, match="blocks that the shadow corrects"):
        generate(model_of("llama"), tokens(1), assistant_early_exit=2)


@torch.no_grad()
def test_preallocated_static_cache_is_accepted():
    """Prefilled in chunks, all its layers exist from the beginning, those of shadows without a part too."""
    model, ids = make(), tokens()
    static = {"cache_implementation": "static", "max_cache_len": 64, "prefill_chunk_size": 4, "max_new_tokens": 3}
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **static), model.generate(ids, max_new_tokens=3))
    model.add_adapter(umbra.ShadowConfig(rank=4), "second")
    out = model.generate(ids, return_dict_in_generate=True, **static)
    model.set_adapter("second")
    with pytest.raises(umbra.StateError, match="other tokens for the base than for the shadow"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=3)
