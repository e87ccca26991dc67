"""Gradients of gradients, forward-mode derivatives and torch.func: right, or an error."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad

import umbra
from support.tiny import make, partly_labelled, tokens
from umbra.method import kernels
from umbra.method.core import Couplings
from umbra.method.kernels import Head, linear_loss

IDS = tokens(1, 5)
STEP = 3e-3  # of finite differences: norms compute in float32
# torch's own forward-mode formulas use it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def build(dialect: str = "umbra", **options):
    model = make(dialect=dialect, gate_rank=3, constants={"norm": True}, **options).double()
    model.set_attn_implementation("eager")
    model.base.set_attn_implementation("eager")
    model.shadow.backbone.set_attn_implementation("eager")
    return model.train()


def penalty(model, embeds: torch.Tensor, labelled: bool) -> torch.Tensor:
    """The squared norm of the loss's gradient with respect to the input."""
    embeds = embeds.detach().requires_grad_()
    given = {"labels": partly_labelled(IDS)} if labelled else {}
    out = model(inputs_embeds=embeds, **given)
    value = out.loss if labelled else out.logits.square().mean()
    (gradient,) = torch.autograd.grad(value, embeds, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.filterwarnings("ignore:Called without labels")
def test_gradient_penalty_is_exact_on_plain_path_only(labelled):
    model = build()
    embeds = model.get_input_embeddings()(IDS).detach()
    weight = model.shadow.couplings.injections["1"].up.weight
    with pytest.raises(umbra.StateError, match=r"kernels\.reference"):
        penalty(model, embeds, labelled)
    with kernels.reference():
        (found,) = torch.autograd.grad(penalty(model, embeds, labelled), weight)
        step, values = torch.zeros_like(weight), []
        step[3, 1] = STEP
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
            values.append(float(penalty(model, embeds, labelled)))
            with torch.no_grad():
                weight.sub_(sign * step)
    assert float(found[3, 1]) == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=0.03)


@pytest.mark.parametrize("dialect", ["paper", "peft"])
def test_plain_update_and_inject_passes_gradgradcheck(dialect):
    config = umbra.ShadowConfig(dialect=dialect, rank=2, gate_rank=2, dropout=0.0, layers=(0, 1))
    made = Couplings(2, 4, config.resolve()).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    h, s = (torch.randn(2, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda h, s: made.update_and_inject(1, h, s), (h, s))
    with pytest.raises(umbra.StateError, match="create_graph"):
        torch.autograd.grad(kernels.update_and_inject(made, 1, h, s)[0].square().sum(), h, create_graph=True)


def test_fused_loss_refuses_second_derivative():
    x, head = torch.randn(3, 4, requires_grad=True), Head(torch.randn(7, 4))
    with pytest.raises(umbra.StateError, match="create_graph"):
        torch.autograd.grad(linear_loss(x, head, torch.tensor([1, 2, 3]))[0], x, create_graph=True)


TRANSFORMS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "grad": lambda f, x, t: (torch.func.grad(f)(x) * t).sum(),
    "jacrev": lambda f, x, t: (torch.func.jacrev(f)(x) * t).sum(),
    "jacfwd": lambda f, x, t: (
        (torch.func.jacfwd(f)(x) * t).sum() if x.numel() < 50 else torch.func.jvp(f, (x,), (t,))[1]
    ),
}


def dual(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("form", [*TRANSFORMS, "dual"])
def test_function_transforms_are_exact_or_raise(form, labelled, fast):
    model = build().eval()
    embeds = model.get_input_embeddings()(IDS).detach()
    tangent = torch.randn_like(embeds)

    def value(x):
        given = {"labels": IDS, "skip_logits": True} if labelled else {}
        out = model(inputs_embeds=x, use_cache=False, **given)
        return out.loss if labelled else out.logits.square().mean()

    act = dual if form == "dual" else TRANSFORMS[form]
    with torch.no_grad():
        expected = (value(embeds + STEP * tangent) - value(embeds - STEP * tangent)) / (2 * STEP)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            try:
                with nullcontext() if fast else kernels.reference():
                    found = act(value, embeds, tangent)
            except (RuntimeError, NotImplementedError):
                continue
        assert found is not None and float(found) == pytest.approx(float(expected), rel=0.03)
