"""Drafting: the text is that of decoding without drafts, token for token; the base runs less often."""

import itertools
import threading
from collections import Counter

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModel, LogitsProcessor, StoppingCriteria

import umbra
from support.architectures_hybrid import FAMILIES as HYBRIDS
from support.architectures_vision import SPECIAL, batch_of
from support.architectures_vision import build as build_vision
from support.drafts import NEW, assert_some_of_both, close_draft, drafted, each_architecture, plain
from support.families import MASK, PADDED, build, cast
from support.tables import FAMILIES
from support.tiny import CONFIGS, LAYERS, VOCAB, tokens
from support.tokenizer import make_tokenizer
from umbra.method.hooks import open_contexts


@pytest.fixture(autouse=True)
def no_frame_stays_open():
    yield
    assert open_contexts() == []


# -- greedy: the same tokens ---------------------------------------------------------------------------------------


@each_architecture
@pytest.mark.compat("Drafting", "greedy: the tokens of decoding without drafts")
def test_greedy_drafting_equals_plain_decoding(name):
    model, ids = close_draft(name), tokens(1)
    expected = plain(model, ids)
    found = {k: drafted(model, ids, k) for k in (1, 2, 3, 5, 8)}
    found["auto"] = drafted(model, ids, "auto", assistant_confidence_threshold=None)
    for out in found.values():
        assert torch.equal(out.sequences, expected)
        assert out.acceptance_length == (NEW - 1) / out.verified
        assert out.accepted <= out.drafted
    assert_some_of_both(*found.values())
    assert min(out.verified for out in found.values()) < NEW - 1


@each_architecture
@pytest.mark.compat("Drafting", "batches with left padding, some rows finished before others")
def test_left_padded_rows_equal_plain_decoding(name):
    model, ids, pads = close_draft(name), tokens(3, 12), (0, 4, 9)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    out = drafted(model, ids, 3, attention_mask=mask)
    assert torch.equal(out.sequences, plain(model, ids, attention_mask=mask))
    assert out.drafted > out.accepted


FORMS = {
    "three layers": {"shadow_num_hidden_layers": 3},
    "dense": {"shadow": "dense"},
    "narrow": {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1},
    "own embeddings": {"embeddings": "own"},
    "peft": {"dialect": "peft"},
    "upper blocks": {"layers": (2, 3)},
    "measured channels": {"input_scale": "measured"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_other_shadow_forms_equal_plain_decoding(name, form):
    model, ids = close_draft(name, **FORMS[form]), tokens(2)
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


@pytest.mark.parametrize(("name", "form"), [("gpt2", "llama"), ("llama", "mistral"), ("mistral", "gemma3_text")])
def test_other_pretrained_shadows_equal_plain_decoding(name, form, tmp_path):
    """With embeddings and a window of their own."""
    window = {} if form == "llama" else {"sliding_window": 10}
    small = {**CONFIGS[form], **window, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    AutoModel.from_config(AutoConfig.for_model(form, **small)).save_pretrained(tmp_path)
    model, ids = close_draft(name, shadow=str(tmp_path)), tokens(2)
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


def test_trained_heads_draft_and_verify():
    model, ids = close_draft(train_heads=True), tokens(1)
    expected = plain(model, ids)
    with torch.no_grad():
        model.shadow.heads["shadow"].weight.copy_(model.shadow.heads["attached"].weight)
    alike = drafted(model, ids)
    with torch.no_grad():
        model.shadow.heads["shadow"].weight.neg_()
    opposite = drafted(model, ids)
    assert torch.equal(alike.sequences, expected)
    assert torch.equal(opposite.sequences, expected)
    assert opposite.accepted == 0 < alike.accepted


@torch.no_grad()
def test_bf16_base_drafts():
    """The same tokens, or another one of two between which bf16 cannot tell."""
    model, ids = close_draft(), tokens(1)
    model.base.bfloat16()
    expected, out = plain(model, ids)[0], drafted(model, ids)
    found = out.sequences[0]
    assert out.accepted > 0
    differing = (found != expected).nonzero()
    if len(differing):
        at = int(differing[0])
        one, other = model(found[None, :at]).logits[0, -1, [found[at], expected[at]]].tolist()
        assert abs(one - other) <= 2**-6 * abs(one)


def test_active_adapter_drafts():
    model, ids = close_draft(), tokens(2)
    model.add_adapter(umbra.ShadowConfig(rank=2, shadow_num_hidden_layers=2), "second")
    model.set_adapter("second")
    model.eval()
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))
    model.set_adapter("default")
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


def test_inputs_embeds_equal_plain_decoding():
    model, ids = close_draft(), tokens(2)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(
        drafted(model, None, inputs_embeds=embedded).sequences, plain(model, None, inputs_embeds=embedded)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.compat("Drafting", "static caches and chunked prefill")
def test_other_caches_equal_plain_decoding(name, options):
    model, ids = close_draft(name), tokens(2)
    assert torch.equal(drafted(model, ids, **options).sequences, plain(model, ids))


RECURRENT = set(HYBRIDS) - {"lfm2", "lfm2_moe", "lfm3", "gemma3n_text", "gemma4_text"}
REFUSING = RECURRENT | {
    "qwen3_5_moe_text",
    "inkling_text",
    "inkling2_text",
    "mpt",
    "openai-gpt",
}  # without a cache, or by default


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.compat("Drafting", "every family of docs/reference/architectures.md: right, or refused with a reason")
def test_every_family_is_exact_or_refused(name):
    """Short convolutions and shared keys can be rolled back, a recurrence cannot."""
    model, ids, mask = cast(build(name)), PADDED, MASK
    options = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None}
    if name in REFUSING:
        with pytest.raises((umbra.BaseModelError, umbra.ConfigError), match="draft"):
            drafted(model, ids, 3, **options)
        return
    assert torch.equal(drafted(model, ids, 3, **options).sequences, plain(model, ids, **options))


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "paligemma", "llava", "lfm2_vl"])
@pytest.mark.compat("Drafting", "after an image")
def test_drafting_after_image_equals_plain_decoding(name):
    model, batch = cast(build_vision(name)), batch_of(name, 4)
    options = {**batch.told, "eos_token_id": None, "suppress_tokens": SPECIAL, "max_new_tokens": 8}
    assert torch.equal(drafted(model, batch.ids, 3, **options).sequences, plain(model, batch.ids, **options))


# -- where it stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_end_of_text_stops_at_any_position(rows):
    """Every token that the rows say ends them once, two at a time."""
    model, ids = close_draft(), tokens(rows)
    said = sorted({int(t) for t in plain(model, ids)[:, 9:].flatten()} - {0})
    lengths = set()
    for first, second in zip(said, said[1:] + said[:1], strict=True):
        expected = plain(model, ids, eos_token_id=[first, second])
        out = drafted(model, ids, eos_token_id=[first, second])
        assert torch.equal(out.sequences, expected)
        lengths.add(expected.shape[1])
    assert len(lengths) > 2


@pytest.mark.parametrize("new", range(1, 12))
@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_length_limit_stops_at_any_position(new):
    model, ids = close_draft(), tokens(1)
    expected = plain(model, ids, max_new_tokens=new)
    out = drafted(model, ids, max_new_tokens=new)
    assert torch.equal(out.sequences, expected)
    assert expected.shape[1] == 9 + new
    assert torch.equal(drafted(model, ids, 8, max_new_tokens=None, max_length=9 + new).sequences, expected)
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {9 + new - 1}


@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_time_limit_stops_generation():
    model, ids = close_draft(), tokens(2)
    assert drafted(model, ids, max_time=1e-9).sequences.shape == (2, 10)


@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_stop_strings_equal_plain_decoding():
    model, ids, tokenizer = close_draft(), tokens(1), make_tokenizer()
    options = {"tokenizer": tokenizer, "suppress_tokens": [*range(4), *range(len(tokenizer), VOCAB)]}
    whole = plain(model, ids, **options)
    for at in range(9, 9 + NEW - 2):
        stop = tokenizer.decode(whole[0, at : at + 2])
        expected = plain(model, ids, stop_strings=[stop], **options)
        assert torch.equal(drafted(model, ids, stop_strings=[stop], **options).sequences, expected)
    assert expected.shape[1] < whole.shape[1] or stop


class EndsWith(StoppingCriteria):
    """Ends a row after a token that is a multiple of 5, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **_):
        self.asked.append(input_ids.tolist())
        return input_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("eos", [None, 98])
@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_custom_stopping_criteria_see_same_inputs(eos):
    """Without an end-of-text token a row that has finished goes on until all have, with it it is padded."""
    model, ids = close_draft(), tokens(3)
    without, with_drafts = EndsWith(), EndsWith()
    expected = plain(model, ids, stopping_criteria=[without], eos_token_id=eos)
    out = drafted(model, ids, stopping_criteria=[with_drafts], eos_token_id=eos)
    assert torch.equal(out.sequences, expected)
    assert with_drafts.asked == without.asked


# -- processors, streams, outputs ----------------------------------------------------------------------------------

PROCESSORS = {
    "penalty": {"repetition_penalty": 1.5},
    "ngrams": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(3, 40))},
    "bad words": {"bad_words_ids": [[7, 8], *([token] for token in range(50, 95))]},
    "minimum": {"eos_token_id": list(range(3, 60)), "min_new_tokens": 7},
    "prefix": {"prefix_allowed_tokens_fn": lambda _, ids: [3 + (int(ids[-1]) * k) % 90 for k in (1, 2, 3)]},
}


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("form", PROCESSORS)
@pytest.mark.compat("Drafting", "logits processors, transformers' and one's own")
def test_logits_processors_equal_plain_decoding(form, trimmed):
    model, ids = close_draft(), tokens(2)
    model.set_draft_vocabulary(range(2, 70) if trimmed else None)
    expected = plain(model, ids, **PROCESSORS[form])
    assert not torch.equal(expected, plain(model, ids))
    out = drafted(model, ids, **PROCESSORS[form])
    assert torch.equal(out.sequences, expected)


class Remembering(LogitsProcessor):
    """Forbids the tokens that it chose in the last three calls, and notes what it was asked."""

    def __init__(self):
        self.asked, self.before = [], []

    def __call__(self, input_ids, scores):
        self.asked.append(input_ids.tolist())
        for token in self.before[-3:]:
            scores[:, token] = -torch.inf
        self.before.append(int(scores[0].argmax()))
        return scores


@pytest.mark.compat("Drafting", "logits processors, transformers' and one's own")
def test_stateful_processor_sees_accepted_text_only():
    model, ids = close_draft(), tokens(1)
    without, with_drafts = Remembering(), Remembering()
    expected = plain(model, ids, logits_processor=[without])
    assert torch.equal(drafted(model, ids, logits_processor=[with_drafts]).sequences, expected)
    assert with_drafts.asked == without.asked


class Streamer:
    def __init__(self):
        self.put_so_far, self.has_ended = [], False

    def put(self, value):
        assert not self.has_ended
        self.put_so_far.append(value.tolist())

    def end(self):
        self.has_ended = True


@pytest.mark.compat("Drafting", "streaming")
def test_streamer_receives_accepted_tokens_in_order():
    model, ids = close_draft(), tokens(1)
    without, with_drafts = Streamer(), Streamer()
    plain(model, ids, streamer=without)
    assert_some_of_both(drafted(model, ids, streamer=with_drafts))
    assert with_drafts.put_so_far == without.put_so_far
    assert len(without.put_so_far) == NEW + 1
    assert with_drafts.has_ended


def test_scores_and_logits_equal_plain_decoding():
    """Also of a row that has finished, which reads padding from there on."""
    model, ids = close_draft(), tokens(2)
    end = plain(model, ids, repetition_penalty=1.5)[0, 9 + 3]
    options = {
        "output_scores": True, "output_logits": True, "repetition_penalty": 1.5, "return_dict_in_generate": True,
        "eos_token_id": int(end),
    }  # fmt: skip
    expected, out = plain(model, ids, **options), drafted(model, ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.sequences[0, -1] == 0, "padding"
    for kind in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(out[kind]), torch.stack(expected[kind]), rtol=1e-4, atol=1e-4)
    for found, layer in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(found.keys, layer.keys, rtol=1e-4, atol=1e-4)


def test_classifier_free_guidance_equals_plain_decoding():
    """A processor of transformers that runs the model itself, with a cache of its own."""
    model, ids = close_draft(), tokens(1)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": tokens(1, 5, seed=9)}
    expected = plain(model, ids, **options)
    assert not torch.equal(expected, plain(model, ids))
    assert torch.equal(drafted(model, ids, **options).sequences, expected)


@each_architecture
def test_returned_cache_equals_plain_decoding_and_continues(name):
    model, ids = close_draft(name), tokens(2)
    expected = plain(model, ids, max_new_tokens=12, return_dict_in_generate=True)
    out = drafted(model, ids, max_new_tokens=12)
    assert len(out.past_key_values.layers) == LAYERS + 1
    for found, layer in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert found.get_seq_length() == layer.get_seq_length() == 9 + 12 - 1
        for one, other in ((found.keys, layer.keys), (found.values, layer.values)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not vars(found).get("record_past"), "it would grow beyond its window in decoding without drafts"
    whole = plain(model, ids, max_new_tokens=12 + NEW)
    further = drafted(model, out.sequences, max_new_tokens=NEW // 2, past_key_values=out.past_key_values)
    further = plain(model, further.sequences, max_new_tokens=NEW // 2, past_key_values=further.past_key_values)
    assert torch.equal(further, whole)


def test_without_return_dict_tokens_are_returned():
    model, ids = close_draft(), tokens(2)
    assert torch.equal(drafted(model, ids, return_dict_in_generate=False), plain(model, ids))


# -- what runs how often -------------------------------------------------------------------------------------------


def test_each_cycle_runs_base_once_and_reuses_accepted_states():
    model, ids, states, forwards = close_draft(), tokens(1), Counter(), []

    def note(shadow, args, told):
        states.update(zip(told["position_ids"][0].tolist(), args[0][0].tolist(), strict=True))

    handles = [
        model.shadow.register_forward_pre_hook(note, with_kwargs=True),
        model.base.model.register_forward_pre_hook(lambda *_: forwards.append(1)),
    ]
    out = drafted(model, ids, 4)
    for handle in handles:
        handle.remove()
    assert_some_of_both(out)
    text = out.sequences[0].tolist()
    assert [states[place, token] for place, token in enumerate(text[:-1])] == [1] * (len(text) - 1)
    assert len(forwards) == 1 + out.verified
    assert sum(states.values()) == len(ids[0]) + out.drafted + out.verified


def test_drafting_leaves_no_state_on_model():
    model, ids = close_draft(), tokens(1)
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    drafted(model, ids)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before


def test_two_threads_draft_concurrently():
    model, prompts = close_draft(), [tokens(1, 6, seed=1), tokens(2, 9, seed=2)]
    expected, found = [plain(model, ids) for ids in prompts], [None, None]

    def work(place):
        found[place] = [drafted(model, prompts[place]).sequences for _ in range(3)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, each in zip(expected, found, strict=True):
        assert all(torch.equal(one, other) for other in each)


def test_seeded_text_is_independent_of_timing(monkeypatch):
    """What is drafted is drawn: how far to draft must not depend on measured seconds."""
    model, ids, clock = close_draft(), tokens(2, 6), itertools.count()

    def sampled(pace):
        monkeypatch.setattr(umbra.generation.speculative.time, "perf_counter", lambda: float(next(clock)) ** pace)
        torch.manual_seed(3)
        return drafted(model, ids, draft="auto", do_sample=True, temperature=2.0, max_new_tokens=24).sequences

    assert torch.equal(sampled(1.0), sampled(2.5))


@pytest.mark.parametrize("tokens_kept", [None, [5, 6, 7, 9, 11, 40]])
def test_offloaded_base_drafts(tokens_kept):
    """Its head has no weights between calls."""
    model, ids = close_draft(), tokens(1, 6)
    if tokens_kept is not None:
        model.set_draft_vocabulary(tokens_kept)
    expected = plain(model, ids)
    accelerate.cpu_offload(model.base, execution_device=torch.device("cpu"))
    assert model.base.get_input_embeddings().weight.is_meta
    assert torch.equal(drafted(model, ids).sequences, expected)
    with pytest.raises(umbra.DetachError, match="offloaded"):
        model.detached()


# -- what cannot be ------------------------------------------------------------------------------------------------

REFUSED = {
    "zero": (umbra.ConfigError, {"draft": 0}),
    "negative": (umbra.ConfigError, {"draft": -2}),
    "text": (umbra.ConfigError, {"draft": "many"}),
    "fraction": (umbra.ConfigError, {"draft": 2.5}),
    "boolean": (umbra.ConfigError, {"draft": True}),
    "beams": (umbra.ConfigError, {"num_beams": 2}),
    "lookup": (umbra.ConfigError, {"prompt_lookup_num_tokens": 3}),
    "no cache": (umbra.ConfigError, {"use_cache": False}),
    "hidden states": (umbra.ConfigError, {"output_hidden_states": True}),
    "attentions": (umbra.ConfigError, {"output_attentions": True}),
    "another recipe": (umbra.ConfigError, {"custom_generate": lambda **_: None}),
    "paged cache": (umbra.ConfigError, {"cache_implementation": "paged"}),
    "ranks in step": (umbra.ConfigError, {"synced_gpus": True}),
    "adapters by row": (umbra.ConfigError, {"adapter_names": ["default"]}),
}


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.compat(
    "Drafting",
    "refused before any work: beams and other searches, hidden states, `adapter_names`, paged caches",
)
def test_unsupported_drafting_options_are_refused_early(form):
    error, options = REFUSED[form]
    model, forwards = close_draft(), []
    model.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match="draft"):
        drafted(model, tokens(1), **options)
    assert not forwards


def test_assistant_model_with_draft_is_refused():
    model = close_draft()
    with pytest.raises(umbra.ConfigError, match="draft"):
        drafted(model, tokens(1), assistant_model=model.detached())


def test_drafting_needs_both_shadow_and_base():
    model = close_draft()
    for context in (model.disable_adapter, model.shadow_only):
        with context(), pytest.raises(umbra.StateError, match="draft"):
            drafted(model, tokens(1))


def test_continuous_batching_refuses_drafting():
    with pytest.raises(umbra.ConfigError, match="draft"):
        close_draft().generate_batch([[5, 6, 7]], draft=2)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_static_cache_with_windows_is_refused(name):
    with pytest.raises(umbra.BaseModelError, match="draft"):
        drafted(close_draft(name), tokens(1), cache_implementation="static")


def test_prefix_allowed_tokens_fn_sees_accepted_text_only():
    """One that knows nothing after the end, and is asked about each text once."""
    model, ids = close_draft("llama"), tokens(1)
    end, told = 2, {"eos_token_id": 2, "max_new_tokens": 10, "do_sample": False}
    answer, seen = [10, 11, 12, end], []

    def allowed(_, text):
        seen.append(text.tolist())
        return answer[len(text) - ids.shape[1] :][:1]

    expected, plain_seen = model.generate(ids, prefix_allowed_tokens_fn=allowed, **told), list(seen)
    seen.clear()
    found = model.generate(ids, prefix_allowed_tokens_fn=allowed, draft=8, assistant_confidence_threshold=0.0, **told)
    assert torch.equal(found, expected) and seen == plain_seen
