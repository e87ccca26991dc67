"""Whatever interrupts a generation: the cache that the user holds goes on as no cache would, or its next use is refused."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria

import umbra
from support.drafts import ALWAYS, close_draft, plain
from support.families import build, cast
from support.tiny import tokens
from umbra.base import architectures

IDS = tokens(1)


class Stop(Exception):
    """What interrupts."""


class Streamer:
    """Raises when it is given the token number ``at``, which it has noted; the prompt is number 0."""

    def __init__(self, at: int | None = None):
        self.seen, self.left = [], at

    def put(self, value):
        self.seen += value.reshape(-1).tolist()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    def end(self):
        pass


class Counted:
    def __init__(self, at: int):
        self.left = at

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return self.value(*args, **options)


class Processor(Counted, LogitsProcessor):
    def value(self, ids, scores):
        return scores


class Criterion(Counted, StoppingCriteria):
    def value(self, ids, scores, **_):
        return torch.zeros(len(ids), dtype=torch.bool)


class Hook(Counted):
    def value(self, *_):
        return None


WAYS = ["streamer", "processor", "criterion", "block", "shadow"]


def interrupted(model, cache, way: str, at: int, **options) -> torch.Tensor:
    """The prompt and what was put out until something raised."""
    streamer, handle = Streamer(at if way == "streamer" else None), None
    if "num_beams" not in options:
        options["streamer"] = streamer
    if way == "processor":
        options["logits_processor"] = [Processor(at)]
    elif way == "criterion":
        options["stopping_criteria"] = [Criterion(at)]
    elif way == "block":
        handle = architectures.locate(model.base).blocks[2].register_forward_hook(Hook(at))
    elif way == "shadow":
        handle = model.shadow.backbone.register_forward_hook(Hook(at))
    with pytest.raises((Stop, KeyboardInterrupt)):
        plain(model, IDS, past_key_values=cache, **options)
    if handle is not None:
        handle.remove()
    return torch.tensor([streamer.seen or IDS[0].tolist()])


def goes_on(model, cache, text: torch.Tensor) -> bool:
    """Whether the cache was taken; then the text is that of no cache."""
    text = torch.cat([text, IDS[:, :3]], 1) if text.shape[1] == IDS.shape[1] else text
    try:
        found = plain(model, text, past_key_values=cache, max_new_tokens=6)
    except umbra.StateError:
        return False
    assert torch.equal(found, plain(model, text, max_new_tokens=6, use_cache=False))
    return True


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}
TIMES = {"block": (0, 1, 3), "shadow": (0, 1, 9)}  # which calls are interrupted, the first being number 0
FORMS = [("llama", "dynamic"), ("llama", "static"), ("gemma3_text", "dynamic"), ("gpt2", "dynamic")]


@pytest.mark.parametrize("draft", [None, 5], ids=["plain", "drafted"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "cache"), FORMS)
def test_interrupted_cache_continues_or_is_refused(name, cache, way, draft):
    model, taken = close_draft(name, shadow_num_hidden_layers=2), []
    for at in TIMES.get(way, (0, 1, 6, 13)):
        held = CACHES[cache](model)
        text = interrupted(model, held, way, at, **({} if draft is None else {"draft": draft, **ALWAYS}))
        taken.append(goes_on(model, held, text))
    if way in TIMES:
        assert not any(taken), "within a forward it is not whole"
        held.reset()
        assert goes_on(model, held, IDS[:, :5])
    elif name != "gemma3_text":
        assert all(taken), "between two forwards it is whole"


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_short_convolutions_continue_or_are_refused(way):
    """Which a draft can be taken out of, and whose layers do not count tokens."""
    model = cast(build("lfm2"))
    for draft in (None, 3):
        for at in (0, 1):
            held = DynamicCache(config=model.config)
            options = {"max_new_tokens": 8, "eos_token_id": None}
            text = interrupted(model, held, way, at, **options, **({} if draft is None else {"draft": draft, **ALWAYS}))
            assert goes_on(model, held, text) or way != "streamer"


OTHERS = {
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True},
}


@pytest.mark.parametrize("way", ["streamer", "processor", "criterion"])
@pytest.mark.parametrize("mode", OTHERS)
def test_interrupted_other_searches_continue_or_are_refused(mode, way):
    model = close_draft()
    options = {"assistant_model": model.detached()} if mode == "assisted" else OTHERS[mode]
    for at in (1, 2) if way != "streamer" or mode != "beams" else ():
        held = DynamicCache(config=model.config)
        text = interrupted(model, held, way, at, **options)
        assert goes_on(model, held, text) is (mode == "sampling")


def test_interrupted_cache_is_detected_by_other_adapter_and_base():
    model = close_draft()
    model.add_adapter(umbra.ShadowConfig(rank=2), "second")
    held = DynamicCache(config=model.config)
    interrupted(model, held, "block", 1)
    for context in (nullcontext, model.disable_adapter):
        with context(), pytest.raises(umbra.StateError, match="fresh cache"):
            model(IDS, past_key_values=held)
        with context(), pytest.raises(umbra.StateError, match="fresh cache"):
            plain(model, torch.cat([IDS, IDS], 1), past_key_values=held)
    held = DynamicCache(config=model.base.config)
    with model.disable_adapter():
        interrupted(model, held, "block", 1)
        with pytest.raises(umbra.StateError, match="interrupted"):
            model(IDS, past_key_values=held)


@pytest.mark.parametrize("length", [5, 9, 12])
def test_cached_text_continues_from_last_token(length):
    """transformers would feed the whole text again, behind what the cache holds."""
    model, text = close_draft(), tokens(1, 9)
    held = model(text, use_cache=True).past_key_values
    shorter = tokens(1, 12)[:, :length] if length > 9 else text[:, :length]
    if length < 9:
        with pytest.raises(umbra.StateError, match=r"holds 9 tokens.*the input has 5"):
            plain(model, shorter, past_key_values=held)
        return
    longer = torch.cat([text, tokens(1, 3, seed=7)], 1)[:, :length]
    assert torch.equal(plain(model, longer, past_key_values=held), plain(model, longer, use_cache=False))


def test_keyboard_interrupt_leaves_no_rejected_tokens():
    """The case that was reported."""
    model, streamer = close_draft(shadow_num_hidden_layers=2), Streamer(3)
    held, options = DynamicCache(config=model.config), {"max_new_tokens": 14}
    with pytest.raises(KeyboardInterrupt):
        plain(model, IDS, draft=6, streamer=streamer, past_key_values=held, **ALWAYS, **options)
    text = torch.cat([torch.tensor([streamer.seen]), IDS], 1)
    assert torch.equal(plain(model, text, past_key_values=held, **options), plain(model, text, **options))
