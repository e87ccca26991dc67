"""Which arguments a model's forward understands, and what some of them ask for."""

import inspect
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs

from umbra.base.architectures.families import ROUTER_LOSS_WEIGHTS
from umbra.base.architectures.parts import table_sizes

OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")  # which a configuration may ask for


def forward_arguments(*models: Any) -> frozenset[str]:
    """The names that these models' forwards take, by their signatures and by what transformers' models take in common.

    Args:
        models: a model and the parts of it to which it passes its arguments on.
    """
    names = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__, "cache"}
    for model in models:
        parameters = inspect.signature(model.forward).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if isinstance(model, PreTrainedModel):
            names |= {f"output_{name}" for name in model._can_record_outputs or ()}
    return frozenset(names)


def requested_outputs(config: PretrainedConfig, base: PretrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The outputs that a configuration asks for where neither a call nor the base's own configuration does."""
    return {
        name: True
        for name in OUTPUTS
        if given.get(name) is None and getattr(config, name, None) and not getattr(base, name, None)
    }


def router_loss_weight(model: Any) -> float | None:
    """The weight of a router's load-balancing loss in the model's own loss; None where it is unknown."""
    places = (model, model.config, model.config.get_text_config(decoder=True))
    weights = (getattr(place, name, None) for place in places for name in ROUTER_LOSS_WEIGHTS)
    return next((weight for weight in weights if weight is not None), None)


def head_width(head: Any) -> int:
    """How many logits a head gives."""
    return table_sizes(head)[0]
