"""The state belongs to one forward of one thread: nothing else that runs meanwhile can see it, and nothing of it stays."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import umbra
from support.threads import generate, in_threads
from support.tiny import ARCHITECTURES, DIALECTS, assert_same, gradients, make, make_base, partly_labelled, tokens
from umbra.base.architectures import locate
from umbra.method.hooks import open_contexts

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
dialects = pytest.mark.parametrize("dialect", DIALECTS)
kinds = pytest.mark.parametrize("classifier", [False, True], ids=["lm", "classifier"])


@pytest.fixture(autouse=True)
def no_frame_stays_open():
    yield
    assert open_contexts() == []


def train_step(model, ids) -> dict[str, torch.Tensor]:
    model.train()(ids, labels=partly_labelled(ids)).loss.backward()
    return gradients(model)


# -- threads -------------------------------------------------------------------------------------------------------


@architectures
def test_two_threads_generate_concurrently(name):
    model = make(name)
    prompts = [tokens(2, 6, seed=1), tokens(2, 9, seed=2)]
    expected = [generate(model, ids) for ids in prompts]
    for _ in range(3):
        found = in_threads(*[lambda ids=ids: generate(model, ids) for ids in prompts])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@architectures
@kinds
def test_four_threads_run_forward_concurrently(name, classifier):
    """Same shapes, so that a state that leaked across would not even be noticed by its shape."""
    model = make(name, classifier=classifier)
    batches = [tokens(2, 9, seed=seed) for seed in range(4)]

    def many(ids):
        with torch.no_grad():
            return [model(ids).logits for _ in range(8)]

    expected = [many(ids)[0] for ids in batches]
    found = in_threads(*[lambda ids=ids: many(ids) for ids in batches])
    for logits, one in zip(expected, found, strict=True):
        assert all(torch.equal(logits, each) for each in one)


@architectures
def test_threads_may_differ_in_disabled_adapter(name):
    model, ids = make(name), tokens()
    attached, bare = model(ids).logits.detach(), make_base(name)(ids).logits.detach()

    def disabled():
        with torch.no_grad(), model.disable_adapter():
            return [model(ids).logits for _ in range(10)]

    def enabled():
        with torch.no_grad():
            return [model(ids).logits for _ in range(10)]

    off, on = in_threads(disabled, enabled)
    assert all(torch.equal(x, bare) for x in off)
    assert all(torch.equal(x, attached) for x in on)


@architectures
def test_threads_train_and_evaluate_concurrently(name):
    model, ids = make(name), tokens(2, 9)
    labels = partly_labelled(ids)
    with torch.no_grad():
        logits = model(ids).logits
    model(ids, labels=labels, skip_logits=True).loss.backward()
    expected = gradients(model)

    def train():
        for _ in range(4):
            model(ids, labels=labels, skip_logits=True).loss.backward()

    def evaluate():
        with torch.no_grad():
            return [model(ids).logits for _ in range(12)]

    _, found = in_threads(train, evaluate)
    assert all(torch.equal(x, logits) for x in found)
    assert_same(gradients(model), {k: 4 * v for k, v in expected.items()})


# -- forwards between and within forwards --------------------------------------------------------------------------


class Stream:
    """Greedy decoding by hand, one step at a time."""

    def __init__(self, model, ids):
        self.model, self.ids, self.cache, self.logits = model, ids, None, []

    @torch.no_grad()
    def step(self) -> None:
        new = self.ids if self.cache is None else self.ids[:, -1:]
        out = self.model(new, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        self.logits.append(out.logits[:, -1])
        self.ids = torch.cat([self.ids, out.logits[:, -1:].argmax(-1)], dim=1)


@architectures
@dialects
def test_evaluation_during_decoding_changes_nothing(name, dialect):
    """Other forwards of the model between two steps of a decode, of another shape and the same, change nothing."""
    model, ids = make(name, dialect=dialect), tokens()
    alone, disturbed = Stream(model, ids), Stream(model, ids)
    for _ in range(10):
        alone.step()
    other = tokens(2, 1, seed=9)
    for _ in range(10):
        disturbed.step()
        model(other)
        model(tokens(3, 7, seed=5), labels=tokens(3, 7, seed=5)).loss.backward()
        with model.disable_adapter():
            model(other)
    assert torch.equal(alone.ids, disturbed.ids)
    assert torch.equal(torch.stack(alone.logits), torch.stack(disturbed.logits))


@architectures
@dialects
def test_interleaved_decodes_are_independent(name, dialect):
    model, prompts = make(name, dialect=dialect), [tokens(2, 5, seed=1), tokens(2, 9, seed=2)]
    alone = [Stream(model, ids) for ids in prompts]
    for stream in alone:
        for _ in range(10):
            stream.step()
    together = [Stream(model, ids) for ids in prompts]
    for _ in range(10):
        for stream in together:
            stream.step()
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(torch.stack(a.logits), torch.stack(b.logits)) for a, b in zip(alone, together, strict=True))


@architectures
@dialects
@torch.no_grad()
def test_nested_forward_is_independent(name, dialect):
    """Another model's, and the model's own."""
    model, other, ids, inner = make(name, dialect=dialect), make(name, seed=7), tokens(), tokens(seed=8)
    expected, expected_other, expected_inner = model(ids).logits, other(inner).logits, model(inner).logits
    found, busy = [], []

    def nest(*_):
        if busy:
            return
        busy.append(True)
        found.append((other(inner).logits, model(inner).logits))
        busy.pop()

    for block in locate(model.base).blocks:
        block.register_forward_hook(nest)
    assert torch.equal(model(ids).logits, expected)
    assert found
    assert all(torch.equal(a, expected_other) and torch.equal(b, expected_inner) for a, b in found)


@architectures
@torch.no_grad()
def test_base_called_in_another_models_forward_raises(name):
    """An open forward of one model does not license a direct call of another model's base."""
    model, other, ids = make(name), make(name, seed=7), tokens()
    handle = locate(model.base).blocks[1].register_forward_hook(lambda *_: other.base(ids))
    with pytest.raises(umbra.StateError):
        model(ids)
    handle.remove()
    with model.disable_adapter(), pytest.raises(umbra.StateError):
        other.base(ids)


@architectures
def test_two_graphs_backpropagate_independently(name):
    """Two forwards before either backward."""
    model, a, b = make(name), tokens(seed=1), tokens(seed=2)
    first, second = train_step(model, a), train_step(model, b)
    out_a, out_b = (model(ids, labels=partly_labelled(ids)).loss for ids in (a, b))
    out_a.backward()
    assert_same(gradients(model), first)
    out_b.backward()
    assert_same(gradients(model), second)


# -- errors --------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


@architectures
@kinds
@pytest.mark.parametrize("place", [0, 2, 3, "head"])
def test_error_in_forward_leaves_no_state(name, classifier, place):
    model, ids = make(name, classifier=classifier), tokens()
    expected = model(ids).logits
    module = model.base_head if place == "head" else locate(model.base).blocks[place]
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(fail)
        with pytest.raises(Broken):
            model(ids)
        with pytest.raises(Broken), model.disable_adapter():
            model(ids)
        handle.remove()
        assert open_contexts() == []
        assert torch.equal(model(ids).logits, expected)


@architectures
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_error_in_backward_leaves_no_state(name, reentrant):
    """While a checkpointed block is recomputed."""
    model, ids = make(name), tokens()
    expected = train_step(model, ids)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(ids, labels=partly_labelled(ids)).loss
    handle = next(locate(model.base).blocks[2].children()).register_forward_hook(fail)
    with pytest.raises(Broken):
        loss.backward()
    handle.remove()
    model.zero_grad()
    assert open_contexts() == []
    assert_same(train_step(model, ids), expected)


# -- copies --------------------------------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@architectures
@kinds
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_independent_models(name, way, classifier):
    """After a training step: the copy answers alike, trains alone, and unloads alone."""
    model, ids = make(name, classifier=classifier), tokens()
    labels = torch.tensor([0, 1]) if classifier else ids
    model.train()(ids, labels=labels).loss.backward()
    model.eval()
    clone = COPIES[way](model)
    logits, bare = model(ids).logits.detach(), make_base(name, classifier=classifier)(ids).logits
    assert torch.equal(clone(ids).logits, logits)

    clone.zero_grad()
    clone.train()(ids, labels=labels).loss.backward()
    torch.optim.SGD([p for p in clone.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.allclose(clone.eval()(ids).logits, logits)
    assert torch.equal(model(ids).logits, logits)

    assert torch.equal(clone.unload()(ids).logits, bare)
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(umbra.StateError):
        model.base(ids)
    assert torch.equal(model.unload()(ids).logits, bare)


@architectures
def test_copy_generates_and_saves(name, tmp_path):
    model, ids = make(name), tokens()
    clone = copy.deepcopy(model)
    assert torch.equal(generate(clone, ids), generate(model, ids))
    clone.save_pretrained(tmp_path)
    assert torch.equal(umbra.load(tmp_path, base=make_base(name))(ids).logits, model(ids).logits)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def young_heap():
    """Only what is made from here on is counted and collected, which is a hundred times faster."""
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))


RUNS = {
    "train": lambda model, ids: model.train()(ids, labels=partly_labelled(ids)),
    "eval": lambda model, ids: model.eval()(ids, labels=partly_labelled(ids)),
    "hidden_states": lambda model, ids: model.eval()(ids, output_hidden_states=True),
    "generate": lambda model, ids: generate(model.eval(), ids, return_dict_in_generate=True),
}


@architectures
@pytest.mark.parametrize("run", RUNS)
def test_state_is_freed_with_output(name, run, young_heap):
    model, ids = make(name), tokens()
    RUNS[run](model, ids)
    before = live_tensors()
    out = RUNS[run](model, ids)
    assert live_tensors() > before
    del out
    assert live_tensors() == before


class Kept:
    """What the graph keeps of a tensor for its backward."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()  # with its history the graph would hold itself


@architectures
@kinds
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_graph_is_freed_with_output(name, classifier, train, young_heap):
    """Of every block's output and of all that a backward was to read."""
    model, ids, seen = make(name, classifier=classifier).train(train), tokens(), []

    def watch(_, args, out):
        seen.append(weakref.ref(out[0] if isinstance(out, tuple) else out))

    def pack(tensor):
        kept = Kept(tensor)
        seen.append(weakref.ref(kept))
        return kept

    for module in (*locate(model.base).blocks, *model.shadow.couplings.updates.values(), model.shadow):
        module.register_forward_hook(watch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        out = model(ids, labels=torch.tensor([0, 1]) if classifier else ids)
    loss = out.loss
    del out
    gc.collect()
    assert len(seen) > 8
    assert any(ref() is not None for ref in seen)
    del loss
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []


@architectures
def test_state_is_freed_after_error(name, young_heap):
    model, ids = make(name).train(), tokens()
    RUNS["train"](model, ids)
    before = live_tensors()
    handle = locate(model.base).blocks[2].register_forward_hook(fail)
    with pytest.raises(Broken):
        RUNS["train"](model, ids)
    handle.remove()
    assert live_tensors() == before


@torch.no_grad()
def test_nested_contexts_of_two_models_are_independent():
    """A teacher whose adapter is off, asked from within a loss of another model."""
    a, b, ids = make(seed=0), make(seed=7), tokens()
    contexts = {"bare": "disable_adapter", "alone": "shadow_only"}
    expected = {}
    for model in (a, b):
        for name, context in contexts.items():
            with getattr(model, context)():
                expected[model, name] = model(ids).logits
    for outer, inner in (("bare", "alone"), ("alone", "bare"), ("bare", "bare")):
        with getattr(a, contexts[outer])(), getattr(b, contexts[inner])():
            assert torch.equal(a(ids).logits, expected[a, outer])
            assert torch.equal(b(ids).logits, expected[b, inner])
            with a.attached_only():
                attached = a(ids).logits
    assert torch.equal(a(ids).logits, attached) and not torch.equal(attached, expected[a, "bare"])
