"""Several shadows on one base, and batches whose rows have different ones."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

import umbra
from support.families import build
from support.tiny import HIDDEN, LAYERS, assert_same, gradients, make, make_base, scramble, tokens
from umbra import ShadowConfig
from umbra.base.architectures import locate

compat = pytest.mark.compat
BASES = ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "qwen3_moe"]
# On different blocks, of different sizes and dialects, with their own heads or none.
FIELDS = {
    "a": {"rank": 4},
    "b": {"dialect": "peft", "rank": 3, "layers": (0, 2), "shadow_num_hidden_layers": 2},
    "c": {"shadow_hidden_size": HIDDEN // 2, "layers": (1,), "train_heads": True},
}
NAMES = ["a", "b", None, "c", "a", "__base__"]
COMMON = {"dropout": 0.0, "alpha": 0.5}


def config(name: str, **more) -> ShadowConfig:
    return ShadowConfig(**{**COMMON, **FIELDS[name], **more})


def make_three(base: str = "llama", **more):
    """A base with shadows a (active), b and c."""
    model = umbra.attach(make_base(base, **more), config("a"))
    model.rename_adapter("default", "a")
    for name in ("b", "c"):
        model.add_adapter(config(name), name)
    for seed, name in enumerate("abc"):
        scramble(model.adapter(name), seed + 1)
    return model.eval()


def alone(base: str, name: str | None, **more):
    """What a row with that adapter must be equal to: a model that has only this one."""
    if name in (None, "__base__"):
        return make_base(base, **more)
    model = umbra.attach(make_base(base, **more), config(name))
    scramble(model.shadow, "abc".index(name) + 1)
    return model.eval()


def padded_tokens(rows: int = len(NAMES), length: int = 9):
    """Left-padded sequences of different lengths, and their mask."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask


# -- a cache that has layers of all of them ----------------------------------------------------------------------------

WAYS = {
    "dynamic": {}, "static": {"cache_implementation": "static"}, "chunks": {"prefill_chunk_size": 4}, "drafted": {"draft": 3},
}  # fmt: skip
CANNOT = {("mamba", "static"), ("mamba", "drafted"), ("mamba", "chunks")}  # nor can transformers


@pytest.mark.parametrize(("base", "way"), [(b, w) for b in ("mamba", "mistral") for w in WAYS if (b, w) not in CANNOT])
@torch.no_grad()
def test_past_length_is_read_from_shadow_layers(base, way):
    """A dense shadow beside a base without full attention: transformers would ask the first one's layers, which are empty."""

    def pair(seeds):
        beside = build("mamba") if base == "mamba" else make_base("mistral")
        model = umbra.attach(beside, ShadowConfig(rank=4, shadow="dense", **COMMON))
        for name in list(seeds)[1:]:
            model.add_adapter(ShadowConfig(rank=4, shadow="dense", **COMMON), name)
        for name, seed in seeds.items():
            scramble(model.adapter(name), seed)
        return model.eval()

    both, only = pair({"default": 1, "second": 2}), pair({"default": 2})
    ids, mask = padded_tokens(3)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = only.generate(ids, **options, **({} if way == "drafted" else WAYS[way]))
    named = {} if way == "drafted" else {"adapter_names": ["second"] * 3}
    assert not torch.equal(expected, both.generate(ids, **options, **WAYS[way]))
    assert torch.equal(expected, both.generate(ids, **options, **WAYS[way], **named)) or way == "drafted"
    both.set_adapter("second")
    assert torch.equal(expected, both.generate(ids, **options, **WAYS[way]))
    if way == "dynamic":  # and a second turn, without padding, which mamba cannot have there
        options |= {"pad_token_id": None, "attention_mask": None}
        found = both.generate(tokens(3, 9), **options, return_dict_in_generate=True)
        longer = torch.cat([found.sequences, tokens(3, 4, seed=9)], 1)
        again = both.generate(longer, **options, past_key_values=found.past_key_values)
        assert torch.equal(again, only.generate(longer, **options))


@pytest.mark.parametrize("base", ["mamba", "llama"])
@torch.no_grad()
def test_base_rows_mix_with_several_adapters(base):
    model = umbra.attach(
        build("mamba") if base == "mamba" else make_base(base), ShadowConfig(rank=4, shadow="dense", **COMMON)
    )
    model.add_adapter(ShadowConfig(rank=4, shadow="dense", **COMMON), "second")
    scramble(model.adapter("second"), 2)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with model.disable_adapter():
        bare = model.generate(tokens(), **options)
    for name in (None, "__base__"):
        assert torch.equal(model.generate(tokens(), **options, adapter_names=[name] * 2), bare)
    model.set_adapter("second")
    filled = model.generate(tokens(), **options, return_dict_in_generate=True)
    model.set_adapter("default")
    longer = torch.cat([filled.sequences, tokens(2, 3, seed=5)], 1)
    if base == "llama":
        with model.disable_adapter(), pytest.raises(umbra.StateError, match="with the adapter enabled"):
            model.generate(longer, past_key_values=filled.past_key_values, max_new_tokens=1)


@torch.no_grad()
def test_partial_cache_is_refused_on_recurrent_base():
    model = umbra.attach(build("mamba"), ShadowConfig(rank=4, shadow="dense", **COMMON))
    model.add_adapter(ShadowConfig(rank=4, shadow="dense", **COMMON), "second")
    bare, other = (DynamicCache(config=model.config) for _ in range(2))
    with model.disable_adapter():
        model(tokens(), past_key_values=bare)
    model(tokens(), past_key_values=other)
    model(tokens(), past_key_values=other)
    model.set_adapter("second")
    for cache in (bare, other):
        with pytest.raises(umbra.StateError, match="holds other tokens"):
            model(tokens(), past_key_values=cache)


def test_mixed_batch_refuses_guidance():
    model = make_three()
    with pytest.raises(umbra.ConfigError, match="guidance_scale would apply the active adapter"):
        model.generate(tokens(2), adapter_names=["b", "b"], guidance_scale=1.5, max_new_tokens=2)
    model.set_adapter("b")
    model.generate(tokens(2), guidance_scale=1.5, max_new_tokens=2)


@pytest.mark.parametrize("classifier", [False, True])
def test_shadow_only_uses_one_adapter(classifier):
    model = make("llama", classifier=classifier)
    with model.shadow_only(), pytest.raises(umbra.ConfigError, match="runs the active adapter"):
        model(tokens(2), adapter_names=["default", "default"])


# -- names -----------------------------------------------------------------------------------------------------------


@compat("Many adapters", "load, add, name, activate, replace while loaded, rename, delete, list")
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_adapter_among_others_equals_adapter_alone(name):
    model, ids = make_three(), tokens()
    model.set_adapter(name)
    assert model.adapters[0] == model.active_adapter == name
    assert sorted(model.adapters) == ["a", "b", "c"]
    expected = alone("llama", name)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, make_base()(ids).logits)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_only_active_adapter_is_trained(name):
    model, ids = make_three(), tokens()
    frozen = {n: copy.deepcopy(model.adapter(n).state_dict()) for n in model.adapters if n != name}
    model.set_adapter(name)
    model.train()(ids, labels=ids).loss.backward()
    expected = alone("llama", name)
    expected.train()(ids, labels=ids).loss.backward()
    assert_same(gradients(model), gradients(expected))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for other, weights in frozen.items():
        assert all(torch.equal(v, weights[k]) for k, v in model.adapter(other).state_dict().items())


def test_frozen_weights_stay_frozen_after_activation():
    model = make_three()
    model.shadow.backbone.requires_grad_(False)
    before = [n for n, p in model.shadow.named_parameters() if p.requires_grad]
    model.set_adapter("b")
    assert not any(p.requires_grad for p in model.adapter("a").parameters())
    model.set_adapter("a")
    assert [n for n, p in model.shadow.named_parameters() if p.requires_grad] == before


@compat("Many adapters", "each saved, loaded and detached on its own")
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_each_adapter_saves_loads_and_detaches(name, tmp_path):
    model, ids = make_three(), tokens()
    model.save_pretrained(tmp_path / name, adapter_name=name)
    found = umbra.load(tmp_path / name, make_base())
    torch.testing.assert_close(found(ids).logits, alone("llama", name)(ids).logits)
    other = make_three()
    other.load_adapter(tmp_path / name, "again")
    other.set_adapter("again")
    torch.testing.assert_close(other(ids).logits, found(ids).logits)
    torch.testing.assert_close(other.detached()(ids).logits, found.detached()(ids).logits)


@pytest.mark.parametrize("name", ["a", "b"])
def test_loaded_adapter_can_be_replaced(name, tmp_path):
    """Active or not; and where the folder is damaged, nothing changes."""
    model, ids = make_three(), tokens()
    model.save_pretrained(tmp_path / "c", adapter_name="c")
    before = model(ids, adapter_names=["a", "b"]).logits
    (tmp_path / "bad").mkdir()
    for path, error in ((tmp_path / "bad", umbra.CheckpointError), (tmp_path / "missing", umbra.CheckpointError)):
        with pytest.raises(error):
            model.load_adapter(path, name, replace=True)
    torch.testing.assert_close(model(ids, adapter_names=["a", "b"]).logits, before)
    with pytest.raises(umbra.ConfigError, match="replace=True"):
        model.load_adapter(tmp_path / "c", name)
    model.load_adapter(tmp_path / "c", name, replace=True)
    assert sorted(model.adapters) == ["a", "b", "c"] and model.active_adapter == "a"
    rows = model(ids[:1].repeat(2, 1), adapter_names=[name, "c"]).logits
    torch.testing.assert_close(rows[0], rows[1])


def test_adapters_can_be_renamed_and_deleted():
    model, ids = make_three(), tokens()
    model.rename_adapter("a", "first")
    model.rename_adapter("b", "second")
    assert sorted(model.adapters) == ["c", "first", "second"]
    torch.testing.assert_close(model(ids).logits, alone("llama", "a")(ids).logits)
    count = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.adapter("second").parameters())
    model.delete_adapter("second")
    assert sum(p.numel() for p in model.parameters()) == count - own
    torch.testing.assert_close(model(ids, adapter_names=["c", "first"]).logits[0], alone("llama", "c")(ids).logits[0])
    with pytest.raises(umbra.StateError, match="active"):
        model.delete_adapter("first")
    base = model.unload()
    torch.testing.assert_close(base(ids).logits, make_base()(ids).logits)


@pytest.mark.parametrize("name", ["", "x.y", "__base__", 3, None])
def test_invalid_adapter_name_is_refused(name):
    with pytest.raises(umbra.ConfigError, match="name"):
        make_three().add_adapter(config("a"), name)


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter", "adapter"])
def test_unknown_adapter_name_lists_known_names(call):
    with pytest.raises(umbra.ConfigError, match=r"'x'.*a, b, c"):
        getattr(make_three(), call)("x")


def test_duplicate_adapter_name_is_refused():
    model = make_three()
    with pytest.raises(umbra.ConfigError, match="already"):
        model.add_adapter(config("a"), "b")
    with pytest.raises(umbra.ConfigError, match="already"):
        model.rename_adapter("a", "b")


def test_trainer_warns_about_unsaved_adapters():
    """transformers' Trainer warns of every other tensor that it misses in resuming."""
    model = make_three()
    for change in (lambda: None, lambda: model.set_adapter("b"), lambda: model.rename_adapter("c", "d")):
        change()
        kept = {key for key in model.state_dict() if key.startswith("shadow.")}
        assert model._keys_to_ignore_on_save == model.state_dict().keys() - kept


# -- mixed batches ---------------------------------------------------------------------------------------------------


@compat("Many adapters", "mixed batches: each row of a forward names its adapter, or none")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cached", [False, True])
def test_mixed_forward_equals_separate_rows(base, cached):
    model = make_three(base)
    ids, mask = padded_tokens()
    found = model(ids, attention_mask=mask, adapter_names=NAMES, use_cache=cached).logits
    for row, name in enumerate(NAMES):
        expected = alone(base, name)(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
        torch.testing.assert_close(found[row : row + 1, row:], expected[:, row:], rtol=1e-4, atol=1e-4)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several answers": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
}


@compat("Many adapters", "mixed batches: each row of a generate call names its adapter, or none")
@pytest.mark.parametrize("base", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_mixed_generation_equals_separate_rows(base, mode):
    model = make_three(base)
    ids, mask = padded_tokens()
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, **MODES[mode]}
    answers = options.get("num_return_sequences", 1)
    found = model.generate(ids, attention_mask=mask, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        here = slice(row, row + 1)
        expected = alone(base, name).generate(ids[here], attention_mask=mask[here], **options)
        assert torch.equal(found[row * answers : (row + 1) * answers], expected), name


def test_base_runs_once_per_mixed_batch():
    model, shapes = make_three(), []
    locate(model.base).blocks[0].register_forward_hook(lambda block, args, out: shapes.append(len(args[0])))
    model(tokens(6), adapter_names=NAMES)
    assert shapes == [6]


def test_shadow_reads_only_its_rows_without_cache():
    model, shapes = make_three(), []
    model.adapter("b").backbone.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    model(tokens(6), adapter_names=NAMES, use_cache=False)
    assert shapes == [1]


@compat("Many adapters", "mixed batches for sequence classification")
@pytest.mark.parametrize("base", ["llama", "qwen3", "gpt2"])
def test_mixed_classification_equals_separate_rows(base):
    options = {"classifier": True, "num_labels": 3}
    model, ids = make_three(base, **options), tokens(6)
    found = model(ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row : row + 1], alone(base, name, **options)(ids[row : row + 1]).logits)


def test_classifier_shadow_is_not_distilled():
    """Neither the first one nor one more."""
    taught = umbra.ShadowConfig(distillation_weight=0.5)
    with pytest.raises(umbra.ConfigError, match="distillation_weight is for language models"):
        umbra.attach(make_base(classifier=True), taught)
    model = make("llama", classifier=True)
    with pytest.raises(umbra.ConfigError, match="distillation_weight is for language models"):
        model.add_adapter(taught, "second")
    assert model.adapters == ["default"]


def test_classifiers_with_other_label_counts_are_refused(tmp_path):
    make("llama", classifier=True, base_options={"num_labels": 2}).save_pretrained(tmp_path / "two")
    model = make("llama", classifier=True, base_options={"num_labels": 3})
    with pytest.raises(umbra.CheckpointError, match="2 labels"):
        model.load_adapter(tmp_path / "two", "two")
    assert model.adapters == ["default"]


def test_each_classifier_keeps_its_label_names(tmp_path):
    names = {"x": {0: "no", 1: "yes"}, "y": {0: "bad", 1: "good"}}
    for name, labels in names.items():
        make("llama", classifier=True, base_options={"id2label": labels}).save_pretrained(tmp_path / name)
    model = umbra.load(tmp_path / "x", make_base(classifier=True, id2label=names["x"]))
    model.load_adapter(tmp_path / "y", "y")
    model.save_pretrained(tmp_path / "again", adapter_name="y")
    text = (tmp_path / "again" / "adapter_config.json").read_text()
    assert '"good"' in text and '"yes"' not in text


def test_mixed_evaluation_loss_is_task_loss():
    model, ids = make_three(), tokens(3)
    losses = [alone("llama", n)(ids[r : r + 1], labels=ids[r : r + 1]).loss for r, n in enumerate(["a", "b", None])]
    found = model(ids, labels=ids, adapter_names=["a", "b", None])
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())
    assert found.logits.shape[:2] == ids.shape


def test_single_name_selects_adapter_for_all_rows():
    model, ids = make_three(), tokens()
    torch.testing.assert_close(model(ids, adapter_names=["b", "b"]).logits, alone("llama", "b")(ids).logits)


@pytest.mark.parametrize("names", [[], ["a"] * 4, ["a"] * 9])
def test_wrong_number_of_names_is_refused(names):
    with pytest.raises(umbra.ConfigError, match="one for each row"):
        make_three()(tokens(6), adapter_names=names)


def test_mixed_batch_training_is_refused():
    ids = tokens()
    with pytest.raises(umbra.ConfigError, match="inference"):
        make_three().train()(ids, labels=ids, adapter_names=["a", "b"])


# -- while others come and go ----------------------------------------------------------------------------------------


def test_decoding_continues_while_adapters_change(tmp_path):
    """An adapter's place in the cache never changes, so that a cache held by the user stays right."""
    model, ids = make_three(), tokens()
    model.save_pretrained(tmp_path / "c", adapter_name="c")
    expected = alone("llama", "c")(ids).logits
    first = model(ids[:, :5], adapter_names=["c", "c"], use_cache=True)
    model.delete_adapter("b")
    model.add_adapter(config("a"), "d")
    second = model(ids[:, 5:], adapter_names=["c", "c"], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    places = [set(model.adapter(n).cache_layers) for n in model.adapters]
    assert sum(map(len, places)) == len(set.union(*places)) and min(set.union(*places)) == LAYERS


def test_deleted_adapter_slot_is_reused():
    model = make_three()
    layers = model.config.num_hidden_layers
    for _ in range(5):
        model.delete_adapter("b")
        model.add_adapter(config("b"), "b")
    assert model.config.num_hidden_layers == layers


@compat("Many adapters", "threads that name different adapters on one model")
def test_threads_use_different_adapters():
    model, ids = make_three(), tokens()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = {n: alone("llama", n).generate(ids, **options) for n in "abc"}
    wrong = []

    def work(name: str) -> None:
        for _ in range(5):
            found = model.generate(ids, adapter_names=[name, name], **options)
            if not torch.equal(found, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcabc"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_copied_model_has_all_adapters():
    model, ids = copy.deepcopy(make_three()), tokens(6)
    torch.testing.assert_close(model(ids, adapter_names=NAMES).logits, make_three()(ids, adapter_names=NAMES).logits)


def test_additional_adapter_costs_only_its_weights():
    model = make_three()
    held = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    model.add_adapter(config("b"), "d")
    now = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    new = model.adapter("d")
    assert now - held == sum(p.numel() for p in new.parameters()) + sum(b.numel() for b in new.buffers())


def test_state_dict_with_old_prefix_of_inactive_adapters_loads():
    model = make_three()
    state = {k.replace("inactive_adapters.", "resting."): v.clone() for k, v in model.state_dict().items()}
    assert any(k.startswith("resting.b.") for k in state)
    scramble(model.adapter("b"), 9)
    model.load_state_dict(state)
    assert all(torch.equal(v, state[f"resting.b.{k}"]) for k, v in model.adapter("b").state_dict().items())
