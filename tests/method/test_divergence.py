"""Divergences between what two heads say, and what a teacher tells."""

import pytest
import torch

from umbra.method import divergences as divergence
from umbra.method.divergences import KINDS, Teacher, linear_divergence, teacher_log_probs
from umbra.method.kernels import Head


def naive(z, t, kind, temperature):
    """Out of probabilities, in float64."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (t, z))
    m = (p + q) / 2
    found = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "js": 0.5 * p * (p / m).log() + 0.5 * q * (q / m).log(),
    }
    return temperature**2 * found[kind].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_divergence_and_gradient_match_formula(kind, temperature):
    z, t = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(0)) * 3
    z.requires_grad_()
    found = divergence.divergence(z, teacher_log_probs(t, temperature, None), kind, temperature)
    expected = naive(z, t, kind, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, z, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_divergence_lumps_remaining_tokens(kind):
    z, t = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(1)) * 3
    top = t.topk(4).indices
    merged = []
    for x in (z, t):
        p = torch.softmax(x.double(), -1)
        kept = p.gather(-1, top)
        merged.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log())
    found = divergence.divergence(z, teacher_log_probs(t, 1.0, 4), kind, 1.0)
    torch.testing.assert_close(found.double(), naive(*merged, kind, 1.0), rtol=1e-5, atol=1e-6)
    whole = divergence.divergence(z, teacher_log_probs(t, 1.0, 17), kind, 1.0)
    torch.testing.assert_close(whole.double(), naive(z, t, kind, 1.0), rtol=1e-4, atol=1e-6)


def test_chunked_divergence_equals_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 23, 8, generator=generator)
    head = Head(torch.randn(17, 8, generator=generator), None, 0.5, 4.0)
    x.requires_grad_()
    whole = divergence.divergence(head.logits(x), teacher_log_probs(head.logits(t), 2.0, 5), "js", 2.0)
    expected = torch.autograd.grad(whole, x)[0]
    monkeypatch.setattr(divergence, "CHUNK", 17 * 5)
    found = linear_divergence(x, head, lambda part: teacher_log_probs(head.logits(t[part]), 2.0, 5), "js", 2.0)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected)


def test_identical_teacher_gives_zero_gradient():
    z = torch.randn(5, 17)
    for kind in KINDS:
        assert abs(float(divergence.divergence(z, teacher_log_probs(z, 1.5, None), kind, 1.5))) < 1e-5
    assert isinstance(teacher_log_probs(z, 1.0, 99), Teacher), "k beyond the vocabulary is all of it"
