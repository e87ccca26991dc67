"""The measured scale of channels: what it is, that it only changes coordinates, and that the base is left as it was."""

import copy

import pytest
import torch

import umbra
from support.tiny import ARCHITECTURES, gradients, make, make_base, scramble, tokens
from umbra.base.architectures import locate
from umbra.deploy.convert import convert
from umbra.method.kernels import reference
from umbra.shadow.input_scale import LARGEST, LENGTH, ROWS, SEED, scale_of

MEASURED, PLAIN = {"input_scale": "measured"}, {"input_scale": "none"}


def test_channel_scale_matches_its_equation():
    h = torch.randn(200, 12) * torch.tensor([100.0, 10.0, *[1.0] * 9, 0.0])
    rms = [sum(float(h[n, d]) ** 2 for n in range(200)) / 200 for d in range(12)]
    m = sorted(float((row**2).mean()) for row in h)[99] ** 0.5
    expected = [m / max(r**0.5, m / 20) for r in rms]
    torch.testing.assert_close(scale_of(h), torch.tensor(expected))
    assert float(scale_of(h)[-1]) == LARGEST
    scaled = (h * scale_of(h))[:, :-1].square().mean(0).sqrt()
    assert float(scaled.max() / scaled[2:].min()) < 2  # the loud ones are as loud as the others


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measuring_leaves_base_unchanged(name):
    base = make_base(name).train()
    ids = torch.randint(
        base.get_input_embeddings().weight.shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED)
    )
    hooks = [len(b._forward_pre_hooks) for b in locate(base).blocks]
    base.eval()
    with torch.no_grad():
        told = base(ids, output_hidden_states=True)
    model = umbra.attach(base.train(), umbra.ShadowConfig(rank=4, first_layer=1, **MEASURED))
    assert base.training
    for l, injection in model.shadow.couplings.injections.items():
        h, stream = told.hidden_states[int(l)], locate(base).stream
        expected = scale_of((h if stream is None else h[stream]).flatten(0, -2).float())
        torch.testing.assert_close(injection.channels, expected, rtol=1e-4, atol=1e-5)
        assert float(injection.channels.std()) > 0
    base = model.unload().eval()
    assert [len(b._forward_pre_hooks) for b in locate(base).blocks] == hooks
    with torch.no_grad():
        assert torch.equal(base(ids).logits, told.logits)


def test_channel_scale_only_changes_coordinates():
    """The same function as a plain shadow whose W_down is c ⊙ W_down, gradients by the chain rule."""
    scaled, plain, ids = make(**MEASURED), make(**PLAIN), tokens()
    state = scaled.shadow.state_dict()
    for l, injection in scaled.shadow.couplings.injections.items():
        state[f"couplings.injections.{l}.down.weight"] = injection.scaled_down().detach()
        del state[f"couplings.injections.{l}.channels"]
    plain.shadow.load_state_dict(state)
    for model in (scaled, plain):
        model(ids, labels=ids).loss.backward()
    mine, theirs = gradients(scaled), gradients(plain)
    for name, value in theirs.items():
        c = (
            scaled.shadow.couplings.injections[name.split(".")[-3]].channels
            if "down.weight" in name and "inj" in name
            else 1
        )
        torch.testing.assert_close(mine[name], value * c, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(scaled(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", ["paper", "peft"])
def test_kernels_and_dropout_apply_channel_scale(dialect):
    model, ids = make(dialect=dialect, dropout=0.3, **MEASURED), tokens()
    found = []
    for fast in (True, False):
        model.train().zero_grad()
        torch.manual_seed(0)
        if fast:
            model(ids, labels=ids).loss.backward()
        else:
            with reference():
                model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5)
    model.eval()
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)
    with reference():
        assert torch.equal(answer, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_channel_scale_is_loaded_not_remeasured(tmp_path, monkeypatch):
    model, ids = make(**MEASURED), tokens()
    model.save_pretrained(tmp_path / "adapter")
    base = make_base()
    monkeypatch.setattr("umbra.shadow.input_scale.measure", None)
    loaded = umbra.load(tmp_path / "adapter", base)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = umbra.load(tmp_path / "adapter", make_base(), trainable=True)
    assert {n.split(".")[-1] for n, p in again.shadow.named_parameters() if not p.requires_grad} == {"channels"}


@pytest.mark.parametrize("form", ["peft", "shadow-peft"])
def test_peer_formats_fold_channel_scale_into_weights(form, tmp_path):
    model, ids = make(dialect={"peft": "peft", "shadow-peft": "paper"}[form], **MEASURED), tokens()
    convert(model, tmp_path / "out", form)
    read = umbra.load(tmp_path / "out", make_base()).eval()
    assert read.shadow_config.input_scale == "none"
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_second_adapter_measures_bare_base():
    model = make()
    model.add_adapter(umbra.ShadowConfig(rank=4, **MEASURED), "other")
    alone = umbra.attach(make_base(), umbra.ShadowConfig(rank=4, **MEASURED))
    other = model.adapter("other").couplings.injections
    for l, injection in alone.shadow.couplings.injections.items():
        assert torch.equal(other[l].channels, injection.channels)


def test_meta_base_cannot_be_measured():
    base = copy.deepcopy(make_base()).to("meta")
    model = umbra.attach(base, umbra.ShadowConfig(rank=4, **MEASURED))
    assert all(bool((i.channels == 1).all()) for i in model.shadow.couplings.injections.values())


def test_unknown_channel_scale_is_refused():
    with pytest.raises(umbra.ConfigError, match="input_scale must be one of none, measured"):
        umbra.ShadowConfig(input_scale="loud")


def test_shadow_order_is_distinguished():
    model, ids = make(**MEASURED), tokens()
    plain = make(**PLAIN)
    scramble(plain.shadow, 1)
    with torch.no_grad():
        assert float((model(ids).logits - plain(ids).logits).abs().max()) > 1e-3


def test_measurement_stays_within_few_positions():
    model = umbra.attach(make_base("gpt2", n_positions=16))
    assert all((i.channels != 1).any() for i in model.shadow.couplings.injections.values())
