"""`attach`: put a shadow beside a frozen base."""

from transformers import PretrainedConfig, PreTrainedModel

from umbra.base import architectures, private_torch, private_transformers
from umbra.config import ShadowConfig, check_kind
from umbra.model.causal_lm import ShadowForCausalLM
from umbra.model.classifier import ShadowForSequenceClassification
from umbra.model.shadow_model import ShadowModel


def attach(
    base: PreTrainedModel, config: ShadowConfig | None = None, *, backbone_config: PretrainedConfig | None = None
) -> ShadowModel:
    """Put a shadow beside a frozen base.

    The weights of the base are frozen and never changed; none of its modules is replaced or renamed. `ShadowModel.unload`
    returns the base.

    Args:
        base: a decoder with a language-model head, or with a sequence-classification head.
        config: by default `ShadowConfig()`.
        backbone_config: the configuration of a backbone that was saved before (see `umbra.load`).

    Raises:
        BaseModelError: the base cannot carry a shadow, carries one or another adapter already, or is wrapped.
        ConfigError: sizes that do not fit the base, or a configuration of another class.
    """
    config = ShadowConfig() if config is None else check_kind(config)
    architectures.check_bare(base)
    kind = ShadowForSequenceClassification if architectures.locate(base).is_classifier else ShadowForCausalLM
    return kind(base, config, backbone_config=backbone_config)


ShadowModel._attach = attach  # for from_pretrained, which must not import its own subclasses
private_transformers.check(private_transformers.GENERATION, private_transformers.MODEL)
private_torch.check()
architectures.register_classes(ShadowForCausalLM, ShadowForSequenceClassification)
