"""Heads and embeddings that are replaced, hooked, wrapped or parametrised are noticed: nothing reads the old weights."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import umbra
from support.tiny import HIDDEN, VOCAB, assert_same, gradients, make, make_base, tokens

IDS = tokens(2, 9)
FIELDS = {"dropout": 0.0, "auxiliary_loss_weight": 0.5}
UNTIED = {"tie_word_embeddings": False}


def another(part: str) -> nn.Module:
    """A head or a table of other weights."""
    torch.manual_seed(9)
    made = nn.Linear(HIDDEN, VOCAB, bias=False) if part == "head" else nn.Embedding(VOCAB, HIDDEN)
    return made.requires_grad_(False)


def put(base, part: str, module: nn.Module) -> None:
    """By assignment."""
    if part == "head":
        base.lm_head = module
    else:
        base.model.embed_tokens = module


def step(model, fast: bool = True):
    """Loss, shadow's loss and gradients in training, and the logits in evaluation."""
    with nullcontext() if fast else umbra.method.kernels.reference():
        out = model.train()(IDS, labels=IDS)
        out.loss.backward()
        with torch.no_grad():
            logits = model.eval()(IDS).logits
    return {"loss": out.loss.detach(), "shadow": out.shadow_loss.detach(), "logits": logits, **gradients(model)}


@pytest.mark.parametrize("way", ["assigned", "set"])
@pytest.mark.parametrize("part", ["head", "embeddings"])
@pytest.mark.parametrize("between", [False, True])
def test_replaced_part_belongs_to_base(part, way, between):
    """As if the shadow had been attached to such a base."""
    base = make_base(**UNTIED)
    put(base, part, another(part))
    other = umbra.attach(base, umbra.ShadowConfig(rank=4, alpha=0.5, **FIELDS))
    model = make(base_options=UNTIED, **FIELDS)
    other.shadow.load_state_dict(model.shadow.state_dict())
    if between:
        step(model)
    if way == "assigned":
        put(model.base, part, another(part))
    elif part == "head":
        model.set_output_embeddings(another(part))
    else:
        model.set_input_embeddings(another(part))
    assert_same(step(model), step(other))
    assert model.base_fingerprint == other.base_fingerprint
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, base_logits(other))


def base_logits(model) -> torch.Tensor:
    with model.disable_adapter(), torch.no_grad():
        return model(IDS).logits


def test_replacement_keeps_trained_heads_or_is_refused():
    model = make(base_options=UNTIED, train_heads=True, **FIELDS)
    before = step(model)
    with pytest.raises(umbra.ConfigError, match="trained heads"):
        model.set_output_embeddings(copy.deepcopy(model.base.lm_head))
    model.set_output_embeddings(model.get_output_embeddings())
    for head in (copy.deepcopy(model.base.lm_head), another("head")):
        model.base.lm_head = head
        assert_same(step(model), before)
        assert_same(step(model, fast=False), before)


@pytest.mark.parametrize("part", ["head", "embeddings"])
def test_part_of_another_size_is_refused(part):
    model = make(base_options=UNTIED)
    wrong = nn.Linear(HIDDEN, 70) if part == "head" else nn.Embedding(70, HIDDEN)
    with pytest.raises(umbra.ConfigError, match="resize_token_embeddings"):
        (model.set_output_embeddings if part == "head" else model.set_input_embeddings)(wrong)


# -- hooks and wrappers --------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As LoRA wraps a linear layer: the weight that it shows is the layer's own."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        return 1.5 * self.layer(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def halve_forward(module):
    forward = module.forward
    module.forward = lambda x: 0.5 * forward(x)


def normed(module):
    """By a hook that computes the weight before each call; then its scale is changed."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(module)
    with torch.no_grad():
        module.weight_g.mul_(1.7)
    module.weight_g.requires_grad_(False)
    module.weight_v.requires_grad_(False)


CHANGES = {
    "forward hook": lambda m: m.register_forward_hook(lambda m, args, out: 0.5 * out),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0],)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, d_in, d_out: tuple(2 * d for d in d_in)),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Twice()),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.requires_grad_(False)),
    "weight norm": normed,
    "another forward": halve_forward,
}


def changed(model, place: str, change: str):
    owner, _, name = place.rpartition(".")
    module = model.get_submodule(place)
    if change == "wrapped":
        setattr(model.get_submodule(owner), name, Wrapped(module))
    else:
        CHANGES[change](module)
    return model


@pytest.mark.parametrize("change", [*CHANGES, "wrapped"])
@pytest.mark.parametrize(
    "place",
    [
        "base.lm_head",
        "shadow.couplings.injections.1.down",
        "shadow.couplings.updates.1.gate.0",
        "base.model.layers.1.mlp.up_proj",
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modified_module_is_read_as_it_computes(place, change):
    """After a first step, by which the fast forms have chosen their way."""
    fast, plain = make(base_options=UNTIED, **FIELDS), make(base_options=UNTIED, **FIELDS)
    before = step(fast)
    torch.manual_seed(0)
    changed(fast, place, change)
    torch.manual_seed(0)
    changed(plain, place, change)
    found, expected = step(fast), step(plain, fast=False)
    assert_same(found, expected)
    key = "shadow" if place == "base.lm_head" and change != "backward hook" else None
    assert key is None or not torch.allclose(found[key], before[key]), "the change has no effect"


def test_coupling_hooks_run_during_generation():
    model = make()
    seen = []
    model.shadow.couplings.injections["1"].down.register_forward_hook(lambda *_: seen.append(1))
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert len(seen) == 4
