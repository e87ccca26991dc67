"""What attaching promises: the base at first, the base afterwards, and nothing but the shadow changed in between."""

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModel, DynamicCache, LlamaConfig, StaticCache

import umbra
from support.tiny import (
    ARCHITECTURES,
    CLASSIFIERS,
    DIALECTS,
    HIDDEN,
    LAYERS,
    VOCAB,
    class_labels,
    make,
    make_base,
    partly_labelled,
    scramble,
    tokens,
)
from umbra.base.architectures import locate
from umbra.method.hooks import _Hook

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
dialects = pytest.mark.parametrize("dialect", DIALECTS)
kinds = pytest.mark.parametrize("classifier", [False, True], ids=["lm", "classifier"])


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def umbra_hooks(module: nn.Module) -> list:
    hooks = [h for m in module.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for h in d.values()]
    return [h for h in hooks if isinstance(h, _Hook) or type(h).__module__.startswith("umbra")]


# -- at initialisation ---------------------------------------------------------------------------------------------


@architectures
@dialects
@kinds
@torch.no_grad()
def test_attached_equals_base_at_initialisation(name, dialect, classifier):
    ids = tokens()
    base = make_base(name, classifier=classifier)
    expected = base(ids).logits
    model = umbra.attach(base, umbra.ShadowConfig(dialect=dialect))
    assert torch.equal(model(ids).logits, expected)


@architectures
@torch.no_grad()
def test_trained_heads_equal_base_at_initialisation(name):
    ids = tokens()
    base = make_base(name)
    expected = base(ids).logits
    assert torch.equal(umbra.attach(base, umbra.ShadowConfig(train_heads=True))(ids).logits, expected)


@architectures
def test_generation_equals_base_at_initialisation(name):
    ids = tokens()
    base = make_base(name)
    expected = base.generate(ids, max_new_tokens=8, do_sample=False)
    model = umbra.attach(base, umbra.ShadowConfig())
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@architectures
@dialects
@kinds
@torch.no_grad()
def test_randomised_shadow_changes_logits(name, dialect, classifier):
    """Without this the other tests of the suite would test nothing."""
    ids = tokens()
    base, model = make_base(name, classifier=classifier), make(name, classifier=classifier, dialect=dialect)
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-2


# -- the shapes of what comes back ---------------------------------------------------------------------------------


@architectures
@torch.no_grad()
def test_logits_to_keep_selects_positions(name):
    model, ids = make(name), tokens()
    full = model(ids).logits
    picked = torch.tensor([1, 4, 5])
    for labels in (None, ids):
        torch.testing.assert_close(model(ids, labels=labels, logits_to_keep=3).logits, full[:, -3:])
        torch.testing.assert_close(model(ids, labels=labels, logits_to_keep=picked).logits, full[:, picked])
        with model.shadow_only():
            whole = model(ids).logits
            torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
            torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, whole[:, picked])


@architectures
@dialects
@torch.no_grad()
def test_hidden_states_are_plain_tensors(name, dialect):
    """One more than there are base blocks (the shadow's own do not leak among them), each the output of a block."""
    model, ids, blocks = make(name, dialect=dialect), tokens(), []
    plain = model(ids)
    for block in locate(model.base).blocks:
        block.register_forward_hook(lambda _, args, out: blocks.append(out[0] if isinstance(out, tuple) else out))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert all(type(h) is torch.Tensor and h.shape == (2, 9, HIDDEN) for h in out.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[1:-1], blocks[:-1], strict=True))
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(model.base_head(out.hidden_states[-1]), plain.logits)


@architectures
@kinds
@torch.no_grad()
def test_return_dict_false_returns_tuple(name, classifier):
    model, ids = make(name, classifier=classifier), tokens()
    found = model(ids, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], model(ids).logits)


@architectures
@kinds
@torch.no_grad()
def test_inputs_embeds_equal_input_ids(name, classifier):
    model, ids = make(name, classifier=classifier), tokens()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


@architectures
@kinds
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(name, classifier):
    model, ids, pads = make(name, classifier=classifier), tokens(3, 10), (0, 3, 7)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(batch[row] if classifier else batch[row, pad:], alone, rtol=1e-4, atol=1e-4)


@architectures
@torch.no_grad()
def test_right_padded_classifier_rows_equal_rows_alone(name):
    """Attached logits and the shadow's loss read the last token that is not padding."""
    model, ids, lengths = make(name, classifier=True, base_options=CLASSIFIERS["single"]), tokens(3, 10), (10, 6, 3)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    labels = class_labels("single", 3)
    batch = model(ids, attention_mask=mask, labels=labels)
    alone = [model(ids[r : r + 1, :n], labels=labels[r : r + 1]) for r, n in enumerate(lengths)]
    torch.testing.assert_close(batch.logits, torch.cat([a.logits for a in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.shadow_loss, torch.stack([a.shadow_loss for a in alone]).mean())


@architectures
@torch.no_grad()
def test_base_and_shadow_share_one_cache(name):
    model, ids = make(name, shadow_num_hidden_layers=2), tokens()
    cache = model(ids).past_key_values
    assert len(cache.layers) == LAYERS + 2
    assert all(layer.get_seq_length() == ids.shape[1] for layer in cache.layers)
    assert model.config.num_hidden_layers == LAYERS + 2
    assert model.base.config.num_hidden_layers == LAYERS


@architectures
@torch.no_grad()
def test_cache_without_shadow_layers_is_refused(name):
    model, ids = make(name), tokens()
    expected = model(ids).logits
    small = [StaticCache(config=model.base.config, max_cache_len=32)]
    if len(DynamicCache(config=model.base.config).layers):
        small.append(DynamicCache(config=model.base.config))
    for cache in small:
        with pytest.raises(umbra.StateError, match="cache"):
            model(ids, past_key_values=cache)
    assert torch.equal(model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32)).logits, expected)


# -- the base ------------------------------------------------------------------------------------------------------


@architectures
@kinds
def test_unload_restores_base(name, classifier):
    ids = tokens()
    base = make_base(name, classifier=classifier)
    frozen = next(iter(dict(base.named_parameters())))
    base.get_parameter(frozen).requires_grad_(False)
    before, logits = bits(base), base(ids).logits.detach()
    trainable = {n for n, p in base.named_parameters() if p.requires_grad}

    model = umbra.attach(base, umbra.ShadowConfig())
    scramble(model.shadow)
    assert umbra_hooks(base)
    model.train()(ids, labels=class_labels("single", 2) % 2 if classifier else ids).loss.backward()
    model.eval()
    found = model.unload()

    assert found is base
    assert_same_bits(bits(base), before)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in base.parameters())
    assert umbra_hooks(base) == []
    assert torch.equal(base(ids).logits, logits)
    assert torch.equal(umbra.attach(base, umbra.ShadowConfig())(ids).logits, logits)


@architectures
def test_second_shadow_on_base_is_refused(name):
    model, ids = make(name), tokens()
    before, hooks = model(ids).logits, len(umbra_hooks(model.base))
    for again in (model.base, model):
        with pytest.raises(umbra.BaseModelError):
            umbra.attach(again, umbra.ShadowConfig())
    assert len(umbra_hooks(model.base)) == hooks
    assert torch.equal(model(ids).logits, before)


@architectures
@kinds
def test_training_leaves_base_unchanged(name, classifier):
    model, ids = make(name, classifier=classifier).train(), tokens(4)
    labels = class_labels("single", 4) % 2 if classifier else partly_labelled(ids)
    base, shadow = bits(model.base), bits(model.shadow)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(bits(model.base), base)
    moved = bits(model.shadow)
    assert all(not torch.equal(moved[n], shadow[n]) for n, p in model.shadow.named_parameters() if p.requires_grad)


@architectures
@kinds
@torch.no_grad()
def test_disabled_adapter_equals_base(name, classifier):
    model, bare, ids = make(name, classifier=classifier), make_base(name, classifier=classifier), tokens()
    labels = class_labels("single", 2) % 2 if classifier else ids
    attached, expected = model(ids).logits, bare(ids, labels=labels)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected.logits)
        assert torch.equal(model(ids, labels=labels).loss, expected.loss)
        assert torch.equal(model.base(ids).logits, expected.logits)
    assert torch.equal(model(ids).logits, attached)


@architectures
def test_disabled_adapter_generates_like_base(name):
    """The bare base is frozen here too: torch's matmul takes another kernel for a weight that requires a gradient."""
    model, bare, ids = make(name), make_base(name).requires_grad_(False), tokens()
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    expected = bare.generate(ids, **options)
    with model.disable_adapter():
        found = model.generate(ids, **options)
        static = model.generate(ids, **options, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    assert torch.equal(static.sequences, expected.sequences)


@architectures
@kinds
@torch.no_grad()
def test_base_called_directly_raises(name, classifier):
    """It must not answer quietly as if there were no shadow."""
    model, ids = make(name, classifier=classifier), tokens()
    before = model(ids).logits
    with pytest.raises(umbra.StateError, match="ShadowModel"):
        model.base(ids)
    if not classifier:
        with pytest.raises(umbra.StateError):
            model.base.generate(ids, max_new_tokens=2)
    assert torch.equal(model(ids).logits, before)


@architectures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@kinds
def test_half_precision_base_is_supported(name, dtype, classifier):
    """The shadow keeps fp32 weights; outputs and gradients are finite; the base's dtype stays."""
    ids = tokens()
    base = make_base(name, classifier=classifier).to(dtype)
    expected = base(ids).logits
    model = umbra.attach(base, umbra.ShadowConfig(rank=4, dropout=0.0))
    assert torch.equal(model(ids).logits.to(dtype), expected)
    assert {p.dtype for p in model.shadow.parameters()} == {torch.float32}
    assert {p.dtype for p in base.parameters()} == {dtype}
    scramble(model.shadow, std=0.1)
    out = model.train()(ids, labels=class_labels("single", 2) % 2 if classifier else ids)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.shadow.parameters() if p.requires_grad)
    stock = model.eval().detached()
    assert stock(ids).logits.isfinite().all()
    assert (stock(ids).logits - model.float().detached()(ids).logits).abs().max() < 1e-3
    if not classifier:
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


# -- saved and loaded ----------------------------------------------------------------------------------------------


@architectures
@dialects
@kinds
@torch.no_grad()
def test_loaded_adapter_equals_saved_one(name, dialect, classifier, tmp_path):
    model, ids = make(name, classifier=classifier, dialect=dialect), tokens()
    logits, state = model(ids).logits, bits(model.shadow)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    loaded = umbra.load(tmp_path / "adapter", base=make_base(name, classifier=classifier))
    assert torch.equal(loaded(ids).logits, logits)
    assert_same_bits(bits(loaded.shadow), state)
    assert loaded.num_trainable_parameters() == 0
    again = umbra.load(tmp_path / "adapter", base=loaded.unload(), trainable=True)
    assert again.num_trainable_parameters() == model.num_trainable_parameters()


OTHER_SHADOWS = {
    "narrow": {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2},
    "deep": {"shadow_num_hidden_layers": 3},
    "dense": {"shadow": "dense"},
    "own": {"embeddings": "own"},
    "heads": {"train_heads": True},
    "no_auxiliary": {"auxiliary_loss_weight": 0.0},
}


@architectures
@pytest.mark.parametrize("shape", OTHER_SHADOWS)
@torch.no_grad()
def test_other_shadow_forms_round_trip(name, shape, tmp_path):
    model, ids = make(name, **OTHER_SHADOWS[shape]), tokens()
    model.save_pretrained(tmp_path)
    loaded = umbra.load(tmp_path, base=make_base(name))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@architectures
@torch.no_grad()
def test_pretrained_shadow_round_trips(name, tmp_path):
    """Its own folder is not needed any more once the adapter has been saved."""
    small = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModel.from_config(small).save_pretrained(tmp_path / "small")
    model, ids = make(name, shadow=str(tmp_path / "small")), tokens()
    model.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "small").iterdir():
        file.unlink()
    loaded = umbra.load(tmp_path / "adapter", base=make_base(name))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_unload_disables_checkpointing():
    model = make("llama")
    model.activation_checkpointing_enable()
    base = model.unload()
    assert not base.is_activation_checkpointing
    assert not base.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("training", [True, False])
def test_unload_restores_base_mode(training):
    """Its mode, also of modules of their own, and which of its blocks checkpointed."""
    base = make_base().train(training)
    base.activation_checkpointing_enable()
    locate(base).blocks[2].train(not training)
    before = locate(base).blocks[0].gradient_checkpointing, [m.training for m in base.modules()]
    model = umbra.attach(base, umbra.ShadowConfig(first_layer=2))
    model.train(not training)
    model.activation_checkpointing_enable()
    assert model.unload() is base
    assert (locate(base).blocks[0].gradient_checkpointing, [m.training for m in base.modules()]) == before


@kinds
def test_unloaded_model_raises_clear_error(classifier):
    model, ids = make("llama", classifier=classifier), tokens()
    expected = model.shadow.state_dict()
    base = model.unload()
    with pytest.raises(umbra.StateError, match=r"unload\(\) has returned the base"):
        model(ids)
    with pytest.raises(umbra.StateError, match=r"unload\(\) has returned"), model.shadow_only():
        model(ids)
    again = umbra.attach(base, model.shadow_config)
    again.shadow.load_state_dict(expected)
    again(ids)


def test_checkpointing_stops_gradient_below_first_coupled_block():
    model = make("llama", first_layer=2).train()
    model.activation_checkpointing_enable()
    seen = []
    blocks = locate(model.base).blocks
    blocks[1].register_forward_hook(lambda block, args, output: seen.append(output.requires_grad))
    model(tokens(), labels=tokens()).loss.backward()
    assert seen and not any(seen)


@pytest.mark.parametrize("places", [{"a": 0, "b": 1}, {"a": "cuda:0", "b": "cuda:1", "c": "cpu"}])
def test_base_on_several_devices_is_refused(places):
    base = make_base()
    base.hf_device_map = places
    umbra.attach(base).unload()  # a map that nothing goes by any more
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(umbra.BaseModelError, match="spread over cuda:0, cuda:1"):
        umbra.attach(base)
    base.hf_device_map = {"a": 0, "b": "cpu", "c": "disk", "d": "cuda:0"}
    umbra.attach(base)
