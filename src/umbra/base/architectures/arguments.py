"""The arguments of a model's forward, and the outputs that some of them request."""

import inspect
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs

from umbra.base.architectures.families import ROUTER_LOSS_WEIGHTS
from umbra.base.private_transformers import recordable_outputs

OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")  # which a configuration may request


def forward_arguments(*models: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that these models' forwards take, including those common to transformers' models.

    Args:
        models: a model and its parts that receive its arguments.
    """
    names = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__, "cache"}
    for model in models:
        parameters = inspect.signature(model.forward).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if isinstance(model, PreTrainedModel):
            names |= {f"output_{name}" for name in recordable_outputs(model)}
    return frozenset(names)


def requested_outputs(config: PretrainedConfig, base: PretrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs that a configuration requests where neither a call nor the base's configuration does.

    Args:
        config: of the `ShadowModel`.
        base: of the base.
        given: arguments of the call.

    Returns:
        Arguments to add to the call.
    """
    return {
        name: True
        for name in OUTPUTS
        if given.get(name) is None and getattr(config, name, None) and not getattr(base, name, None)
    }


def router_loss_weight(model: PreTrainedModel) -> float | None:
    """Return the weight of a router's load-balancing loss in the model's loss; None where it is unknown."""
    places = (model, model.config, model.config.get_text_config(decoder=True))
    weights = (getattr(place, name, None) for place in places for name in ROUTER_LOSS_WEIGHTS)
    return next((weight for weight in weights if weight is not None), None)
