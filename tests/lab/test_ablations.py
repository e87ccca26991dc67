"""Ablations of the update: each compared with its equations, which hooks compute on a separate base."""

import pytest
import torch

from support.tiny import gradients, make_base, scramble, tokens
from umbra import ConfigError
from umbra.lab.study.ablations import UPDATES, attach_ablated, is_ablated
from umbra.lab.study.methods import read_method
from umbra.method.kernels import reference


def make(update: str, **fields):
    """A tiny model with every weight of the shadow randomised and no dropout, in eval mode."""
    model = attach_ablated(make_base(), {"dropout": 0.0, "rank": 4, "alpha": 0.5, "update": update, **fields})
    scramble(model.shadow, 1)
    return model.eval()


def by_hand(model, update: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the equations of core.py's docstring, on a copy of the base."""
    base, shadow = make_base(), model.shadow
    couplings, config = shadow.couplings, shadow.config
    held = {
        "s": shadow._project(
            shadow.backbone(inputs_embeds=base.model.embed_tokens(ids), use_cache=False).last_hidden_state
        )
    }

    def before(l):
        def hook(block, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            if update != "none" and str(l - 1) in couplings.updates:
                layer = couplings.updates[str(l - 1)]
                n = torch.nn.functional.layer_norm(h, h.shape[-1:], couplings.norm.weight, couplings.norm.bias)
                gate = 1.0 if update == "ungated" else torch.sigmoid(layer.gate(n))
                held["s"] = held["s"] + gate * (layer.transform(n) - held["s"])
            if str(l) in couplings.injections:
                injection = couplings.injections[str(l)]
                c = 1 if injection.channels is None else injection.channels
                h = h + config.alpha * ((h - held["s"]) * c) @ injection.down.weight.T @ injection.up.weight.T
            return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

        return hook

    for l, block in enumerate(base.model.layers):
        block.register_forward_pre_hook(before(l), with_kwargs=True)
    return base(ids).logits


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("fields", [{}, {"first_layer": 2}, {"layers": (1, 3)}, {"input_scale": "measured"}], ids=str)
def test_ablations_match_their_equations(update, fields):
    model, ids = make(update=update, **fields), tokens()
    with torch.no_grad():
        result, expected = model(ids, use_cache=False).logits, by_hand(model, update, ids)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    others = [make(update=u, **fields)(ids, use_cache=False).logits for u in UPDATES if u != update]
    assert all(float((o - result).abs().max()) > 1e-3 for o in others)


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_and_generation(update):
    model, ids = make(update=update), tokens()
    model(ids, labels=ids).loss.backward()
    result = gradients(model)
    with reference():
        model(ids, labels=ids).loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(result[name], value, rtol=1e-3, atol=1e-5)
    assert any("updates" in n for n in result) == (update != "none")
    assert any(".gate." in n for n in result) == (update == "gated")
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)
    again = model(answer[:, :-1], use_cache=False).logits.argmax(-1)[:, ids.shape[1] - 1 :]
    assert torch.equal(answer[:, ids.shape[1] :], again)


def test_a_method_of_a_study_may_be_ablated():
    method = read_method("no gate", {"kind": "umbra", "rank": 4, "update": "ungated"})
    assert is_ablated(method.fields) and not is_ablated({"rank": 4})
    with pytest.raises(ConfigError, match="update must be one of gated, ungated, none; got 'half'"):
        read_method("half a gate", {"kind": "umbra", "update": "half"})
