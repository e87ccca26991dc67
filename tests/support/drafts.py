"""Models whose shadow drafts, and generation with and without drafts."""

import pytest
import torch

from support.tiny import ARCHITECTURES, make
from umbra.base import architectures

NEW = 20  # with a prompt of 9, well past the sliding windows of 6
ALWAYS = {"assistant_confidence_threshold": 0.0}  # draft at any confidence: a tiny random model is never confident
OUTPUT = ("o_proj", "down_proj", "c_proj", "dense")  # what blocks add to the hidden state
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def close_draft(name: str = "llama", base_options: dict | None = None, **fields):
    """Return a model whose drafts are sometimes accepted: the next token depends mostly on the last one."""
    fields = {"alpha": 0.05, "input_scale": "none", **fields}
    model = make(name, base_options={"tie_word_embeddings": False, **(base_options or {})}, **fields)
    decoder = dict(architectures.locate(model.base).decoder.named_parameters())
    with torch.no_grad():
        for part in (model.base, model.shadow.backbone):
            for key, p in part.named_parameters():
                p.mul_(0.1 if any(name in key for name in OUTPUT) else 1)
        for key, p in model.shadow.backbone.named_parameters():
            if key in decoder and p.shape == decoder[key].shape and not any(c.isdigit() for c in key):
                p.copy_(decoder[key])  # the last norm
        model.get_input_embeddings().weight.mul_(8)
    model.generation_config.eos_token_id = None
    return model


def plain(model, ids, **options):
    if ids is not None:  # a random model may generate padding tokens, from which transformers would infer a mask
        options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def drafted(model, ids, draft=4, **options):
    return plain(model, ids, draft=draft, **{"return_dict_in_generate": True, **ALWAYS, **options})


def assert_some_of_both(*outputs) -> None:
    """Assert that some drafts were accepted and some rejected; otherwise little was tested."""
    assert 0 < sum(out.accepted for out in outputs) < sum(out.drafted for out in outputs)
