"""Tiny random models of every decoder family, bare and with a shadow."""

import torch
from transformers import AutoConfig

import umbra
from support.tables import FAMILIES
from support.tiny import randomise, scramble, tokens

IDS, PADS = tokens(2, 9), 4
MASK = torch.ones_like(IDS)
PADDED = IDS * MASK


def build(name: str, classifier: bool = False, **options):
    """Return a tiny random base of a family, frozen, in eval mode."""
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type or name, **{**family.config, **options})
    return randomise(config, classifier=classifier).requires_grad_(False)


def cast(base, **fields) -> umbra.ShadowModel:
    """Attach a shadow to the base and randomise its weights."""
    model = umbra.attach(base, umbra.ShadowConfig(**{"rank": 4, "alpha": 0.5, "dropout": 0.0, **fields}))
    scramble(model.shadow)
    return model.eval()
