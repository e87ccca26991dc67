"""The outputs of a `ShadowModel`: those of transformers, with the losses of the shadow beside the task's."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast


@dataclass
class ShadowCausalLMOutput(CausalLMOutputWithPast):
    """The output of a language model with a shadow.

    Attributes:
        shadow_loss: the shadow's own loss, not multiplied by λ.
        distillation_loss: KL(attached ‖ shadow), not multiplied by μ.
    """

    shadow_loss: Tensor | None = None
    distillation_loss: Tensor | None = None


@dataclass
class ShadowSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """The output of a classifier with a shadow.

    Attributes:
        shadow_loss: the shadow's own loss, not multiplied by λ.
    """

    shadow_loss: Tensor | None = None


OutputClass = type[ShadowCausalLMOutput] | type[ShadowSequenceClassifierOutput]

# listed once: torch.compile cannot trace dataclasses.fields
FIELD_NAMES: dict[OutputClass, frozenset[str]] = {
    ShadowCausalLMOutput: frozenset(field.name for field in fields(ShadowCausalLMOutput)),
    ShadowSequenceClassifierOutput: frozenset(field.name for field in fields(ShadowSequenceClassifierOutput)),
}


def as_output(kind: OutputClass, values: dict[str, Any], as_dict: bool) -> Any:
    """Return values by name as an output of transformers.

    Args:
        kind: the class of the output.
        values: in the base's order; entries that only the base's own class has (image states, router logits) stay in the
            output as well.
        as_dict: False for a tuple of the values that are not None.
    """
    if not as_dict:
        return tuple(value for value in values.values() if value is not None)
    known = FIELD_NAMES[kind]
    output = kind(**{k: v for k, v in values.items() if k in known})
    for name, value in values.items():
        if name not in known:
            output[name] = value
    return output
