"""The operations between the last block and the logits."""

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from umbra.base.architectures.families import (
    BEFORE_HEAD,
    DIVIDED_STATES,
    LOGIT_DIVISORS,
    LOGIT_FACTORS,
    MULTIPLYING_DIVISORS,
    SCALING_TOWERS,
    SOFT_CAPS,
)


def problem_type(config: PretrainedConfig, labels: Tensor) -> str:
    """Return the kind of classification loss, by the rule of transformers where the configuration does not set it.

    Args:
        config: of the classifier.
        labels: (B,) or (B, C).
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def pad_token_id(config: PretrainedConfig) -> int | None:
    """Return the padding token of a (text) configuration."""
    return config.get_text_config().pad_token_id


def pad_alike(config: PretrainedConfig, base: PretrainedConfig) -> None:
    """Copy the padding token that a trainer has set for the model to the base, whose classifier pools the token before it.

    Args:
        config: of the `ShadowModel`.
        base: changed in place.
    """
    pad = pad_token_id(config)
    if pad is not None:
        base.get_text_config().pad_token_id = pad


def soft_cap(config: PretrainedConfig) -> float | None:
    """Return c where a language model computes c · tanh(logits / c) after its head; None elsewhere."""
    text = config.get_text_config(decoder=True)
    if text is not config and config.model_type not in SCALING_TOWERS:
        return None
    return next((c for n in SOFT_CAPS if (c := getattr(text, n, None)) is not None), None)


def set_soft_cap(config: PretrainedConfig, cap: float | None) -> None:
    """Set the logit soft cap of a language model whose class has one."""
    for name in SOFT_CAPS:
        if hasattr(config, name):
            setattr(config, name, cap)


def logit_factor(config: PretrainedConfig) -> float:
    """Return the factor that a language model applies to its logits, 1 for most architectures."""
    text, factor = config.get_text_config(decoder=True), 1.0
    if text is not config and config.model_type not in SCALING_TOWERS:
        return factor
    for name in LOGIT_FACTORS:
        factor *= getattr(text, name, None) or 1.0
    for name in LOGIT_DIVISORS:
        value = getattr(text, name, 1.0)
        factor *= value if text.model_type in MULTIPLYING_DIVISORS else 1 / value
    return factor


def before_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the module between the decoder's states and the head; None for most architectures."""
    for path in BEFORE_HEAD.get(model.config.model_type, ()):
        module: nn.Module | None = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            return module
    return None


def head_input(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the input of the head.

    Args:
        model: the base.
        states: (…, D), the decoder's output.

    Returns:
        (…, D) for most architectures.
    """
    between = before_head(model)
    if between is not None:
        return between(states.to(next(between.parameters()).dtype))
    divides = model.config.model_type in DIVIDED_STATES and model.can_generate()
    return states * logit_factor(model.config) if divides else states


def after_head(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the factor that a language model applies to the head's logits, and the soft cap, if any."""
    return 1.0 if config.model_type in DIVIDED_STATES else logit_factor(config), soft_cap(config)
