"""Express a shadow as a stock transformers model, which needs no Umbra to load.

    embeddings  E' = E · P_in / scale       head  W' = W_head · P_out · factor

Both products are exact, since each projection is one bias-free linear map next to the table or the head. The generation
config keeps what the adapter answers to requests beyond it as ``escalation``, and how it is prompted as ``prompting``.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from umbra.base import architectures, quantized
from umbra.base.architectures import Architecture
from umbra.base.private_transformers import build_from_config, mark_changed
from umbra.errors import DetachError
from umbra.shadow.backbone import ROUNDED
from umbra.shadow.network import Shadow


@torch.no_grad()
def detached(base: PreTrainedModel, shadow: Shadow) -> PreTrainedModel:
    """Return a stock model with copied weights, whose logits are those of the shadow path: head(s⁰).

    Args:
        base: the base.
        shadow: the shadow that is attached to it.

    Raises:
        DetachError: the base caps its logits, or transforms its states before the head, which the shadow's own class
            cannot do; or its embeddings or head are offloaded.
    """
    located = architectures.locate(base)
    if shadow.added_tokens is not None:
        shadow.added_tokens.write()
    stock = _empty_stock(located, shadow)
    parts = architectures.locate(stock)

    table = _embedding_table(located, shadow, parts.embeddings)
    head = shadow.heads["shadow"] if shadow.heads else located.head
    head_weight = quantized.linear_weight(head, base.dtype)
    if table.is_meta or head_weight.is_meta:
        raise DetachError(
            "The base's embeddings or its head are offloaded: load the base without offloading to detach."
        )
    factor = 1.0
    if not located.is_classifier:
        factor = architectures.logit_factor(base.config) / architectures.logit_factor(stock.config)
    weight = _folded_head(head_weight, _maps_before_head(base, shadow, stock), factor)
    tied = _stays_tied(located, shadow) and weight.shape == table.shape
    tied = tied and torch.allclose(weight.to(table), table, *ROUNDED)
    table = weight if tied else table
    _settle_tying(stock, parts, tied)
    _copy_backbone(shadow, stock, parts)
    parts.embeddings.weight.copy_(table)
    parts.head.weight.copy_(weight)
    bias = architectures.bias_of(head)
    if bias is not None and (parts.head.bias is not None or bias.any()):
        parts.head.bias = nn.Parameter(bias.detach().to(shadow.dtype, copy=True) * factor)
    stock.tie_weights()
    if stock.can_generate():
        stock.generation_config = _generation_config(base, shadow)
    return stock.to(device=table.device).eval()


def _empty_stock(base: Architecture, shadow: Shadow) -> Any:
    """Return a model of the base's class where the shadow is of the base's architecture, otherwise of the shadow's class.

    Raises:
        DetachError: that class cannot cap logits as the base does.
    """
    config = _stock_config(base, shadow)
    mirrored = type(shadow.backbone) is type(base.decoder) and type(config) is type(base.model.config)
    cap = None if base.is_classifier else architectures.soft_cap(base.model.config)
    architectures.set_soft_cap(config, cap)
    if not base.is_classifier and architectures.soft_cap(config) != cap:
        raise DetachError(
            f"The base ({base.config.model_type}) caps its logits, which a detached "
            f"{shadow.backbone.config.model_type} cannot do. Use shadow='mirror' or shadow='dense'."
        )
    if mirrored:
        return build_from_config(type(base.model), config, shadow.dtype)
    kind = AutoModelForSequenceClassification if base.is_classifier else AutoModelForCausalLM
    return kind.from_config(config, dtype=shadow.dtype)


def _stock_config(located: Architecture, shadow: Shadow) -> PretrainedConfig:
    """Return the configuration of the backbone, with the base's vocabulary, special tokens and labels."""
    config, base = copy.deepcopy(architectures.text_twin(shadow.backbone.config)), located.model.config
    config.architectures = None
    if located.is_classifier:
        for key in ("num_labels", "id2label", "label2id", "problem_type"):
            setattr(config, key, shadow.classifier.get(key) or getattr(base, key))
    config.vocab_size = architectures.vocabulary_size(located.embeddings)
    text = base.get_text_config()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def _embedding_table(base: Architecture, shadow: Shadow, target: nn.Module) -> Tensor:
    """Return the table (V, Ds) in which the stock model's lookup equals the shadow's input.

    Args:
        base: the base's parts.
        shadow: the shadow.
        target: the stock model's embeddings.
    """
    if shadow.owns_embeddings:
        embeddings = shadow.backbone.get_input_embeddings()
        return architectures.weight_of(embeddings).detach()[: architectures.vocabulary_size(base.embeddings)]
    source = base.embeddings
    table = architectures.embedding_rows(source).to(shadow.dtype)
    if shadow.embed_projection is not None:
        table = table @ shadow.embed_projection.weight.T
    ratio = architectures.embedding_scale(source) / architectures.embedding_scale(target)
    return table if ratio == 1 else table * ratio


def _maps_before_head(base: PreTrainedModel, shadow: Shadow, stock: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear maps from the backbone's states to the head, last first; copy a nonlinear one into ``stock``.

    Raises:
        DetachError: the stock class has no place for it.
    """
    between, twin = architectures.before_head(base), architectures.before_head(stock)
    maps = [m for m in (between, shadow.projection) if isinstance(m, nn.Linear)]
    moved = None if isinstance(between, nn.Linear) else between
    if any(twin is module for module in stock.base_model.modules()):
        twin = None
    if (moved is None) != (twin is None) or (moved is not None and maps):
        raise DetachError(
            f"The base ({base.config.model_type}) and a detached {stock.config.model_type} of these sizes transform "
            "their states differently before the head. Use shadow='mirror' with the base's hidden size."
        )
    if moved is not None and twin is not None:
        twin.load_state_dict(moved.state_dict())
    return maps


def _folded_head(weight: Tensor, maps: list[nn.Linear], factor: float) -> Tensor:
    """Return the head's weight (V, Ds), multiplied by the maps before it and by ``factor``."""
    for linear in maps:
        weight = weight.to(linear.weight.dtype) @ linear.weight.detach()
    return weight if factor == 1 else weight.float() * factor


def _stays_tied(base: Architecture, shadow: Shadow) -> bool:
    """Return whether the shadow reads and writes tokens by one weight, the base's.

    With a base in half precision whose embeddings are multiplied (Gemma's √D), the rows differ from the head's by the
    rounding of that factor. They are tied all the same: the stock model has the factor unrounded, as with a base in float32.
    """
    return base.is_tied and not shadow.heads and not shadow.owns_embeddings


def _settle_tying(stock: PreTrainedModel, parts: Architecture, tied: bool) -> None:
    """Tie the head to the embeddings, or untie them."""
    for config in {id(c): c for c in (stock.config, stock.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    stock.all_tied_weights_keys = stock.get_expanded_tied_weights_keys(all_submodels=True)
    if not tied and parts.head.weight is parts.embeddings.weight:
        parts.head.weight = nn.Parameter(parts.embeddings.weight.detach().clone())


def _copy_backbone(shadow: Shadow, stock: PreTrainedModel, parts: Architecture) -> None:
    """Copy the backbone's tensors, except its embeddings, into the stock model."""
    omitted: set[str] = set()
    if shadow.owns_embeddings:
        weight = architectures.weight_of(shadow.backbone.get_input_embeddings())
        omitted = {k for k, p in shadow.backbone.named_parameters() if p is weight}
    state = {k: v for k, v in shadow.backbone.state_dict().items() if k not in omitted}
    decoder = stock.base_model if type(stock.base_model) is type(shadow.backbone) else parts.decoder
    missing = decoder.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing


def _generation_config(base: PreTrainedModel, shadow: Shadow) -> Any:
    """Return the base's generation config, with the shadow's escalation text and prompting."""
    generation: Any = copy.deepcopy(base.generation_config)  # it accepts further fields
    if shadow.config.escalation is not None:
        generation.escalation = shadow.config.escalation
        mark_changed(generation)
    if shadow.prompting is not None and not shadow.prompting.is_default:
        generation.prompting = shadow.prompting.settings()
        mark_changed(generation)
    return generation
