"""What can be taken out of the method: each against the equations, written out by hooks on a base of its own."""

import copy

import pytest
import torch

import umbra
from support.tiny import gradients, make, make_base, tokens
from umbra.method.kernels import reference

UPDATES = ["gated", "ungated", "none"]


def by_hand(model, ids: torch.Tensor) -> torch.Tensor:
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
            if config.update != "none" and str(l - 1) in couplings.updates:
                update = couplings.updates[str(l - 1)]
                n = torch.nn.functional.layer_norm(h, h.shape[-1:], couplings.norm.weight, couplings.norm.bias)
                gate = 1.0 if config.update == "ungated" else torch.sigmoid(update.gate(n))
                held["s"] = held["s"] + gate * (update.transform(n) - held["s"])
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
@pytest.mark.parametrize("fields", [{}, {"first_layer": 2}, {"layers": (1, 3)}, {"channel_scale": "measured"}], ids=str)
def test_ablations_match_their_equations(update, fields):
    model, ids = make(update=update, **fields), tokens()
    with torch.no_grad():
        found, expected = model(ids, use_cache=False).logits, by_hand(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    others = [make(update=u, **fields)(ids, use_cache=False).logits for u in UPDATES if u != update]
    assert all(float((o - found).abs().max()) > 1e-3 for o in others)


@pytest.mark.parametrize("update", UPDATES)
def test_ablations_train_generate_and_round_trip(update, tmp_path):
    model, ids = make(update=update), tokens()
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    with reference():
        model(ids, labels=ids).loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    assert any("updates" in n for n in found) == (update != "none")
    assert any(".gate." in n for n in found) == (update == "gated")
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)
    again = model(answer[:, :-1], use_cache=False).logits.argmax(-1)[:, ids.shape[1] - 1 :]
    assert torch.equal(answer[:, ids.shape[1] :], again)
    model.save_pretrained(tmp_path / "adapter")
    loaded = umbra.load(tmp_path / "adapter", make_base())
    assert loaded.shadow_config.update == update
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("update", ["ungated", "none"])
@pytest.mark.parametrize("form", ["peft", "shadow-peft"])
def test_ablations_cannot_be_converted(update, form, tmp_path):
    from umbra.deploy.convert import convert

    dialect = {"peft": "peft", "shadow-peft": "paper"}[form]
    with pytest.raises(umbra.CheckpointError, match=f"update={update}"):
        convert(make(update=update, dialect=dialect), tmp_path / "out", form)


# -- a rate of its own -------------------------------------------------------------------------------------------------


def trained(factor: float, folder, **more):
    from umbra.data import Collator
    from umbra.training.runs import make_arguments

    model = make(backbone_rate=factor)
    before = copy.deepcopy(model.shadow.state_dict())
    examples = [{"input_ids": row.numpy(), "labels": row.numpy()} for row in tokens(8)]
    given = {
        "max_steps": 1,
        "warmup_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "adamw_torch",
    }
    arguments = make_arguments(folder, {**given, "learning_rate": 1e-3, **more})
    trainer = umbra.ShadowTrainer(model=model, args=arguments, train_dataset=examples, data_collator=Collator(0))  # type: ignore[arg-type]
    trainer.train()
    moved = {
        k: float((v.detach() - before[k]).abs().max()) for k, v in model.shadow.named_parameters() if v.requires_grad
    }
    return trainer, moved


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_backbone_rate_scales_learning_rate(factor, tmp_path):
    """The first step of Adam moves every weight by its learning rate."""
    trainer, moved = trained(factor, tmp_path)
    for name, step in moved.items():
        expected = 1e-3 * (factor if name.startswith("backbone.") else 1.0)
        assert step == pytest.approx(expected, rel=0.05), name
    ids = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == sum(p.requires_grad for p in trainer.model.parameters())


def test_backbone_rate_leaves_weight_decay_and_schedule(tmp_path):
    """Groups keep their decay; the schedule scales both rates alike."""
    trainer, _ = trained(0.5, tmp_path, weight_decay=0.1, max_steps=4)
    groups = trainer.optimizer.param_groups
    backbone = {id(p) for p in trainer.model.shadow.backbone.parameters()}
    assert {(g["weight_decay"], g["initial_lr"], all(id(p) in backbone for p in g["params"])) for g in groups} == {
        (0.1, 1e-3, False), (0.0, 1e-3, False), (0.1, 5e-4, True), (0.0, 5e-4, True)
    }  # fmt: skip
    assert {g["lr"] / g["initial_lr"] for g in groups} == {groups[0]["lr"] / groups[0]["initial_lr"]}


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1"])
def test_invalid_backbone_rate_is_refused(value):
    with pytest.raises(umbra.ConfigError, match="backbone_rate must be a finite number > 0"):
        umbra.ShadowConfig(backbone_rate=value)
