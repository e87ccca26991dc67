"""Compiled and exported: whole graphs, the same numbers, and no graph per token."""

import io
import logging
import os
import shutil
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

import umbra
from support.tiny import assert_same, gradients, make, make_base, partly_labelled, scramble, tokens
from umbra.method import kernels

logging.getLogger("torch.__trace").propagate = False  # pytest would keep and format all that the compiler notes down

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "mistral", "gpt2"]
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
SHALLOW = {
    "gpt2": {"n_layer": 2},
    "gemma3_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


def shallow(name: str) -> dict:
    """Two blocks, since tracing takes its time for each."""
    return SHALLOW.get(name, {"num_hidden_layers": 2})


def small(name: str, **fields):
    return make(name, base_options=shallow(name), **fields)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """And the plain form outside the compiler too, so that "the same" means every bit."""
    torch._dynamo.reset()
    counters.clear()
    with kernels.reference():
        yield


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model, backend: str = "eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def step(call, model, ids) -> dict[str, torch.Tensor]:
    call(ids, labels=partly_labelled(ids)).loss.backward()
    return gradients(model)


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.compat("Compiled", "forward, `torch.compile(fullgraph=True)`")
@architectures
@torch.no_grad()
def test_compiled_forward_equals_eager(name):
    model, ids = small(name), tokens()
    call = compiled(model)
    assert torch.equal(call(ids).logits, model(ids).logits)
    assert graphs() == 1


@pytest.mark.compat("Compiled", "training step, `torch.compile(fullgraph=True)`", "every gradient as without")
@architectures
def test_compiled_training_step_equals_eager(name):
    model, ids = small(name).train(), tokens()
    call = compiled(model, "aot_eager")
    assert_same(step(call, model, ids), step(model, model, ids))
    assert graphs() == 1


@pytest.mark.compat("Compiled", "training step, `torch.compile(fullgraph=True)`", "every gradient as without")
def test_batch_shapes_share_graphs():
    """Another length, another number of rows, then any: the third graph serves all, whatever their labels."""
    model = small("llama").train()
    call = compiled(model)
    for rows, length in [(2, 9), (2, 12), (4, 7), (3, 15), (5, 11), (4, 10)]:
        ids = tokens(rows, length, seed=length)
        assert_same(step(call, model, ids), step(model, model, ids))
    assert graphs() == 3


@pytest.mark.compat("Compiled", "training step, `torch.compile(fullgraph=True)`", "every gradient as without")
def test_compiled_checkpointed_step_equals_eager():
    model, ids = small("llama").train(), tokens()
    expected = step(model, model, ids)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(step(compiled(model, "aot_eager"), model, ids), expected)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@pytest.mark.compat("Compiled", "inductor, the default backend")
@torch.no_grad()
def test_inductor_equals_eager():
    model, ids = small("gpt2"), tokens()
    torch.testing.assert_close(compiled(model, "inductor")(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def generate(model, ids, mask=None, backend: str = "eager", **options) -> torch.Tensor:
    """Through the static cache, with the compilation that transformers does by itself on an accelerator."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": mask, **options}
    if options.get("use_cache", True):
        options |= {"cache_implementation": "static", "compile_config": config}
    return model.generate(ids, **options)


def graphs_of_decodes(model) -> list[int]:
    """How many graphs there are after a decode, and after another one of other lengths; both equal the uncached."""
    counts = []
    for length, new in ((9, 12), (5, 16)):
        ids, mask = tokens(2, length, seed=length), torch.ones(2, length, dtype=torch.long)
        mask[0, :3] = 0
        expected = generate(model, ids, mask, max_new_tokens=new, use_cache=False)
        assert torch.equal(generate(model, ids, mask, max_new_tokens=new), expected)
        counts.append(graphs())
    return counts


@pytest.mark.compat("Compiled", '`generate(cache_implementation="static")`', "no compilation per token")
@architectures
def test_static_decoding_compiles_once(name):
    """A sliding window has graphs of its own while it fills, as with the bare base."""
    found = graphs_of_decodes(small(name))
    assert found == ([2, 3] if name in ("gemma3_text", "mistral") else [1, 1])


def test_sliding_windows_compile_as_often_as_base():
    assert graphs_of_decodes(make_base("mistral", **shallow("mistral"))) == [2, 3]


# -- what a compiled call must not forget --------------------------------------------------------------------------


@torch.no_grad()
def test_compiled_call_follows_active_adapter():
    """A graph that was traced with one adapter does not answer for another, for none, or for other rows."""
    model, bare, ids = small("llama"), make_base("llama", **shallow("llama")), tokens()
    model.add_adapter(umbra.ShadowConfig(rank=4, dropout=0.0), "second")
    scramble(model.adapter("second"), 9)
    call, first = compiled(model), model(ids).logits
    assert torch.equal(call(ids).logits, first)
    with model.disable_adapter():
        assert torch.equal(call(ids).logits, bare(ids).logits)
    assert torch.equal(call(ids).logits, first)
    model.set_adapter("second")
    second = model(ids).logits
    assert not torch.equal(second, first)
    assert torch.equal(call(ids).logits, second)
    for names in (["default", "second"], ["second", None]):
        assert torch.equal(call(ids, adapter_names=names).logits, model(ids, adapter_names=names).logits)
    assert torch.equal(call(ids).logits, second)
    model.unload()
    assert torch.equal(torch.compile(model.base, backend="eager")(ids).logits, bare(ids).logits)


@torch.no_grad()
def test_compiled_base_called_directly_raises():
    model = small("llama")
    with pytest.raises(umbra.StateError, match="ShadowModel"):
        torch.compile(model.base, backend="eager")(tokens())


def test_four_threads_call_compiled_model():
    model = small("llama")
    call, batches = compiled(model), [tokens(seed=seed) for seed in range(4)]
    with torch.no_grad():
        call(batches[0])
        expected = [model(ids).logits for ids in batches]
    found: list[list[torch.Tensor]] = [[] for _ in batches]

    def run(place: int) -> None:
        with torch.no_grad():
            found[place] = [call(batches[place]).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(f) == 5 and all(torch.equal(x, e) for x in f) for f, e in zip(found, expected, strict=True))


# -- exported ------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def exported(model, strict: bool) -> nn.Module:
    """Through the file format and back; any number of rows and tokens."""
    ids, shape = tokens(), {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length", max=64)}
    program = torch.export.export(
        Logits(model), (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def assert_same_logits(program, model) -> None:
    for rows, length in ((2, 9), (3, 13), (1, 4)):
        ids = tokens(rows, length, seed=5)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        torch.testing.assert_close(program(ids, mask), model(ids, attention_mask=mask).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.compat("Compiled", "`torch.export` of the attached forward", "any number of rows and tokens")
@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in ("llama", "gemma3_text", "gpt2")), ("llama", True)]
)
@torch.no_grad()
def test_attached_forward_exports(name, strict):
    model = small(name)
    assert_same_logits(exported(model, strict), model)


@pytest.mark.compat("Compiled", "`torch.export` of the detached model", "any number of rows and tokens")
@architectures
@torch.no_grad()
def test_detached_model_exports(name):
    stock = small(
        name,
        shadow_hidden_size=16,
        shadow_num_attention_heads=2,
        shadow_num_key_value_heads=None if name == "gpt2" else 1,
    ).detached()
    assert_same_logits(exported(stock, strict=False), stock)
