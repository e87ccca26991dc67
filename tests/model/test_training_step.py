"""One training step: every gradient, against the equations of core.py written out, and however the step is cut up."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.steps import LAMBDA, SHAPES, architectures, dialects, make_classifier, step
from support.tiny import (
    ARCHITECTURES,
    CLASSIFIERS,
    LAYERS,
    assert_same,
    class_labels,
    gradients,
    label_count,
    make,
    make_base,
    partly_labelled,
    shadow_logits,
    tokens,
)
from umbra.method import kernels
from umbra.method.hooks import _Hook
from umbra.method.kernels import recomputation
from umbra.method.losses import labelled_positions

problems = pytest.mark.parametrize("problem", CLASSIFIERS)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def class_loss(problem: str, logits: Tensor, labels: Tensor) -> Tensor:
    if problem == "single":
        return F.cross_entropy(logits, labels)
    if problem == "multi":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits.squeeze(-1), labels)


class HeadRows(_Hook):  # a hook of another class would keep the head from the fast form
    """Counts the rows that the base's output embeddings read."""

    def __init__(self, model):
        super().__init__(model.attachment)
        self.counts: list[int] = []
        model.base.get_output_embeddings().register_forward_hook(self)

    def __call__(self, head, args, output):
        self.counts.append(args[0][..., 0].numel())


# -- every gradient is there ---------------------------------------------------------------------------------------


def assert_all_moved(model) -> None:
    found = gradients(model)
    assert set(found) == {f"shadow.{name}" for name, _ in model.shadow.named_parameters()}
    assert [name for name, g in found.items() if not g.isfinite().all() or not g.abs().sum() > 0] == []


@architectures
@dialects
@pytest.mark.parametrize("shape", SHAPES)
def test_every_trainable_parameter_has_gradient(name, dialect, shape):
    model, ids = make(name, dialect=dialect, **SHAPES[shape]).train(), tokens()
    model(ids, labels=ids).loss.backward()
    assert_all_moved(model)


@architectures
@dialects
@problems
def test_every_classifier_parameter_has_gradient(name, dialect, problem):
    model = make_classifier(name, problem, dialect=dialect).train()
    model(tokens(4), labels=class_labels(problem)).loss.backward()
    assert_all_moved(model)


# -- the method, written out ---------------------------------------------------------------------------------------


def run_llama(decoder: nn.Module, x: Tensor, before_block=None, after_block=None) -> Tensor:
    """The blocks and the final norm of a stock Llama decoder, by hand, on (B, T, Ds)."""
    places = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    rotary = decoder.rotary_emb(x, places)
    for l, block in enumerate(decoder.layers):
        x = x if before_block is None else before_block(l, x)
        x = block(x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        if after_block is not None:
            after_block(l, x)
    return decoder.norm(x)


def naive_logits(model, plain: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both paths' logits (B, T, V) by the equations alone; ``plain`` is the same base, never attached to."""
    shadow, config = model.shadow, model.shadow_config
    w = dict(shadow.couplings.named_parameters())
    activation = F.silu if config.dialect == "paper" else F.gelu
    first = 1 if config.dialect == "paper" else 0
    x = plain.model.embed_tokens(ids)
    s = s0 = run_llama(shadow.backbone, x)

    def before_block(l: int, h: Tensor) -> Tensor:
        if l < first:
            return h
        return h + config.alpha * ((h - s) @ w[f"injections.{l}.down.weight"].T) @ w[f"injections.{l}.up.weight"].T

    def after_block(l: int, h: Tensor) -> None:
        nonlocal s
        if l < first or l == LAYERS - 1:
            return
        n = F.layer_norm(h, h.shape[-1:], w["norm.weight"], w["norm.bias"]) if config.dialect == "paper" else h
        part = f"updates.{l}"

        def two(kind: str, last: int) -> Tensor:
            inner = F.linear(n, w[f"{part}.{kind}.0.weight"], w.get(f"{part}.{kind}.0.bias"))
            return F.linear(activation(inner), w[f"{part}.{kind}.{last}.weight"], w.get(f"{part}.{kind}.{last}.bias"))

        s = s + torch.sigmoid(two("gate", 2)) * (two("transform", 3) - s)

    return plain.lm_head(run_llama(plain.model, x, before_block, after_block)), plain.lm_head(s0)


@dialects
def test_step_matches_written_equations(dialect):
    """Logits, both losses and every gradient of a Llama equal the plain formulas with full logits."""
    model, plain = (
        make("llama", dialect=dialect, auxiliary_loss_weight=LAMBDA),
        make_base("llama").requires_grad_(False),
    )
    ids = tokens(3, 11)
    labels = partly_labelled(ids)
    attached, shadow = naive_logits(model, plain, ids)
    torch.testing.assert_close(model(ids).logits, attached, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shadow_logits(model, ids), shadow, rtol=1e-4, atol=1e-4)
    expected = next_token_loss(attached, labels) + LAMBDA * next_token_loss(shadow, labels)
    expected.backward()
    by_hand = gradients(model)
    loss, found = step(model, ids, labels)
    torch.testing.assert_close(loss, expected.detach())
    assert_same(found, by_hand)


@architectures
@dialects
@pytest.mark.parametrize("shape", ["mirror", "heads"])
def test_labelled_rows_equal_full_logits(name, dialect, shape):
    model, ids = make(name, dialect=dialect, auxiliary_loss_weight=LAMBDA, **SHAPES[shape]), tokens(3, 11)
    labels = partly_labelled(ids)
    expected = next_token_loss(model(ids).logits, labels) + LAMBDA * next_token_loss(shadow_logits(model, ids), labels)
    expected.backward()
    full = gradients(model)
    loss, found = step(model, ids, labels)
    torch.testing.assert_close(loss, expected.detach())
    assert_same(found, full)
    kept, with_logits = step(model, ids, labels, skip_logits=False)
    torch.testing.assert_close(kept, loss)
    assert_same(with_logits, full)


@architectures
@dialects
@problems
def test_classification_losses_match_formulas(name, dialect, problem):
    model, ids, labels = make_classifier(name, problem, dialect=dialect), tokens(4), class_labels(problem)
    attached, shadow = model(ids).logits, shadow_logits(model, ids)[:, -1]
    expected = class_loss(problem, attached, labels) + LAMBDA * class_loss(problem, shadow, labels)
    expected.backward()
    by_hand = gradients(model)
    loss, found = step(model, ids, labels)
    torch.testing.assert_close(loss, expected.detach())
    assert_same(found, by_hand)


# -- which rows the head reads -------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("weight", [LAMBDA, 0.0], ids=["auxiliary", "no_auxiliary"])
def test_head_reads_labelled_rows_only(name, weight):
    """Once for both paths; without an auxiliary loss there are no rows of the shadow's."""
    model, ids = make(name, auxiliary_loss_weight=weight).train(), tokens(3, 11)
    labels, rows = partly_labelled(ids), HeadRows(model)
    with kernels.reference():
        out = model(ids, labels=labels)
    count = label_count(labels)
    assert rows.counts == [2 * count if weight else count]
    assert out.logits is None
    assert (out.shadow_loss is None) == (weight == 0)
    torch.testing.assert_close(out.loss, next_token_loss(model(ids).logits, labels) + weight * (out.shadow_loss or 0))


@architectures
def test_evaluation_head_reads_labelled_rows_only(name):
    model, ids = make(name).eval(), tokens(3, 11)
    labels, rows = partly_labelled(ids), HeadRows(model)
    with kernels.reference():
        out = model(ids, labels=labels, skip_logits=True)
    assert rows.counts == [2 * label_count(labels)]
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(ids, labels=labels).loss)


@architectures
def test_fused_loss_materialises_no_logits(name):
    """Once the head was seen to be a product, with one row, losses are computed from its weights."""
    model, ids = make(name).train(), tokens(3, 11)
    rows = HeadRows(model)
    for _ in range(2):
        model(ids, labels=partly_labelled(ids))
    assert rows.counts == [1, 0, 0]


LOSSES = {
    "published": {},
    "distilled": {"distillation_weight": 0.7},
    "trained heads": {"train_heads": True, "distillation_weight": 0.3},
    "every third": {"auxiliary_loss_every": 3, "distillation_weight": 0.3},
    "dropout": {"dropout": 0.3},
    "peft": {"dialect": "peft", "dropout": 0.3},
    "some blocks": {"layers": (0, 2)},
}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "qwen3_moe"])  # whose experts know no float64
@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES)
def test_fast_forms_equal_plain_forms(name, fields):
    """Losses and every gradient, in float64 to the last digits: the same random numbers are drawn in the same order."""
    model, ids = make(name, **{"dropout": 0.0, **fields}).double().train(), tokens(3, 11)
    labels = partly_labelled(ids)
    model(ids, labels=labels)
    found = []
    for form in (kernels.reference, nullcontext):
        with form():
            torch.manual_seed(0)
            model.zero_grad()
            out = model(ids, labels=labels)
            out.loss.backward()
            found.append((out, gradients(model)))
    (plain, expected), (fast, given) = found
    for loss in ("loss", "shadow_loss", "distillation_loss"):
        if getattr(plain, loss) is not None:
            torch.testing.assert_close(getattr(fast, loss), getattr(plain, loss), rtol=1e-6, atol=0)
    for key, gradient in expected.items():
        assert (given[key] - gradient).norm() <= 1e-6 * gradient.norm(), key


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_activation_outputs_are_recomputed(name, monkeypatch):
    """Once in each block that gradients pass through, and not where the user has a hand in what is kept."""
    model, ids, again = make(name, first_layer=2).train(), tokens(3, 11), []
    monkeypatch.setattr(
        recomputation.Recomputed,
        "unpack",
        lambda self, was=recomputation.Recomputed.unpack: again.append(1) or was(self),
    )
    model(ids, labels=partly_labelled(ids)).loss.backward()
    assert len(again) == LAYERS - 2
    with torch.autograd.graph.save_on_cpu():
        model(ids, labels=partly_labelled(ids)).loss.backward()
    assert len(again) == LAYERS - 2


def test_modified_saved_tensor_raises():
    x = torch.randn(3, requires_grad=True)
    with recomputation.recompute_activations():
        y = x.exp()
        z = y.square()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        z.sum().backward()


@architectures
def test_distillation_is_divergence_from_attached_model(name):
    """By hand: KL over the labelled tokens, its gradient in the shadow's path alone."""
    model, ids = make(name, distillation_weight=0.5, auxiliary_loss_weight=0.0, dropout=0.0).train(), tokens(3, 11)
    labels = partly_labelled(ids)
    out = model(ids, labels=labels)
    positions, _ = labelled_positions(labels)
    with torch.no_grad():
        teacher = model(ids).logits.flatten(0, 1)[positions].log_softmax(-1)
        student = shadow_logits(model, ids).flatten(0, 1)[positions].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum() / len(positions)
    torch.testing.assert_close(out.distillation_loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.loss, next_token_loss(model(ids).logits, labels) + 0.5 * out.distillation_loss)


def test_subsampled_loss_is_unbiased():
    model, ids = make("llama", auxiliary_loss_every=4, dropout=0.0), tokens(3, 11)
    labels = partly_labelled(ids)
    whole = model.eval()(ids, labels=labels).shadow_loss
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [float(model.train()(ids, labels=labels).shadow_loss) for _ in range(200)]
    assert len(set(drawn)) == 4
    assert abs(sum(drawn) / 200 - float(whole)) < 3 * torch.tensor(drawn).std() / 200**0.5


@architectures
@torch.no_grad()
def test_evaluation_reports_task_and_shadow_loss(name):
    model, ids = make(name, auxiliary_loss_weight=LAMBDA), tokens(3, 11)
    labels = partly_labelled(ids)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, next_token_loss(out.logits, labels))
    torch.testing.assert_close(out.shadow_loss, next_token_loss(shadow_logits(model, ids), labels))
    trained = model.train()(ids, labels=labels)
    torch.testing.assert_close(trained.loss, out.loss + LAMBDA * out.shadow_loss)
    torch.testing.assert_close(trained.shadow_loss, out.shadow_loss)


@architectures
@problems
@torch.no_grad()
def test_classifier_evaluation_reports_task_loss(name, problem):
    model, ids, labels = make_classifier(name, problem), tokens(4), class_labels(problem)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, class_loss(problem, out.logits, labels))
    torch.testing.assert_close(out.shadow_loss, class_loss(problem, shadow_logits(model, ids)[:, -1], labels))
    torch.testing.assert_close(model.train()(ids, labels=labels).loss, out.loss + LAMBDA * out.shadow_loss)


@architectures
def test_zero_lambda_classifier_runs_one_head(name):
    model = make(name, classifier=True, auxiliary_loss_weight=0.0).train()
    calls = []
    model.shadow.heads["shadow"].register_forward_hook(lambda *_: calls.append(1))
    out = model(tokens(), labels=torch.tensor([0, 1]))
    assert out.shadow_loss is None
    assert calls == []


# -- however the batch is cut --------------------------------------------------------------------------------------


@architectures
@dialects
def test_accumulated_micro_batches_equal_large_batch(name, dialect):
    """Unequal label counts, and one micro-batch without any label, which gives 0 and not NaN; both losses."""
    model, ids = make(name, dialect=dialect, auxiliary_loss_weight=LAMBDA), tokens(5, 10)
    labels = partly_labelled(ids)
    labels[3:] = -100
    loss, whole = step(model, ids, labels)
    items = label_count(labels)
    for count in (items, torch.tensor(items)):
        losses, shadow_losses = [], []
        for part, marks in zip(ids.split([1, 2, 2]), labels.split([1, 2, 2]), strict=True):
            out = model(part, labels=marks, num_items_in_batch=count)
            out.loss.backward()
            losses.append(out.loss.detach())
            shadow_losses.append(out.shadow_loss.detach())
        assert losses[2] == 0
        assert shadow_losses[2] == 0
        torch.testing.assert_close(sum(losses), loss)
        assert_same(gradients(model), whole)


@architectures
@pytest.mark.parametrize("items", [None, 7, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_without_labels_has_zero_loss(name, items, train):
    model, ids = make(name, train_heads=True).train(train), tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 0] = ids[:, 0]  # the first token is nobody's next
    out = model(ids, labels=labels, num_items_in_batch=items)
    out.loss.backward()
    assert out.loss == 0
    assert out.shadow_loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_shadow_head_learns_from_distillation():
    """Without the auxiliary loss, too: the pair's head moves away from the one that both began as."""
    model, ids = make("llama", train_heads=True, auxiliary_loss_weight=0.0, distillation_weight=0.5).train(), tokens()
    model(ids, labels=ids).loss.backward()
    assert model.shadow.heads["shadow"].weight.grad.any()
    idle = make("llama", train_heads=True, auxiliary_loss_weight=0.0)
    assert not idle.shadow.heads["shadow"].weight.requires_grad


@architectures
@problems
def test_accumulated_classifier_batches_equal_large_batch(name, problem):
    model, ids, labels = make_classifier(name, problem), tokens(4), class_labels(problem)
    loss, whole = step(model, ids, labels)
    losses = []
    for part, marks in zip(ids.split([1, 3]), labels.split([1, 3]), strict=True):
        out = model(part, labels=marks, num_items_in_batch=torch.tensor(labels.numel()))
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(sum(losses), loss)
    assert_same(gradients(model), whole)
