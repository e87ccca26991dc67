"""Generate from tiny models, reproducibly."""

import torch

from support.tiny import tokens

NEW = 14  # with a prompt of 9, well past the sliding windows of 6


def generate(model, ids, **options):
    """Generate `NEW` (or ``max_new_tokens``) tokens from a fixed seed, ignoring the end-of-text token."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    model.generation_config.eos_token_id = None
    torch.manual_seed(11)
    found = model.generate(ids, **options)
    assert found.shape[1] == options["max_new_tokens"] + (0 if ids is None else ids.shape[1])
    return found


def repetitive(rows: int = 1) -> torch.Tensor:
    """Return a prompt with repeated n-grams, so that prompt lookup has candidates."""
    part = tokens(rows, 4)
    return torch.cat([part, part, part[:, :1]], dim=1)
