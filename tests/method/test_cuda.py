"""On a GPU: what the CPU computes in fp32, with the Triton kernels of block boundaries. Skipped where there is none."""

import copy

import pytest
import torch
from transformers import CompileConfig

import umbra
from support.drafts import assert_some_of_both, close_draft, drafted, each_architecture, plain
from support.runs import NARROW, RECORDS, losses, pretrain_settings, train_settings, write
from support.tiny import DIALECTS, assert_same, gradients, make, make_base, partly_labelled, tokens
from support.tokenizer import make_tokenizer
from umbra.evaluation.scoring import on_accelerator
from umbra.method import kernels
from umbra.method.kernels import boundary_triton
from umbra.training.pretrain import pretrain
from umbra.training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
dialects = pytest.mark.parametrize("dialect", [*DIALECTS, "umbra"])
DEVICE = "cuda"


@pytest.fixture
def settings(tmp_path, base_folder):
    return train_settings(tmp_path, base_folder)


@pytest.fixture
def launches(monkeypatch):
    """How often the Triton kernels of a block boundary were launched."""
    counted, run = [], boundary_triton.update_and_inject
    monkeypatch.setattr(boundary_triton, "update_and_inject", lambda *given: counted.append(1) or run(*given))
    return counted


def on_gpu(model):
    return copy.deepcopy(model).to(DEVICE)


def step(model, ids):
    """Logits, and the gradients of the shadow, from a training step."""
    ids = ids.to(model.device)
    out = model.train()(ids, labels=partly_labelled(ids))
    out.loss.backward()
    return out.loss.detach().cpu(), {k: g.cpu() for k, g in gradients(model).items()}


# -- training ----------------------------------------------------------------------------------------------------------


@each_architecture
@dialects
def test_training_step_equals_cpu(name, dialect, launches):
    model, ids = make(name, dialect=dialect, auxiliary_loss_weight=0.5), tokens(3, 17)
    there = on_gpu(model)
    expected, found = step(model, ids), step(there, ids)
    assert launches
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert_same(found[1], expected[1], 2e-3)


@dialects
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dialect, dtype, launches):
    single = make(dialect=dialect).to(DEVICE)
    half = copy.deepcopy(single)
    half.base.to(dtype)
    (expected, wanted), (loss, found) = step(single, tokens(3, 17)), step(half, tokens(3, 17))
    assert launches
    torch.testing.assert_close(loss.float(), expected, rtol=0.03, atol=0.03)
    apart = sum(float((found[k].float() - wanted[k]).norm()) ** 2 for k in wanted) ** 0.5
    assert apart < 0.15 * sum(float(g.norm()) ** 2 for g in wanted.values()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_step_is_close_to_float32(dtype):
    model, ids = make().to(DEVICE), tokens(3, 17)
    expected, _ = step(model, ids)
    model.zero_grad()
    with torch.autocast("cuda", dtype):
        loss, found = step(model, ids)
    torch.testing.assert_close(loss.float(), expected, rtol=0.03, atol=0.03)
    assert all(torch.isfinite(g).all() and g.any() for g in found.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_dropout_masks_are_equal(reentrant):
    model, ids = make(dropout=0.3).to(DEVICE), tokens(3, 17)
    torch.manual_seed(5)
    expected = step(model, ids)
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(5)
    found = step(model, ids)
    torch.testing.assert_close(found[0], expected[0])
    assert_same(found[1], expected[1], 1e-4)
    torch.manual_seed(6)
    assert abs(step(model, ids)[0] - expected[0]) > 1e-4


def test_compiled_step_equals_eager():
    torch._dynamo.reset()
    model, ids = make().to(DEVICE), tokens(3, 17).to(DEVICE)
    expected = step(model, ids)
    model.zero_grad()
    call = torch.compile(model)
    loss = call(ids, labels=partly_labelled(ids)).loss
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected[0], rtol=1e-4, atol=1e-5)
    assert_same({k: g.cpu() for k, g in gradients(model).items()}, expected[1], 2e-3)


def test_umbra_train_equals_cpu(settings, tmp_path):
    given = {**settings, "num_train_epochs": 2, "learning_rate": 3e-3, "dropout": 0.0}
    train(given)
    train({**given, "use_cpu": False, "output_dir": str(tmp_path / "gpu")})
    here, there = losses(settings["output_dir"]), losses(tmp_path / "gpu")
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=0.02, atol=0.02)
    assert here[-1][0] < here[0][0] - 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_umbra_train_detached_distilled_and_scored(settings, tmp_path, bf16, capsys):
    from umbra.cli import main

    train({**settings, "use_cpu": False, "distillation_weight": 0.5, "bf16": bf16, "num_train_epochs": 3})
    train({**settings, "use_cpu": False, "detached_only": True, "output_dir": str(tmp_path / "alone"), "bf16": bf16})
    data = write(tmp_path / "test.jsonl", RECORDS)
    main(["eval", settings["output_dir"], data, "--modes", "base,attached,detached", "--max_new_tokens", "3"])
    assert "attached" in capsys.readouterr().out


def test_umbra_pretrain_runs(base_folder, tmp_path):
    """All stages, of text and of what the base writes there; and with the teacher kept on disk."""
    given = {**pretrain_settings(tmp_path, base_folder), "use_cpu": False, "max_steps": 6}
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in RECORDS[:8]])
    own = {"prompts": prompts, "own_documents": 8, "own_new_tokens": 40}
    found = pretrain({**given, **own, **NARROW, "init": "random", "stages": "alignment,distillation,next_token"})
    assert found["3-next_token"]["cross_entropy"] < found["start"]["cross_entropy"]
    kept = {"stages": "distillation", "teacher_top_k": 8, "teacher_cache": True, "output_dir": str(tmp_path / "kept")}
    found = pretrain({**given, **kept})
    assert found["1-distillation"]["divergence"] < found["start"]["divergence"]


# -- inference ---------------------------------------------------------------------------------------------------------


@each_architecture
@dialects
def test_cached_decoding_equals_cpu(name, dialect):
    model, ids = make(name, dialect=dialect), tokens(3, 12)
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    there = on_gpu(model)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        expected = plain(model, ids, attention_mask=mask, **options)
        found = plain(there, ids.to(DEVICE), attention_mask=mask.to(DEVICE), **options)
        assert torch.equal(found.cpu(), expected), options


@each_architecture
def test_drafted_decoding_equals_plain(name):
    model, ids = close_draft(name).to(DEVICE), tokens(1).to(DEVICE)
    expected = plain(model, ids)
    found = [drafted(model, ids, k) for k in (1, 4)] + [
        drafted(model, ids, "auto", assistant_confidence_threshold=None)
    ]
    assert all(torch.equal(out.sequences, expected) for out in found)
    assert_some_of_both(*found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_static_decoding_equals_eager(name, mode):
    """With CUDA graphs in the second mode; twice, since the first calls only record."""
    torch._dynamo.reset()
    model = make(name).to(DEVICE)
    for seed in (3, 4):
        ids = tokens(2, 9, seed).to(DEVICE)
        expected = plain(model, ids)
        found = plain(model, ids, cache_implementation="static", compile_config=CompileConfig(mode=mode))
        assert torch.equal(found, expected)


def test_reference_and_kernels_agree(launches):
    model, ids = make().to(DEVICE), tokens(4, 33).to(DEVICE)
    with torch.no_grad():
        found = model(ids).logits
        assert launches
        with kernels.reference():
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapter_saves_loads_and_detaches(tmp_path):
    model, ids = make().to(DEVICE), tokens().to(DEVICE)
    with torch.no_grad():
        expected, alone = model(ids).logits, model.detached()(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = umbra.load(tmp_path / "adapter", base=make_base().to(DEVICE))
        torch.testing.assert_close(again(ids).logits, expected)
        on_cpu = umbra.load(tmp_path / "adapter", base=make_base())
        torch.testing.assert_close(on_cpu(ids.cpu()).logits, expected.cpu(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again.detached()(ids).logits, alone)
        torch.testing.assert_close(on_accelerator(on_cpu)(ids).logits, expected)


def test_shadow_is_attached_on_base_device():
    base = make_base().to(DEVICE, torch.bfloat16)
    model = umbra.attach(base, umbra.ShadowConfig(rank=4))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {p.dtype for p in model.shadow.parameters() if p.requires_grad} == {torch.float32}
    model.generate(tokens().to(DEVICE), max_new_tokens=3, pad_token_id=0)


def test_two_adapters_share_one_batch():
    model, ids = make().to(DEVICE), tokens(3).to(DEVICE)
    model.add_adapter(umbra.ShadowConfig(rank=4, dropout=0.0, alpha=0.5), "other")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    torch.nn.init.normal_(model.adapter("other").couplings.injections["1"].up.weight)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["default", "other", None]).logits
        torch.testing.assert_close(mixed[:1], model(ids[:1]).logits, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2:], model(ids[2:]).logits, rtol=1e-4, atol=1e-4)


def test_stock_pipeline_runs():
    from transformers import pipeline

    pipe = pipeline("text-generation", model=make().to(DEVICE), tokenizer=make_tokenizer())
    assert pipe("ab", max_new_tokens=3)[0]["generated_text"].startswith("ab")
