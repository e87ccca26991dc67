"""kernels/products.py: products of linear layers on a CPU by oneDNN are PyTorch's own, and leave nothing behind."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import umbra
from support.tiny import ARCHITECTURES, make, make_base, partly_labelled, tokens
from umbra.method import kernels
from umbra.method.kernels import products as module

N, K = 24, 40


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    """Tiny models, too, on whatever CPU."""
    monkeypatch.setattr(module, "SMALLEST", 1)
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each product that oneDNN computes."""
    made, was = [], module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *given: made.append(1) or was(*given))
    return made


INPUTS = {
    "a row": lambda: torch.randn(K),
    "rows": lambda: torch.randn(5, K),
    "a batch": lambda: torch.randn(2, 7, K),
    "four dimensions": lambda: torch.randn(2, 3, 4, K),
    "transposed": lambda: torch.randn(7, 2, K).transpose(0, 1),
    "strided": lambda: torch.randn(2, 14, K)[:, ::2],
    "columns first": lambda: torch.randn(K, 2, 7).permute(1, 2, 0),
    "expanded": lambda: torch.randn(2, 1, K).expand(2, 7, K),
    "no rows": lambda: torch.randn(0, K),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", INPUTS)
def test_matmul_equals_pytorch(form, bias):
    torch.manual_seed(0)
    x, weight, b = INPUTS[form](), torch.randn(N, K), torch.randn(N) if bias else None
    torch.testing.assert_close(kernels.product(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for given, linear in ((mine, kernels.product), (theirs, F.linear)):
        (once,) = torch.autograd.grad(linear(given, weight, b).sin().sum(), given, create_graph=True)
        once.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


OTHERS = {
    "float64": (torch.float64, nullcontext, False),
    "bfloat16": (torch.bfloat16, nullcontext, False),
    "a trainable weight": (torch.float32, nullcontext, True),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16), False),
    "the plain forms": (torch.float32, kernels.reference, False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_unsupported_matmuls_fall_back_to_pytorch(kind, calls):
    dtype, context, trainable = OTHERS[kind]
    layer, x = nn.Linear(K, N).to(dtype).requires_grad_(trainable), torch.randn(3, K, dtype=dtype)
    kernels.patch_linears([layer])
    with context():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not calls
    with torch.no_grad():
        layer(x)
    assert len(calls) == (kind in ("a trainable weight", "autocast", "the plain forms"))


def test_function_transforms_fall_back_to_pytorch(calls):
    layer = nn.Linear(K, N).requires_grad_(False)
    kernels.patch_linears([layer])
    x = torch.randn(4, 3, K)
    torch.testing.assert_close(torch.func.vmap(layer)(x), F.linear(x, layer.weight, layer.bias))
    assert not calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_and_generation_equal_plain(name, calls):
    model, ids, found = make(name), tokens(2, 9), []
    labels = partly_labelled(ids)
    for context in (nullcontext, kernels.reference):
        with context():
            model.zero_grad()
            loss = model.train()(ids, labels=labels).loss
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append((loss.detach(), gradients, model.eval().generate(ids, max_new_tokens=6, do_sample=False)))
    (loss, gradients, text), (plain_loss, plain_gradients, plain_text) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7
    assert torch.equal(text, plain_text)
    assert calls


def quick(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), module.PatchedForward)]


def test_unloading_leaves_nothing_behind():
    base, ids = make_base(), tokens()
    expected = base(ids).logits
    model = umbra.attach(base)
    assert quick(base)
    model.unload()
    assert not quick(base)
    assert torch.equal(base(ids).logits, expected)


def test_detached_model_is_unpatched():
    assert not quick(make("llama").detached())


def test_foreign_patches_stay():
    layer = nn.Linear(K, N)
    theirs = layer.forward = lambda x: x
    kernels.patch_linears([layer])
    kernels.unpatch_linears([layer])
    assert layer.forward is theirs


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_use_their_weights(way, calls):
    model = make("llama").eval()
    twin, ids = way(model), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        for p in model.parameters():
            p.zero_()
        calls.clear()
        torch.testing.assert_close(twin(ids).logits, expected)
    assert calls


def test_small_matrices_use_pytorch(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", N * K + 1)
    layer = nn.Linear(K, N)
    kernels.patch_linears([layer])
    assert not quick(layer)


@pytest.mark.parametrize(("cpu", "faster"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_intel_cpus_use_mkl(cpu, faster, monkeypatch, calls):
    monkeypatch.setattr(module.Path, "read_text", lambda *_, **__: f"vendor_id : {cpu}")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", module._onednn_is_faster())
    layer = nn.Linear(K, N).requires_grad_(False)
    kernels.patch_linears([layer])
    kernels.product(torch.randn(3, K), layer.weight, layer.bias)
    assert bool(quick(layer)) == bool(calls) == faster
