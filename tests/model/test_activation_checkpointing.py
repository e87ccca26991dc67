"""Activation checkpointing, inside the models and around their blocks: the same loss and the same gradients."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import AutoModel, LlamaConfig

import umbra
from support.steps import LAMBDA, SHAPES, Calls, architectures, dialects, make_classifier, step
from support.tiny import VOCAB, assert_same, class_labels, make, make_base, partly_labelled, tokens
from umbra.base.architectures import locate

CHECKPOINTING = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])


@architectures
@dialects
@CHECKPOINTING
def test_checkpointed_gradients_equal_plain(name, dialect, reentrant):
    model, ids = make(name, dialect=dialect, shadow_num_hidden_layers=2), tokens(3, 11)
    labels = partly_labelled(ids)
    loss, plain = step(model, ids, labels)
    first = model.shadow.couplings.layers[0]
    of_blocks = [Calls(block) for block in locate(model.base).blocks[first:]]
    of_shadow = Calls(model.shadow.backbone)
    step(model, ids, labels)
    once, shadow_once = [c.count for c in of_blocks], of_shadow.count
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    checkpointed, found = step(model, ids, labels)
    assert all(c.count - n > n for c, n in zip(of_blocks, once, strict=True)), "the base recomputed nothing"
    assert of_shadow.count - shadow_once > shadow_once, "the shadow recomputed nothing"
    torch.testing.assert_close(checkpointed, loss)
    assert_same(found, plain)
    model.activation_checkpointing_disable()
    assert_same(step(model, ids, labels)[1], plain)


@architectures
@dialects
@CHECKPOINTING
@pytest.mark.parametrize("shape", ["narrow", "own", "heads", "dense"])
def test_checkpointed_other_shadows_equal_plain(name, dialect, reentrant, shape):
    model, ids = make(name, dialect=dialect, **SHAPES[shape]), tokens(3, 11)
    labels = partly_labelled(ids)
    loss, plain = step(model, ids, labels)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed, found = step(model, ids, labels)
    torch.testing.assert_close(checkpointed, loss)
    assert_same(found, plain)


@architectures
@dialects
@CHECKPOINTING
def test_checkpointed_pretrained_shadow_equals_plain(name, dialect, reentrant, tmp_path):
    """Its embeddings are frozen, so that the input of its first block needs no gradient of itself."""
    small = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModel.from_config(small).save_pretrained(tmp_path)
    model, ids = make(name, dialect=dialect, shadow=str(tmp_path)), tokens(3, 11)
    loss, plain = step(model, ids, ids)
    assert "shadow.backbone.embed_tokens.weight" not in plain
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed, found = step(model, ids, ids)
    torch.testing.assert_close(checkpointed, loss)
    assert_same(found, plain)


@architectures
@dialects
@CHECKPOINTING
def test_checkpointed_classifier_equals_plain(name, dialect, reentrant):
    model, ids, labels = make_classifier(name, "multi", dialect=dialect), tokens(4), class_labels("multi")
    loss, plain = step(model, ids, labels)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed, found = step(model, ids, labels)
    torch.testing.assert_close(checkpointed, loss)
    assert_same(found, plain)


@architectures
@dialects
@CHECKPOINTING
def test_checkpointed_inputs_embeds_equal_plain(name, dialect, reentrant):
    """Embeddings that are handed in need no gradient, and yet the shadow gets its own."""
    model, ids = make(name, dialect=dialect), tokens(3, 11)
    embedded = model.get_input_embeddings()(ids)
    loss, plain = step(model, None, ids, inputs_embeds=embedded)
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed, found = step(model, None, ids, inputs_embeds=embedded)
    torch.testing.assert_close(checkpointed, loss)
    assert_same(found, plain)


@architectures
@CHECKPOINTING
def test_checkpointing_enabled_before_attach_stays_on(name, reentrant):
    """A base that was handed over with checkpointing on gives the same step, too."""
    ids = tokens(3, 11)
    model = make(name, auxiliary_loss_weight=LAMBDA)
    loss, plain = step(model, ids, ids)
    base = make_base(name)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    other = umbra.attach(base, model.shadow_config)
    other.shadow.load_state_dict(model.shadow.state_dict())
    found_loss, found = step(other, ids, ids)
    torch.testing.assert_close(found_loss, loss)
    assert_same(found, plain)


@architectures
@dialects
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not_reentrant"])
def test_recomputation_uses_same_dropout_mask(name, dialect, reentrant):
    """With dropout on, a step from the same seed is the same step, checkpointed or not."""
    model, ids = make(name, dialect=dialect, dropout=0.3), tokens(3, 11)
    torch.manual_seed(4)
    loss, plain = step(model, ids, ids)
    assert not torch.allclose(step(model, ids, ids)[0], loss)
    if reentrant is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(4)
    again, found = step(model, ids, ids)
    torch.testing.assert_close(again, loss)
    assert_same(found, plain)


@architectures
@dialects
@CHECKPOINTING
@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.compat("Distributed", "activation checkpointing around blocks, both kinds, wrapped before or after attach")
def test_block_wrappers_change_no_gradient(name, dialect, reentrant, wrapped):
    """Their recomputation runs the block alone: the hooks stay outside."""
    model, ids = make(name, dialect=dialect), tokens(3, 11)
    loss, plain = step(model, ids, ids)
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    if wrapped == "before":
        base, config, weights = model.unload(), model.shadow_config, model.shadow.state_dict()
        wrap_blocks(base, kind)
        model = umbra.attach(base, config)
        model.shadow.load_state_dict(weights)
    else:
        wrap_blocks(model.base, kind)
    found_loss, found = step(model, ids, ids)
    torch.testing.assert_close(found_loss, loss)
    assert_same(found, plain)
    with torch.no_grad():
        bare = model.unload()(ids).logits
    torch.testing.assert_close(bare, make_base(name)(ids).logits)


def wrap_blocks(base, kind):
    """As FSDP's and accelerate's activation checkpointing do it."""
    blocks = locate(base).blocks
    for l in range(len(blocks)):
        blocks[l] = checkpoint_wrapper(blocks[l], kind)
