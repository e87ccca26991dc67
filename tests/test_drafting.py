"""Drafting: the text is that of decoding without drafts, token for token or in distribution; the base runs less often."""

import json
import threading
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModel, LogitsProcessor, StoppingCriteria, TrainingArguments

import test_vision
import umbra
from architectures_hybrid import FAMILIES as HYBRIDS
from architectures_vision import batch_of
from conftest import make_tokenizer
from tables import FAMILIES
from test_architectures import MASK, PADDED, build, cast
from tiny import ARCHITECTURES, CONFIGS, LAYERS, VOCAB, make, tokens
from umbra import anatomy, drafting, speculation
from umbra.checkpoint import read_config
from umbra.hooks import _frames
from umbra.speculation import Drafted, Pace

NEW = 20  # with a prompt of 9, well past the sliding windows of 6
ALWAYS = {"assistant_confidence_threshold": 0.0}  # however unsure: a tiny random model is never sure of anything
OUTPUT = ("o_proj", "down_proj", "c_proj", "dense")  # what blocks add to the hidden state
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def no_frame_stays_open():
    yield
    assert _frames.stack == []


def agreeing(name: str = "llama", base_options: dict | None = None, **fields):
    """A model whose shadow guesses right sometimes: what follows depends on the last token more than on all before."""
    model = make(name, alpha=0.05, base_options={"tie_word_embeddings": False, **(base_options or {})}, **fields)
    decoder = dict(anatomy.locate(model.base).decoder.named_parameters())
    with torch.no_grad():
        for part in (model.base, model.shadow.backbone):
            for key, p in part.named_parameters():
                p.mul_(0.1 if any(name in key for name in OUTPUT) else 1)
        for key, p in model.shadow.backbone.named_parameters():
            if key in decoder and p.shape == decoder[key].shape and not any(c.isdigit() for c in key):
                p.copy_(decoder[key])  # the last norm
        model.get_input_embeddings().weight.mul_(8)
    model.generation_config.eos_token_id = None
    return model


def plain(model, ids, **options):
    if ids is not None:  # whose mask transformers would guess, and a random model may say a padding token
        options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def drafted(model, ids, draft=4, **options):
    return plain(model, ids, draft=draft, **{"return_dict_in_generate": True, **ALWAYS, **options})


def assert_some_of_both(*outputs) -> None:
    """Drafts were accepted and drafts were rejected: otherwise little was tested."""
    assert 0 < sum(out.accepted for out in outputs) < sum(out.drafted for out in outputs)


# -- greedy: the same tokens ---------------------------------------------------------------------------------------


@architectures
@pytest.mark.compat("Drafting", "greedy: the tokens of decoding without drafts")
def test_greedy_is_decoding_without_drafts(name):
    model, ids = agreeing(name), tokens(1)
    expected = plain(model, ids)
    found = {k: drafted(model, ids, k) for k in (1, 2, 3, 5, 8)}
    found["auto"] = drafted(model, ids, "auto", assistant_confidence_threshold=None)
    for out in found.values():
        assert torch.equal(out.sequences, expected)
        assert out.acceptance_length == (NEW - 1) / out.verified
        assert out.accepted <= out.drafted
    assert_some_of_both(*found.values())
    assert min(out.verified for out in found.values()) < NEW - 1


@architectures
@pytest.mark.compat("Drafting", "batches with left padding, some rows finished before others")
def test_left_padded_rows(name):
    model, ids, pads = agreeing(name), tokens(3, 12), (0, 4, 9)
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
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_other_shadows(name, form):
    model, ids = agreeing(name, **FORMS[form]), tokens(2)
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


@pytest.mark.parametrize(("name", "form"), [("gpt2", "llama"), ("llama", "mistral"), ("mistral", "gemma3_text")])
def test_pretrained_shadows_of_another_kind(name, form, tmp_path):
    """With embeddings and a window of their own."""
    window = {} if form == "llama" else {"sliding_window": 10}
    small = {**CONFIGS[form], **window, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    AutoModel.from_config(AutoConfig.for_model(form, **small)).save_pretrained(tmp_path)
    model, ids = agreeing(name, shadow=str(tmp_path)), tokens(2)
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


def test_trained_heads_draft_and_verify():
    model, ids = agreeing(train_heads=True), tokens(1)
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
def test_a_bf16_base():
    """The same tokens, or another one of two between which bf16 cannot tell."""
    model, ids = agreeing(), tokens(1)
    model.base.bfloat16()
    expected, out = plain(model, ids)[0], drafted(model, ids)
    found = out.sequences[0]
    assert out.accepted > 0
    differing = (found != expected).nonzero()
    if len(differing):
        at = int(differing[0])
        one, other = model(found[None, :at]).logits[0, -1, [found[at], expected[at]]].tolist()
        assert abs(one - other) <= 2**-6 * abs(one)


def test_of_several_adapters_the_active_one_drafts():
    model, ids = agreeing(), tokens(2)
    model.add_adapter(umbra.ShadowConfig(rank=2, shadow_num_hidden_layers=2), "second")
    model.set_adapter("second")
    model.eval()
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))
    model.set_adapter("default")
    assert torch.equal(drafted(model, ids).sequences, plain(model, ids))


def test_inputs_embeds():
    model, ids = agreeing(), tokens(2)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(
        drafted(model, None, inputs_embeds=embedded).sequences, plain(model, None, inputs_embeds=embedded)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.compat("Drafting", "static caches and chunked prefill")
def test_other_caches(name, options):
    model, ids = agreeing(name), tokens(2)
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
@pytest.mark.compat("Drafting", "every family of docs/architectures.md: right, or refused with a reason")
def test_every_family_is_right_or_refused(name):
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
def test_after_an_image(name):
    model, batch = test_vision.cast(test_vision.build(name)), batch_of(name, 4)
    options = {**batch.told, "eos_token_id": None, "suppress_tokens": test_vision.SPECIAL, "max_new_tokens": 8}
    assert torch.equal(drafted(model, batch.ids, 3, **options).sequences, plain(model, batch.ids, **options))


# -- where it stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_end_of_text_wherever_it_falls(rows):
    """Every token that the rows say ends them once, two at a time."""
    model, ids = agreeing(), tokens(rows)
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
def test_the_last_token_wherever_it_falls(new):
    model, ids = agreeing(), tokens(1)
    expected = plain(model, ids, max_new_tokens=new)
    out = drafted(model, ids, max_new_tokens=new)
    assert torch.equal(out.sequences, expected)
    assert expected.shape[1] == 9 + new
    assert torch.equal(drafted(model, ids, 8, max_new_tokens=None, max_length=9 + new).sequences, expected)
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {9 + new - 1}


@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_the_time_is_up():
    model, ids = agreeing(), tokens(2)
    assert drafted(model, ids, max_time=1e-9).sequences.shape == (2, 10)


@pytest.mark.compat(
    "Drafting", "end of text, `max_new_tokens`, `max_time`, stop strings and criteria, wherever they fall"
)
def test_stop_strings():
    model, ids, tokenizer = agreeing(), tokens(1), make_tokenizer()
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
def test_criteria_of_ones_own_are_asked_as_without_drafts(eos):
    """Without an end-of-text token a row that has finished goes on until all have, with it it is padded."""
    model, ids = agreeing(), tokens(3)
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
def test_processors(form, trimmed):
    model, ids = agreeing(), tokens(2)
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
def test_a_processor_that_remembers_sees_the_text_alone():
    model, ids = agreeing(), tokens(1)
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
def test_a_streamer_is_given_accepted_tokens_in_order():
    model, ids = agreeing(), tokens(1)
    without, with_drafts = Streamer(), Streamer()
    plain(model, ids, streamer=without)
    assert_some_of_both(drafted(model, ids, streamer=with_drafts))
    assert with_drafts.put_so_far == without.put_so_far
    assert len(without.put_so_far) == NEW + 1
    assert with_drafts.has_ended


def test_scores_and_logits_are_those_of_decoding_without_drafts():
    """Also of a row that has finished, which reads padding from there on."""
    model, ids = agreeing(), tokens(2)
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


def test_guidance_by_a_second_prompt():
    """A processor of transformers that runs the model itself, with a cache of its own."""
    model, ids = agreeing(), tokens(1)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": tokens(1, 5, seed=9)}
    expected = plain(model, ids, **options)
    assert not torch.equal(expected, plain(model, ids))
    assert torch.equal(drafted(model, ids, **options).sequences, expected)


@architectures
def test_the_cache_is_that_of_decoding_without_drafts_and_goes_on(name):
    model, ids = agreeing(name), tokens(2)
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


def test_without_a_dictionary_it_gives_the_tokens():
    model, ids = agreeing(), tokens(2)
    assert torch.equal(drafted(model, ids, return_dict_in_generate=False), plain(model, ids))


# -- what runs how often -------------------------------------------------------------------------------------------


def test_the_state_of_an_accepted_token_is_computed_once_and_the_base_runs_once_a_cycle():
    model, ids, states, forwards = agreeing(), tokens(1), Counter(), []

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


def test_nothing_of_it_stays_on_the_model():
    model, ids = agreeing(), tokens(1)
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    drafted(model, ids)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before


def test_two_threads_at_once():
    model, prompts = agreeing(), [tokens(1, 6, seed=1), tokens(2, 9, seed=2)]
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


# -- how far -------------------------------------------------------------------------------------------------------


def test_drafting_stops_where_a_token_is_not_worth_its_cost():
    pace = Pace(draft=0.05, extra=0.08)
    assert pace.goes_on([0.99])
    assert not pace.goes_on([0.1])
    pace.cycle(1, 2, 0.0, 0.0)
    assert pace.goes_on([0.6])
    assert not pace.goes_on([0.3]), "the odds of all tokens so far are multiplied"
    assert not Pace(draft=0.05, extra=0.08).goes_on([0.6, 0.6, 0.6]), "of a batch, every row must agree"
    assert not Pace(draft=0.5, extra=0.08).goes_on([0.8]), "what costs much must be likely"


def test_what_is_often_rejected_is_trusted_less_until_it_is_tried_again():
    pace = Pace(draft=0.05, extra=0.08)
    for _ in range(30):
        pace.learn([0.9], [False])
        pace.cycle(1, 1, 0.0, 0.0)
    assert not pace.goes_on([0.9])
    assert not pace.may_go_on(1), "not even the drafter's head needs to run"
    waited = 0
    while not pace.goes_on([0.9]):
        pace.cycle(0, 1, 0.0, 0.0)
        waited += 1
    assert 5 < waited < 200
    for _ in range(30):
        pace.learn([0.9], [True])
        pace.cycle(1, 2, 0.0, 0.0)
    assert pace.goes_on([0.5])


def test_costs_are_measured():
    pace = Pace(draft=0.05, extra=0.08, timed=True)
    for _ in range(30):
        pace.cycle(3, 4, 4 * 0.5, 1.24)
    assert pace.draft == pytest.approx(0.5)
    assert Pace(draft=0.05, extra=0.08).draft == 0.05


def test_a_threshold_in_place_of_costs():
    pace = Pace(draft=0.05, extra=0.08, threshold=0.4)
    assert pace.goes_on([0.5, 0.4])
    assert not pace.goes_on([0.5, 0.3])
    model, ids = agreeing(), tokens(1)
    expected = plain(model, ids)
    outputs = [drafted(model, ids, 8, assistant_confidence_threshold=t) for t in (0.0, 0.08, 0.2, 1.1)]
    counts = [out.drafted for out in outputs]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 0
    assert all(torch.equal(out.sequences, expected) for out in outputs)


# -- sampling: the same distribution -------------------------------------------------------------------------------

SMALL = {"vocab_size": 6}
SAMPLED = 3  # tokens, of which the first comes from the prompt's forward
SAMPLING = {
    "as it is": ({}, None),
    "warped": ({"temperature": 0.7, "top_k": 5, "top_p": 0.95}, None),
    "part of the vocabulary": ({"temperature": 1.3}, [0, 2, 5]),
    "penalised": ({"repetition_penalty": 1.4}, [0, 2, 3, 5]),
}


def small_model():
    model = agreeing(base_options=SMALL)
    with torch.no_grad():
        model.base.lm_head.weight.mul_(3)  # so that p and q are no uniform distributions
    return model


@torch.no_grad()
def joint(model, ids, **options) -> torch.Tensor:
    """(V ** SAMPLED,): the probability of every continuation, one token at a time, without a cache."""
    odds, texts = torch.ones(1), ids
    config = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": 1, "use_cache": False, **options}
    for _ in range(SAMPLED):
        out = plain(model, texts, **config, output_scores=True, return_dict_in_generate=True)
        p = out.scores[0].softmax(-1)
        odds = (odds[:, None] * p).flatten()
        nexts = torch.arange(p.shape[1]).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(p.shape[1], 0), nexts], 1)
    return odds


def surprise(found: torch.Tensor, odds: torch.Tensor) -> float:
    """χ² of counts against probabilities, in standard deviations from its mean; rare cells are put together."""
    expected = odds * found.sum()
    common = expected >= 5
    found = torch.cat([found[common], found[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = expected > 1e-9
    assert found[~keep].sum() == 0, "a continuation that cannot be"
    chi2, degrees = float(((found - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1
    return (chi2 - degrees) / (2 * degrees) ** 0.5


def sample(model, ids, rows: int, times: int, **options):
    """Counts of each continuation, and the outputs."""
    torch.manual_seed(0)
    outputs = [
        drafted(model, ids.expand(rows, -1), 2, max_new_tokens=SAMPLED, do_sample=True, **{"top_k": 0, **options})
        for _ in range(times)
    ]
    places = 6 ** torch.arange(SAMPLED - 1, -1, -1)
    said = torch.cat([out.sequences[:, -SAMPLED:] @ places for out in outputs])
    return torch.bincount(said, minlength=6**SAMPLED).float(), outputs


@pytest.mark.parametrize(("rows", "times"), [(4000, 1), (4, 250)], ids=["many rows", "few rows"])
@pytest.mark.parametrize("form", SAMPLING)
@pytest.mark.compat("Drafting", "sampling: the distribution of decoding without drafts (chi-squared tests)")
def test_sampling_has_the_distribution_of_decoding_without_drafts(form, rows, times):
    options, part = SAMPLING[form]
    model, ids = small_model(), torch.tensor([[3, 4, 2, 5, 1]])
    model.set_draft_vocabulary(part)
    counts, outputs = sample(model, ids, rows, times, **options)
    assert surprise(counts, joint(model, ids, **options)) < 4
    if times > 1:
        assert_some_of_both(*outputs)


def test_several_samples_of_one_prompt():
    out = drafted(small_model(), torch.tensor([[3, 4, 5]]), do_sample=True, num_return_sequences=5)
    assert out.sequences.shape == (5, 3 + NEW)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 5


def test_the_statistics_would_notice_another_rule(monkeypatch):
    model, ids = small_model(), torch.tensor([[3, 4, 2, 5, 1]])
    odds = joint(model, ids)

    def always(p, one: Drafted):
        return one.tokens, torch.ones(len(p), dtype=torch.bool)

    def without_the_rest(p, one: Drafted):
        accepted = (
            torch.rand(len(p)) * one.q.gather(1, one.tokens[:, None])[:, 0] < p.gather(1, one.tokens[:, None])[:, 0]
        )
        return torch.where(accepted, one.tokens, torch.multinomial(p, 1)[:, 0]), accepted

    for rule in (always, without_the_rest):
        monkeypatch.setattr(speculation, "accept", rule)
        assert surprise(sample(model, ids, 4000, 1)[0], odds) > 8


def test_accepting_gives_p_whatever_q_is():
    torch.manual_seed(0)
    rows, p = 20_000, torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    for q in ([0.2] * 5, [0.0, 0.0, 0.0, 0.5, 0.5], [0.5, 0.2, 0.2, 0.1, 0.0]):
        q = torch.tensor(q).expand(rows, -1)
        tokens, accepted = speculation.accept(p.expand(rows, -1), Drafted(torch.multinomial(q, 1)[:, 0], q, []))
        assert surprise(torch.bincount(tokens, minlength=5).float(), p) < 4
        share = torch.minimum(p, q[0]).sum()
        assert float(accepted.float().mean()) == pytest.approx(float(share), abs=0.02)


# -- the draft vocabulary ------------------------------------------------------------------------------------------


@architectures
@pytest.mark.compat("Drafting", "a trimmed draft vocabulary")
def test_a_draft_vocabulary_changes_no_token(name):
    """One of the tokens to come, one of all others, one of a few."""
    model, ids = agreeing(name), tokens(1)
    expected, whole = plain(model, ids), drafted(model, ids)
    right = expected[0, 9:].unique().tolist()
    model.set_draft_vocabulary(right)
    of_right = drafted(model, ids)
    model.set_draft_vocabulary(set(range(VOCAB)) - set(right))
    of_wrong = drafted(model, ids)
    model.set_draft_vocabulary(torch.tensor([5, 90, 5]))
    of_few = drafted(model, ids)
    model.set_draft_vocabulary(None)
    for out in (of_right, of_wrong, of_few, drafted(model, ids)):
        assert torch.equal(out.sequences, expected)
    assert of_right.accepted >= whole.accepted > 0 == of_wrong.accepted


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_draft_head_gives_the_logits_of_the_shadow_alone(name):
    """Scaled and capped as the base's own code does; of a part of the vocabulary, those of its tokens."""
    model, ids = cast(build(name)), tokens(1)
    state = model._initial_state({"input_ids": ids, "inputs_embeds": None})[:, -1]
    expected = model._logits_alone(state[:, None])
    for part in (None, [7, 3, 90]):
        model.set_draft_vocabulary(part)
        found = drafting.DraftHead(model, model.shadow, ids.device)(state)
        torch.testing.assert_close(found, expected if part is None else expected[:, part], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [[], [VOCAB], [-1], [1.5], ["a"], [True]], ids=str)
def test_a_wrong_draft_vocabulary(wrong):
    with pytest.raises(umbra.ConfigError, match="draft vocabulary"):
        make().set_draft_vocabulary(wrong)


def test_frequent_tokens():
    labels = [torch.tensor([-100, 5, 6, 6]), [7, 7, 7, -100, 9]]
    assert drafting.frequent_tokens(labels) == [7, 6, 5, 9]
    assert drafting.frequent_tokens(labels, also=[2, 7], most=3) == [2, 7, 6]
    assert drafting.frequent_tokens([], also=[2]) == [2]


def test_it_is_saved_with_its_adapter(tmp_path):
    model = make()
    model.set_draft_vocabulary([7, 3, 90])
    model.save_pretrained(tmp_path / "one")
    loaded = umbra.load(tmp_path / "one", make().unload())
    assert loaded.shadow.draft_tokens == [7, 3, 90]
    loaded.load_adapter(tmp_path / "one", "second")
    loaded.set_draft_vocabulary(None)
    assert loaded.adapter("second").draft_tokens == [7, 3, 90]
    assert loaded.shadow.draft_tokens is None
    loaded.set_draft_vocabulary([4], "second")
    loaded.resize_token_embeddings(5)
    assert loaded.adapter("second").draft_tokens == [4]
    loaded.resize_token_embeddings(4)
    assert loaded.adapter("second").draft_tokens is None


def test_an_adapter_without_one_is_as_it_was(tmp_path):
    """Its folder has no such entry, and its digest does not know of it."""
    make().save_pretrained(tmp_path)
    assert "draft_tokens" not in read_config(tmp_path)
    assert umbra.load(tmp_path, make().unload()).shadow.draft_tokens is None


def test_a_trainers_checkpoint_brings_it_back(tmp_path):
    def trainer(model):
        data = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        return umbra.ShadowTrainer(model=model, args=arguments, train_dataset=data)

    model = make()
    model.set_draft_vocabulary([7, 3])
    trainer(model).train()
    again = make()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.shadow.draft_tokens == [7, 3]


@pytest.mark.parametrize("value", [[], [7, 7], [VOCAB], [-1], ["a"], [[1]], "7", {"7": 3}, [8, 3], None], ids=str)
def test_a_damaged_one_is_refused(tmp_path, value):
    """Other tokens, or none, do not match the digest."""
    model = make()
    model.set_draft_vocabulary([7, 3])
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "draft_tokens": value}))
    with pytest.raises(umbra.CheckpointError):
        umbra.load(tmp_path, make().unload())


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
def test_refused_before_any_work(form):
    error, options = REFUSED[form]
    model, forwards = agreeing(), []
    model.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match="draft"):
        drafted(model, tokens(1), **options)
    assert not forwards


def test_refused_with_an_assistant():
    model = agreeing()
    with pytest.raises(umbra.ConfigError, match="draft"):
        drafted(model, tokens(1), assistant_model=model.detached())


def test_refused_where_the_shadow_or_the_base_is_left_out():
    model = agreeing()
    for context in (model.disable_adapter, model.shadow_only):
        with context(), pytest.raises(umbra.StateError, match="draft"):
            drafted(model, tokens(1))


def test_refused_in_continuous_batching():
    with pytest.raises(umbra.ConfigError, match="draft"):
        agreeing().generate_batch([[5, 6, 7]], draft=2)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_static_cache_with_windows_is_refused(name):
    with pytest.raises(umbra.BaseModelError, match="draft"):
        drafted(agreeing(name), tokens(1), cache_implementation="static")
