"""The decoder, blocks, embeddings and head of a base."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from umbra.base.architectures.families import (
    BLOCK_COUNTS,
    CLASSIFIER_NAMES,
    ENCODER,
    UNFIT,
    UNPACKED,
    WRAPPERS,
    WRAPPING_PACKAGES,
)
from umbra.base.private_torch import is_compiled_module
from umbra.errors import BaseModelError

Modes = dict[str, tuple[bool, bool | None]]


@dataclass
class Architecture:
    """The parts of a decoder-only model to which a shadow is coupled.

    Args:
        model: the whole model.
        decoder: the blocks with embeddings and final norm, without a head.
        blocks: the L decoder blocks, in the list that the decoder iterates over.
        head: a linear layer of any quantization library.
        head_name: its name in ``model``.
        is_classifier: whether the head classifies sequences.
    """

    model: PreTrainedModel
    decoder: PreTrainedModel
    blocks: nn.ModuleList
    head: nn.Linear
    head_name: str
    is_classifier: bool

    @property
    def config(self) -> PretrainedConfig:
        """The decoder's (text) configuration."""
        return self.decoder.config

    @property
    def embeddings(self) -> nn.Embedding:
        """The input embeddings: a table of any quantization library."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def is_tied(self) -> bool:
        """Whether the head and the embeddings share one weight."""
        return not self.is_classifier and self.head.weight is self.embeddings.weight

    @property
    def merges_embeddings(self) -> bool:
        """Whether the decoder reads embeddings that include those of images (vision-language models)."""
        return not is_text_only(self.model.config)

    @property
    def stream(self) -> int | None:
        """The index among N parallel hidden states (N, B, T, D) that the blocks use (AltUp of Gemma 3n); None for (B, T, D)."""
        return getattr(self.config, "altup_active_idx", None)


def locate(model: nn.Module) -> Architecture:
    """Locate the decoder, its blocks and its task head.

    Raises:
        BaseModelError: not a transformers decoder with a language-model or classification head.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        advice = f" Load it first: umbra.base.loading.load_base({model!r})." if isinstance(model, str) else ""
        raise BaseModelError(f"The base must be a transformers PreTrainedModel, got {name}.{advice}")
    if model.config.is_encoder_decoder:
        raise BaseModelError(f"{name} is an encoder-decoder; a shadow needs a decoder-only model.")
    reason = refusal(model.config.model_type)
    if reason is not None:
        raise BaseModelError(f"{name} ({model.config.model_type}) cannot carry a shadow: {reason}.")
    text_config = model.config.get_text_config(decoder=True)
    block_name, blocks = _find_blocks(model, _num_blocks(text_config))
    decoder = model.get_submodule(block_name.rpartition(".")[0])
    head_name, head = _find_head(model)
    if not isinstance(decoder, PreTrainedModel) or decoder is model:
        raise BaseModelError(
            f"{name} has no task head around its decoder: load the base with AutoModelForCausalLM "
            "or AutoModelForSequenceClassification."
        )
    is_classifier = model.get_output_embeddings() is None
    return Architecture(model, decoder, blocks, cast(nn.Linear, head), head_name, is_classifier)


def check_bare(model: object) -> None:
    """Check that a model is as transformers makes it, neither wrapped nor adapted.

    Raises:
        BaseModelError: it is; the message says how to get the model itself.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    packages = [kind.__module__.partition(".")[0] for kind in kinds]
    reasons = [WRAPPING_PACKAGES.get(package) for package in packages]  # first: PEFT has a ShadowModel, too
    reasons += [WRAPPERS.get(kind.__name__) for kind in kinds]
    reason = next(filter(None, reasons), None)
    if reason is None and is_compiled_module(model):
        reason = WRAPPERS["OptimizedModule"]
    if reason is not None:
        raise BaseModelError(f"{type(model).__name__} cannot be given a shadow as it is: {reason}.")


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether no position attends to later ones: the model is neither an encoder nor an encoder-decoder."""
    return refusal(config.model_type) != ENCODER and not config.is_encoder_decoder


def refusal(model_type: str) -> str | None:
    """Return the reason why no model of this type can carry a shadow; None where it can."""
    return UNFIT.get(model_type)


def _num_blocks(config: PretrainedConfig) -> int:
    return next(getattr(config, name) for name in BLOCK_COUNTS if hasattr(config, name))


def is_unpacked(config: PretrainedConfig) -> bool:
    """Return whether the model's plain weights were dequantized on load: from a GGUF file without a kernel on this machine."""
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    return method in UNPACKED


def is_text_only(config: PretrainedConfig) -> bool:
    """Return whether the model is a text decoder without an image tower."""
    return config.get_text_config(decoder=True) is config


def _find_blocks(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    tower = model if is_text_only(model.config) else model.get_decoder()
    inside = set(tower.modules())
    lists = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == num_layers and m in inside
    ]
    if not lists:
        raise BaseModelError(f"{type(model).__name__} has no list of {num_layers} decoder blocks to couple to.")
    return min(lists, key=lambda item: item[0].count("."))


def _find_head(model: PreTrainedModel) -> tuple[str, nn.Module]:
    head = model.get_output_embeddings()
    if head is not None:
        return next(n for n, m in model.named_modules() if m is head), head
    for name in CLASSIFIER_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            return name, head
    raise BaseModelError(
        f"{type(model).__name__} has neither a language-model head nor one of {', '.join(CLASSIFIER_NAMES)}: load the "
        "base with AutoModelForCausalLM or AutoModelForSequenceClassification."
    )


def name_of(root: nn.Module, module: nn.Module) -> str:
    """Return the name of a module within another."""
    return next(name for name, m in root.named_modules() if m is module)


def register_classes(causal_lm: type, classifier: type) -> None:
    """Register Umbra's classes in the tables where transformers looks a class up by its name.

    Trainer shifts labels for label smoothing only for known language models (of another it would train every token to
    predict itself), and pipelines warn about unknown classes.

    Args:
        causal_lm: the language model's class.
        classifier: the sequence classifier's class.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["umbra"] = causal_lm.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["umbra"] = classifier.__name__


def modes(model: nn.Module) -> Modes:
    """Return for each module, by name, whether it trains, and whether it checkpoints activations (None: it cannot)."""
    return {n: (m.training, getattr(m, "gradient_checkpointing", None)) for n, m in model.named_modules()}


def restore_modes(model: nn.Module, before: Modes) -> None:
    """Restore the result of `modes` on the modules that still exist."""
    for name, module in model.named_modules():
        module.training, checkpoints = before.get(name, (module.training, None))
        if checkpoints is not None:
            setattr(module, "gradient_checkpointing", checkpoints)  # noqa: B010


def accelerators(model: PreTrainedModel) -> set[str]:
    """Return the devices besides the CPU that hold parts of the model or run them."""
    devices = {str(p.device) for p in model.parameters()}
    is_offloaded = "meta" in devices  # the device map then names the execution devices
    places = (getattr(model, "hf_device_map", None) or {}) if is_offloaded else {}
    devices |= {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places.values()}
    return devices - {"cpu", "disk", "meta"}


def is_placed(model: PreTrainedModel) -> bool:
    """Return whether the caller chose the model's devices, or it cannot be moved."""
    return bool(getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False))


def exempt_from_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Disable gradient checkpointing for these blocks."""
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            setattr(block, "gradient_checkpointing", False)  # noqa: B010
