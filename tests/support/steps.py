"""One training step of a tiny model: its loss, its gradients, and the forms of a shadow to try."""

import pytest
from torch import Tensor, nn

from support.tiny import ARCHITECTURES, CLASSIFIERS, DIALECTS, gradients, make

architectures = pytest.mark.parametrize("name", ARCHITECTURES)
dialects = pytest.mark.parametrize("dialect", DIALECTS)
LAMBDA = 0.3


def make_classifier(name: str, problem: str, **fields):
    return make(name, classifier=True, base_options=CLASSIFIERS[problem], auxiliary_loss_weight=LAMBDA, **fields)


def step(model, ids, labels, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training loss and every gradient."""
    loss = model.train()(ids, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


SHAPES = {
    "mirror": {},
    "narrow": {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2},
    "own": {"embeddings": "own"},
    "heads": {"train_heads": True},
    "dense": {"shadow": "dense", "shadow_num_hidden_layers": 2},
}


class Calls:
    """Count the calls of a module's submodules, including recomputation."""

    def __init__(self, module: nn.Module):
        self.count = 0
        for m in module.modules():
            if m is not module:
                m.register_forward_pre_hook(self.add)

    def add(self, *_) -> None:
        self.count += 1
