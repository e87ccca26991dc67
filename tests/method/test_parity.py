"""Umbra computes what both published implementations compute: same weights, so same logits, loss and gradients.

Compared with shadow-peft 0.1.1 (dialect paper) and PEFT's own Shadow tuner (dialect peft). One difference is meant: the
peers carry an update after the last block, which feeds nothing. The tests hold that it has no gradient there.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from peft.tuners.shadow.layers import ShadowLayer
from torch import Tensor, nn

import umbra
from support.peers import peft_model, shadow_peft_model
from support.tiny import make_base, scramble, tokens

ARCHITECTURES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "mistral"]
RANK, ALPHA, LAMBDA = 5, 0.5, 0.3
TOLERANCE = 1e-5
# PEFT itself still reads this name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass
class Pair:
    """One weight of ours, and the weight of the peer's that holds the same numbers under ``view``."""

    mine: nn.Parameter
    theirs: nn.Parameter
    view: Callable[[Tensor], Tensor] = lambda t: t


def by_name(mine: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    return (Pair(p, theirs.get_parameter(name)) for name, p in mine.named_parameters())


def by_order(mine: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    return (Pair(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))


def paper_pairs(mine: umbra.ShadowModel, peer: nn.Module) -> Iterator[Pair]:
    """Pairs with shadow-peft, which stacks the injections of all layers and counts them from block 1."""
    shadow, adapter = mine.shadow, peer.peft_model
    yield from by_name(shadow.backbone, adapter.shadow_model)
    for l, injection in shadow.couplings.injections.items():
        at = int(l) - 1
        yield Pair(injection.down.weight, adapter.shadow_injection_model.injection_downs, lambda t, at=at: t[at].T)
        yield Pair(injection.up.weight, adapter.shadow_injection_model.injection_ups, lambda t, at=at: t[at].T)
    for l, update in shadow.couplings.updates.items():
        yield from by_order(update.gate, adapter.shadow_update_model.update_gates[int(l) - 1])
        yield from by_order(update.transform, adapter.shadow_update_model.update_transforms[int(l) - 1])
    yield from by_name(shadow.couplings.norm, adapter.shadow_update_model.hidden_norm)
    if shadow.heads:
        yield from by_name(shadow.heads["attached"], peer.classifier_head)
        yield from by_name(shadow.heads["shadow"], peer.shadow_classifier_head)


def peft_pairs(mine: umbra.ShadowModel, peer: nn.Module) -> Iterator[Pair]:
    """Pairs with PEFT, which wraps each block in a layer that holds the injection before it and the update after it."""
    shadow, tuner = mine.shadow, peer.base_model
    yield from by_name(shadow.backbone, tuner.shadow_backbone["default"])
    if shadow.projection is not None:
        yield from by_name(shadow.projection, tuner.shadow_projection["default"])
    layers = [module for module in tuner.model.modules() if isinstance(module, ShadowLayer)]
    for l, injection in shadow.couplings.injections.items():
        yield from by_name(injection.down, layers[int(l)].shadow_down["default"])
        yield from by_name(injection.up, layers[int(l)].shadow_up["default"])
    for l, update in shadow.couplings.updates.items():
        yield from by_order(update.gate, layers[int(l)].shadow_update_gate["default"])
        yield from by_order(update.transform, layers[int(l)].shadow_update_transform["default"])
    if shadow.heads:
        yield from by_name(shadow.heads["attached"], tuner.model.score.modules_to_save["default"])
        yield from by_name(shadow.heads["shadow"], tuner.shadow_head["default"])


def paper_peer(base: nn.Module, classifier: bool, dropout: float, layers: int, hidden: int | None) -> nn.Module:
    assert hidden is None, "shadow-peft has no such size"
    sizes = {"num_shadow_layers": layers, "injection_hidden_size": RANK, "gate_hidden_size": 10}
    return shadow_peft_model(base, classifier, loss_weight=LAMBDA, alpha=ALPHA, dropout=dropout, **sizes)


def peft_peer(base: nn.Module, classifier: bool, dropout: float, layers: int, hidden: int | None) -> nn.Module:
    sizes = {"r": RANK, "shadow_num_hidden_layers": layers, "shadow_hidden_size": hidden}
    return peft_model(
        base, classifier, shadow_alpha=ALPHA, shadow_dropout=dropout, auxiliary_loss_weight=LAMBDA, **sizes
    )


PEERS = {"paper": (paper_peer, paper_pairs), "peft": (peft_peer, peft_pairs)}


def make_pair(dialect: str, name: str, classifier=False, dropout=0.0, layers=1, hidden=None, **base_options):
    """Our model and the peer's with the same, randomised weights, both in training mode, and the pairs of weights."""
    build, pair_up = PEERS[dialect]
    base = make_base(name, classifier=classifier, **base_options)
    peer = build(copy.deepcopy(base), classifier, dropout, layers, hidden)
    config = umbra.ShadowConfig(
        dialect=dialect,
        rank=RANK,
        alpha=ALPHA,
        dropout=dropout,
        auxiliary_loss_weight=LAMBDA,
        shadow_num_hidden_layers=layers,
        shadow_hidden_size=hidden,
        embeddings="auto" if hidden is None else "own",
    )
    mine = umbra.attach(base, config)
    scramble(mine.shadow)
    pairs = list(pair_up(mine, peer))
    with torch.no_grad():
        for pair in pairs:
            pair.view(pair.theirs).copy_(pair.mine)
    return mine.train(), peer.train(), pairs


def gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def assert_equal(mine: umbra.ShadowModel, peer: nn.Module, pairs: list[Pair], batch: dict[str, Tensor]) -> None:
    """Logits, loss and every gradient; once more with logits only where there is a label."""
    torch.manual_seed(11)
    theirs = peer(**batch)
    theirs.loss.backward()
    rounding = TOLERANCE * max(1.0, float(theirs.loss))  # of fp32, which a regression's squares make larger
    for skip_logits in (False, True):
        mine.zero_grad()
        torch.manual_seed(11)
        out = mine(**batch, skip_logits=skip_logits)
        out.loss.backward()
        if not skip_logits:
            assert (out.logits - theirs.logits).abs().max() <= TOLERANCE
        torch.testing.assert_close(out.loss, theirs.loss, atol=TOLERANCE, rtol=0)
        for pair in pairs:
            torch.testing.assert_close(
                gradient(pair.mine), pair.view(gradient(pair.theirs)), atol=rounding, rtol=TOLERANCE
            )

    trainable = {p for p in mine.parameters() if p.requires_grad}
    assert trainable == {pair.mine for pair in pairs}
    assert all(gradient(pair.mine).any() for pair in pairs)
    paired = {pair.theirs for pair in pairs}
    assert not any(gradient(p).any() for p in peer.parameters() if p not in paired), "a dead weight had a gradient"


def token_batch(padding: str | None = None, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Tokens with labels, the later rows shorter: padded at the ``right`` or the ``left``."""
    x = tokens(rows, length)
    if padding is None:
        return {"input_ids": x, "labels": x}
    mask = torch.ones_like(x)
    for row in range(1, rows):
        mask[row, -2 * row :] = 0
    if padding == "left":
        mask = mask.flip(-1)
    return {"input_ids": x * mask, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}


def class_batch(labels: Tensor, padding: str | None = "right") -> dict[str, Tensor]:
    return {**token_batch(padding, rows=len(labels)), "labels": labels}


@pytest.mark.parametrize("dialect", PEERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layers", [1, 3])
def test_language_model_equals_peer(dialect, name, layers):
    assert_equal(*make_pair(dialect, name, layers=layers), token_batch())


@pytest.mark.parametrize("dialect", PEERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_language_model_equals_peer(dialect, name, padding):
    assert_equal(*make_pair(dialect, name), token_batch(padding))


@pytest.mark.parametrize("dialect", PEERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_positions_equal_peer(dialect, name):
    assert_equal(*make_pair(dialect, name, dropout=0.4), token_batch())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("hidden", [16, 48])
def test_shadow_of_other_width_equals_peer(name, hidden):
    assert_equal(*make_pair("peft", name, layers=2, hidden=hidden), token_batch("right"))


@pytest.mark.parametrize("dialect", PEERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_single_label_classifier_equals_peer(dialect, name):
    pair = make_pair(dialect, name, classifier=True, num_labels=3)
    assert_equal(*pair, class_batch(torch.tensor([2, 0, 1, 1])))


@pytest.mark.parametrize("dialect", PEERS)
def test_unpadded_classifier_equals_peer(dialect):
    pair = make_pair(dialect, "llama", classifier=True, num_labels=3)
    assert_equal(*pair, class_batch(torch.tensor([2, 0, 1, 1]), padding=None))


# shadow-peft takes the cross-entropy of whatever the labels are, and counts the position from the left: the three tests
# below are for PEFT only.


def test_left_padded_classifier_equals_peer():
    pair = make_pair("peft", "llama", classifier=True, num_labels=3)
    assert_equal(*pair, class_batch(torch.tensor([2, 0, 1, 1]), padding="left"))


def test_multi_label_classifier_equals_peer():
    pair = make_pair("peft", "llama", classifier=True, num_labels=3)
    assert_equal(*pair, class_batch(torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])))


def test_regression_equals_peer():
    pair = make_pair("peft", "llama", classifier=True, num_labels=1)
    assert_equal(*pair, class_batch(torch.tensor([0.3, -2.0, 1.0])))


@pytest.mark.parametrize("dialect", PEERS)
def test_peers_have_one_unused_update(dialect):
    mine, peer, pairs = make_pair(dialect, "llama")
    paired = {pair.theirs for pair in pairs}
    dead = {name for name, p in peer.named_parameters() if p.requires_grad and p not in paired}
    assert dead
    assert all("update" in name for name in dead)
    couplings = mine.shadow.couplings
    assert len(couplings.updates) == len(couplings.injections) - 1
