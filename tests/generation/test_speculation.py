"""How far to draft, and sampling: the distribution is that of decoding without drafts."""

import pytest
import torch
from transformers import GenerationConfig

import umbra
from support.drafts import NEW, assert_some_of_both, close_draft, drafted, plain
from support.tiny import tokens
from umbra.generation import batch
from umbra.generation.batch import DraftTokens
from umbra.generation.scheduler import DraftScheduler
from umbra.generation.speculative import AUTO, SpeculativeDecoder

# -- how far -------------------------------------------------------------------------------------------------------


def test_drafting_stops_when_token_is_not_worth_its_cost():
    scheduler = DraftScheduler(draft_cost=0.05, verify_cost=0.08)
    assert scheduler.should_draft([0.99])
    assert not scheduler.should_draft([0.1])
    scheduler.record_cycle(1, 2, 0.0, 0.0)
    assert scheduler.should_draft([0.6])
    assert not scheduler.should_draft([0.3]), "the odds of all tokens so far are multiplied"
    assert not DraftScheduler(draft_cost=0.05, verify_cost=0.08).should_draft([0.6, 0.6, 0.6]), (
        "of a batch, every row must agree"
    )
    assert not DraftScheduler(draft_cost=0.5, verify_cost=0.08).should_draft([0.8]), "what costs much must be likely"


def test_rejections_lower_confidence_until_retried():
    scheduler = DraftScheduler(draft_cost=0.05, verify_cost=0.08)
    for _ in range(30):
        scheduler.record_token([0.9], [False])
        scheduler.record_cycle(1, 1, 0.0, 0.0)
    assert not scheduler.should_draft([0.9])
    assert not scheduler.could_draft(1), "not even the drafter's head needs to run"
    waited = 0
    while not scheduler.should_draft([0.9]):
        scheduler.record_cycle(0, 1, 0.0, 0.0)
        waited += 1
    assert 5 < waited < 200
    for _ in range(30):
        scheduler.record_token([0.9], [True])
        scheduler.record_cycle(1, 2, 0.0, 0.0)
    assert scheduler.should_draft([0.5])


def test_forward_costs_are_measured():
    scheduler = DraftScheduler(draft_cost=0.05, verify_cost=0.08, timed=True)
    for _ in range(30):
        scheduler.record_cycle(3, 4, 4 * 0.5, 1.24)
    assert scheduler.draft_cost == pytest.approx(0.5)
    assert DraftScheduler(draft_cost=0.05, verify_cost=0.08).draft_cost == 0.05


def test_threshold_replaces_cost_model():
    scheduler = DraftScheduler(draft_cost=0.05, verify_cost=0.08, threshold=0.4)
    assert scheduler.should_draft([0.5, 0.4])
    assert not scheduler.should_draft([0.5, 0.3])
    model, ids = close_draft(), tokens(1)
    expected = plain(model, ids)
    outputs = [drafted(model, ids, 8, assistant_confidence_threshold=t) for t in (0.0, 0.08, 0.2, 1.1)]
    counts = [out.drafted for out in outputs]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 0
    assert all(torch.equal(out.sequences, expected) for out in outputs)


def test_auto_drafts_num_assistant_tokens_where_it_is_set():
    shadow = close_draft().shadow

    def number(draft, options=None, **config):
        return SpeculativeDecoder.from_call(
            shadow, draft, (), options or {}, GenerationConfig(**config)
        ).num_draft_tokens

    assert number("auto") == AUTO
    assert number("auto", num_assistant_tokens=3) == 3
    assert number("auto", {"num_assistant_tokens": 5}, num_assistant_tokens=3) == 5
    assert number("auto", {"generation_config": GenerationConfig(num_assistant_tokens=2)}, num_assistant_tokens=3) == 2
    assert number(4, {"num_assistant_tokens": 5}) == 4
    with pytest.raises(umbra.ConfigError, match="draft must be an integer of at least 1"):
        number("auto", num_assistant_tokens=0)


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
    model = close_draft(base_options=SMALL)
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
def test_sampling_distribution_equals_plain_decoding(form, rows, times):
    options, part = SAMPLING[form]
    model, ids = small_model(), torch.tensor([[3, 4, 2, 5, 1]])
    model.set_draft_vocabulary(part)
    counts, outputs = sample(model, ids, rows, times, **options)
    assert surprise(counts, joint(model, ids, **options)) < 4
    if times > 1:
        assert_some_of_both(*outputs)


def test_several_samples_per_prompt_are_drawn():
    out = drafted(small_model(), torch.tensor([[3, 4, 5]]), do_sample=True, num_return_sequences=5)
    assert out.sequences.shape == (5, 3 + NEW)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 5


def test_distribution_test_detects_wrong_rule(monkeypatch):
    model, ids = small_model(), torch.tensor([[3, 4, 2, 5, 1]])
    odds = joint(model, ids)

    def always(p, one: DraftTokens):
        return one.tokens, torch.ones(len(p), dtype=torch.bool)

    def without_the_rest(p, one: DraftTokens):
        accepted = (
            torch.rand(len(p)) * one.q.gather(1, one.tokens[:, None])[:, 0] < p.gather(1, one.tokens[:, None])[:, 0]
        )
        return torch.where(accepted, one.tokens, torch.multinomial(p, 1)[:, 0]), accepted

    for rule in (always, without_the_rest):
        monkeypatch.setattr(batch, "accept", rule)
        assert surprise(sample(model, ids, 4000, 1)[0], odds) > 8


def test_acceptance_rule_recovers_target_distribution():
    torch.manual_seed(0)
    rows, p = 20_000, torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    for q in ([0.2] * 5, [0.0, 0.0, 0.0, 0.5, 0.5], [0.5, 0.2, 0.2, 0.1, 0.0]):
        q = torch.tensor(q).expand(rows, -1)
        tokens, accepted = batch.accept(p.expand(rows, -1), DraftTokens(torch.multinomial(q, 1)[:, 0], q, []))
        assert surprise(torch.bincount(tokens, minlength=5).float(), p) < 4
        share = torch.minimum(p, q[0]).sum()
        assert float(accepted.float().mean()) == pytest.approx(float(share), abs=0.02)
