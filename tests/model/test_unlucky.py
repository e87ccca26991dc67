"""What happens to models in the middle of their lives: moved, resized, sent to another process, interrupted."""

import copy
import io
import multiprocessing
import pickle
import signal

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import umbra
from support.fuzz import limits
from support.threads import generate, in_threads
from support.tiny import (
    CONFIGS,
    DIALECTS,
    VOCAB,
    assert_same,
    gradients,
    make,
    make_base,
    partly_labelled,
    scramble,
    shadow_logits,
    tokens,
)  # fmt: skip
from umbra.base.architectures import locate
from umbra.method.hooks import open_contexts

NAMES = ["llama", "gpt2", "gemma3_text", "qwen3_moe"]
some = pytest.mark.parametrize("name", NAMES)
dialects = pytest.mark.parametrize("dialect", DIALECTS)
kinds = pytest.mark.parametrize("classifier", [False, True], ids=["lm", "classifier"])


@pytest.fixture(autouse=True)
def no_frame_stays_open():
    yield
    assert open_contexts() == []


# -- moved -------------------------------------------------------------------------------------------------------------

MOVES = {
    "half()": (lambda model: model.half(), torch.float16),
    "bfloat16()": (lambda model: model.bfloat16(), torch.bfloat16),
    "to(float16)": (lambda model: model.to(torch.float16), torch.float16),
    "to(bfloat16)": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to(float64)": (lambda model: model.to(torch.float64), torch.float64),
    "double()": (lambda model: model.double(), torch.float64),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@kinds
@pytest.mark.parametrize("move", MOVES)
def test_casting_moves_base_and_shadow(name, move, classifier, tmp_path):
    """Against the model that was built of a base in that precision, with the same weights."""
    model, ids = make(name, classifier=classifier), tokens()
    change, dtype = MOVES[move]
    with torch.no_grad():
        exact = model(ids).logits
    assert change(model) is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        moved = model(ids).logits
    tolerance = {torch.float16: 0.03, torch.bfloat16: 0.25, torch.float64: 1e-4}[dtype] * float(exact.abs().max())
    assert (moved - exact).abs().max() < tolerance
    if not classifier:
        assert generate(model, ids).shape == (2, 19)
    loss = model.train()(ids, labels=torch.tensor([0, 1]) if classifier else partly_labelled(ids)).loss
    loss.backward()
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients(model).values())
    model.eval().save_pretrained(tmp_path)
    base = make_base(name, classifier=classifier).to(dtype)
    with torch.no_grad():
        again = umbra.load(tmp_path, base=base)(ids).logits
    assert (again - moved).abs().max() < tolerance


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_meta_model_has_shapes_and_cannot_be_saved(name, tmp_path):
    model = make(name).to("meta")
    assert all(p.is_meta for p in model.parameters())
    assert model(tokens().to("meta")).logits.shape == (2, 9, VOCAB)
    with pytest.raises(umbra.CheckpointError, match=r"lacks \d+ tensors"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@some
def test_state_dict_round_trips(name):
    """As after `to_empty` on a new device: every weight of base and shadow is in the state dict."""
    model, ids = make(name), tokens()
    with torch.no_grad():
        expected = model(ids).logits
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other = make(name, seed=5)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(ids).logits, expected)


# -- bases that are not loaded yet -------------------------------------------------------------------------------------


@pytest.mark.compat("Bases", "on the meta device, given its weights after attach")
@some
@dialects
def test_meta_base_can_be_filled_later(name, dialect, tmp_path):
    """RAM-efficient loading: attach to an empty base, then give both their weights."""
    full = make(name, dialect=dialect)
    config = copy.deepcopy(full.base.config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = umbra.attach(empty, full.shadow_config)
    assert all(p.is_meta for p in model.base.parameters())
    model.load_state_dict(full.state_dict(), assign=True)
    for target, source in zip(model.modules(), full.modules(), strict=True):
        target._buffers.update(source._buffers)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, full(tokens()).logits)
    full.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = umbra.load(tmp_path, base=empty)
    assert all(p.is_meta for p in found.base.parameters())
    assert_same(found.shadow.state_dict(), full.shadow.state_dict())
    with torch.device("meta"):
        assert all(p.is_meta for p in umbra.load(tmp_path, base=found.unload()).shadow.parameters())


@some
def test_low_memory_base_equals_plain(name, tmp_path):
    make_base(name).save_pretrained(tmp_path / "base")
    model = make(name)
    model.save_pretrained(tmp_path / "adapter")
    found = umbra.load(tmp_path / "adapter", base=str(tmp_path / "base"), low_cpu_mem_usage=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, model(tokens()).logits)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"}, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(umbra.load(tmp_path / "adapter", base=base)(tokens()).logits, model(tokens()).logits)


@pytest.mark.compat("Bases", "offloaded by accelerate to CPU or disk", "trained heads are refused")
@kinds
@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_base_equals_plain(name, offload, classifier, tmp_path):
    """accelerate keeps its weights on the meta device between calls; the shadow lies where they come to compute."""
    fields = {"train_heads": False, "classifier": classifier}
    model, base, ids = make(name, **fields), make_base(name, classifier=classifier), tokens()
    model.save_pretrained(tmp_path / "adapter")
    where = {"offload_dir": str(tmp_path / "disk")} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(base, execution_device=torch.device("cpu"), **where)
    assert base.get_input_embeddings().weight.is_meta
    found = umbra.load(tmp_path / "adapter", base=base, trainable=True)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    labels = torch.tensor([0, 1]) if classifier else ids
    model.train()(ids, labels=labels).loss.backward()
    found.train()(ids, labels=labels).loss.backward()
    assert_same(gradients(found), gradients(model))
    with pytest.raises(umbra.BaseModelError, match="offloaded"):
        umbra.attach(found.unload(), umbra.ShadowConfig(train_heads=True))


# -- another vocabulary ------------------------------------------------------------------------------------------------

SHADOWS = {
    "shared": {},
    "own": {"embeddings": "own"},
    "heads": {"train_heads": True},
    "projected": {"dialect": "peft", "shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_head_dim": 8},
    "own heads": {"embeddings": "own", "train_heads": True},
}


def resized(model, rows: int):
    torch.manual_seed(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.compat("Bases", "resize_token_embeddings of the attached model", "the adapter carries the new rows")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("shadow", SHADOWS)
@pytest.mark.parametrize("rows", [VOCAB + 13, VOCAB, 64])
def test_resized_vocabulary_is_followed(name, shadow, rows, tmp_path):
    if name != "llama" and shadow == "projected":
        shadow = "shared"
    fields = SHADOWS[shadow]
    model, ids = make(name, **fields), tokens() % 60 + 3
    with torch.no_grad():
        before, alone = model(ids).logits, shadow_logits(model, ids)
    table = resized(model, rows).get_input_embeddings()
    kept = min(rows, VOCAB)
    assert table.weight.shape[0] == model.config.vocab_size == model.base.config.vocab_size == rows
    assert not any(p.requires_grad for p in model.base.parameters())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[..., :kept], before[..., :kept], atol=1e-5)
        assert torch.allclose(shadow_logits(model, ids)[..., :kept], alone[..., :kept], atol=1e-5)

    scramble(model.base, 11, 0.15)
    scramble(model.shadow, 12)
    model.base.tie_weights()
    ids = torch.cat([ids, torch.full((2, 1), rows - 1)], dim=1)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape[-1] == rows
        stock = model.detached()
        torch.testing.assert_close(stock(ids).logits, shadow_logits(model, ids), rtol=1e-4, atol=1e-4)
        assert stock.config.vocab_size == rows
    assert generate(model, ids[:, -3:]).max() < rows
    model.train()(ids, labels=ids).loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())

    model.vocabulary.fingerprint = umbra.base.fingerprint.fingerprint(
        locate(model.base), kept
    )  # of the weights scrambled above
    model.eval().save_pretrained(tmp_path / "adapter")
    base = copy.deepcopy(model).unload()
    loaded = umbra.load(tmp_path / "adapter", base=base)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)
    if rows < VOCAB:
        with pytest.raises(umbra.BaseModelError, match="vocab_size"):
            umbra.load(tmp_path / "adapter", base=make_base(name))


def test_every_adapter_head_follows_resize():
    model, ids = make(train_heads=True), tokens()
    model.add_adapter(umbra.ShadowConfig(rank=2, train_heads=True), "b")
    scramble(model.adapter("b"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.adapter("b").heads.modules())
    with torch.no_grad():
        before = model(ids, adapter_names=["default", "b"]).logits
        found = resized(model, VOCAB + 5)(ids, adapter_names=["default", "b"]).logits
    assert torch.allclose(found[..., :VOCAB], before, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.adapter("b").heads.modules())


def test_resize_leaves_classifier_head():
    model, ids = make(classifier=True), tokens()
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(resized(model, VOCAB + 5)(ids).logits, before)


def test_vocabulary_smaller_than_pretrained_shadow_is_handled(tmp_path):
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**CONFIGS["llama"], "vocab_size": 120}))
    small.save_pretrained(tmp_path / "small")
    model, ids = make(shadow=str(tmp_path / "small")), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.detached()(ids).logits, shadow_logits(model, ids), rtol=1e-4, atol=1e-4)
        assert resized(model, 150)(torch.full((1, 3), 149)).logits.shape == (1, 3, 150)
        assert resized(model, 90).detached()(ids % 90).logits.shape[-1] == 90


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hears_control_c():
    """As what is started in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(LogitsProcessor):
    """Control-C at the n-th token: by a real signal, which Python raises wherever it is just then."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, input_ids, scores):
        self.n -= 1
        if not self.n:
            signal.raise_signal(signal.SIGINT)
        return scores


OPTIONS = {"greedy": {}, "static": {"cache_implementation": "static"}, "uncached": {"use_cache": False}}


@some
@pytest.mark.parametrize("mode", OPTIONS)
def test_interrupted_generation_leaves_no_state(name, mode):
    model, ids = make(name), tokens()
    expected = generate(model, ids, **OPTIONS[mode])
    for n in (1, 2, 7):
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, logits_processor=LogitsProcessorList([Interrupt(n)]), **OPTIONS[mode])
        assert open_contexts() == []
        assert torch.equal(generate(model, ids, **OPTIONS[mode]), expected)
    with model.disable_adapter(), pytest.raises(KeyboardInterrupt):
        generate(model, ids, logits_processor=LogitsProcessorList([Interrupt(2)]), **OPTIONS[mode])
    assert torch.equal(generate(model, ids, **OPTIONS[mode]), expected)


@some
@kinds
def test_forward_interrupted_anywhere_leaves_no_state(name, classifier):
    """Of the base, the shadow, the couplings and the heads, in training; the next step is as if nothing had been."""
    model, ids = make(name, classifier=classifier), tokens()
    labels = torch.tensor([0, 1]) if classifier else partly_labelled(ids)
    model.train()(ids, labels=labels).loss.backward()
    expected = gradients(model)
    reached = 0
    for module in list(model.modules())[1:]:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(lambda *_: signal.raise_signal(signal.SIGINT))
            try:
                model(ids, labels=labels)
            except KeyboardInterrupt:
                reached += 1
            handle.remove()
            assert open_contexts() == []
    assert reached > 60
    model(ids, labels=labels).loss.backward()
    assert_same(gradients(model), expected)


@some
def test_interrupted_load_leaves_base_unchanged(name, tmp_path, monkeypatch):
    make(name).save_pretrained(tmp_path)
    base, ids = make_base(name), tokens()
    expected = base(ids).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    for place in ("check_numbers", "check_digest", "check_sizes"):
        with monkeypatch.context() as patch:
            patch.setattr(umbra.adapters.reading, place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                umbra.load(tmp_path, base=base)
        assert torch.equal(base(ids).logits, expected)
        assert all(p.requires_grad for p in base.parameters())


# -- in several threads and processes ----------------------------------------------------------------------------------


def test_four_threads_load_concurrently(tmp_path):
    """Each onto a base of its own: building on the meta device and in float32 is no business of the others."""
    ids, expected = tokens(), []
    for seed, name in enumerate(NAMES):
        model = make(name, seed=seed)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected.append(model(ids).logits)
    bases = [make_base(name, seed=seed) for seed, name in enumerate(NAMES)]

    def work(place: int) -> list[torch.Tensor]:
        found = []
        for _ in range(6):
            model = umbra.load(tmp_path / NAMES[place], base=bases[place])
            with torch.no_grad():
                found.append(model(ids).logits)
            model.unload()
        return found

    for logits, found in zip(expected, in_threads(*[lambda p=p: work(p) for p in range(4)]), strict=True):
        assert all(torch.equal(one, logits) for one in found)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def answer_by_pipe(pipe) -> None:
    model, ids = pickle.loads(pipe.recv_bytes())
    with torch.no_grad():
        pipe.send_bytes(pickle.dumps((model(ids).logits.numpy(), generate(model, ids).numpy())))


@some
def test_model_is_pickled_to_another_process(name):
    model, ids = make(name), tokens()
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=answer_by_pipe, args=(there,))
    process.start()
    with limits():
        here.send_bytes(pickle.dumps((model, ids)))
        logits, text = pickle.loads(here.recv_bytes())
    process.join(20)
    assert process.exitcode == 0
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(logits), model(ids).logits)
    assert torch.equal(torch.from_numpy(text), generate(model, ids))
