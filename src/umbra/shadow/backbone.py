"""Build the shadow's backbone: mirrored, dense or pretrained, with copied or random weights."""

import dataclasses
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from umbra.base import architectures, private_transformers, quantized, sharded
from umbra.base.architectures import Architecture
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, ConfigError, raising
from umbra.shadow.pretrained import check_vocabulary, load_pretrained

ROWS = 2**14  # of a table, processed at once
ROUNDED = 2.0**-8, 1e-7  # relative, absolute: the rounding of bf16 and fp16
RIDGE = 1e-9  # of the mean square of a head's column: keeps a singular matrix solvable


class Built(NamedTuple):
    """A backbone, and initial weights of the projections from it (D, Ds) and into it (Ds, D); None for random ones."""

    backbone: PreTrainedModel
    projection: Tensor | None = None
    embed_projection: Tensor | None = None
    is_copied: bool = False


def build_backbone(base: Architecture, config: ShadowConfig, backbone_config: PretrainedConfig | None) -> Built:
    """Build the decoder that computes the shadow's states, with pretrained, copied or random weights.

    Args:
        base: the base's parts.
        config: resolved.
        backbone_config: of a saved backbone, whose weights the caller loads; None for a new one.

    Raises:
        ConfigError: sizes that do not fit together or do not exist in this architecture.
        BaseModelError: a pretrained shadow that is quantized or has another vocabulary.
    """
    if backbone_config is None and config.is_pretrained:
        return _load_for(base, config.shadow)
    chosen = architectures.unquantised(backbone_config or fresh_config(base, config))
    if not config.is_pretrained:
        private_transformers.use_attention_of(chosen, base.config)
    with raising(ConfigError, lambda error: f"No shadow can be built from these sizes: {error!s:.500}"):
        if chosen.model_type == base.config.model_type:
            backbone = private_transformers.build_from_config(type(base.decoder), chosen, torch.float32)
        else:
            backbone = AutoModel.from_config(chosen, dtype=torch.float32)
    if (
        backbone_config is not None
        or config.init == "random"
        or (config.init == "auto" and not _can_copy(base, config, backbone))
    ):
        return Built(backbone)
    try:
        return _copied(base, backbone, config)
    except ConfigError:
        if config.init == "base":
            raise
        return build_backbone(base, dataclasses.replace(config, init="random"), None)


def _copied(base: Architecture, backbone: PreTrainedModel, config: ShadowConfig) -> Built:
    """Initialize a backbone with blocks of the base.

    Raises:
        ConfigError: blocks that do not exist, or whose shapes differ.
    """
    scale = config.constants.init_scale
    assert scale is not None  # the configuration is resolved
    layers = config.init_layers or tuple(range(backbone.config.num_hidden_layers))
    if max(layers) >= len(base.blocks):
        raise ConfigError(f"init='base' copies blocks {list(layers)}, the base's are 0 to {len(base.blocks) - 1}.")
    projections = architectures.Projections(None, None)
    omitted = {id(p) for l, block in enumerate(base.blocks) if l not in layers for p in block.parameters()}
    copied = [p for p in base.decoder.parameters() if id(p) not in omitted]
    with sharded.gathered(copied), sharded.gathered(backbone.parameters(), to_change=True):
        if architectures.is_narrower(backbone.config, base.config):
            projections = architectures.prune_blocks(base, backbone, layers)
        else:
            architectures.copy_blocks(base, backbone, layers)
        architectures.scale_final_norm(backbone, scale)
    return Built(backbone, projections.projection, projections.embed_projection, True)


def _can_copy(base: Architecture, config: ShadowConfig, backbone: PreTrainedModel) -> bool:
    """Return whether the shadow has the shapes of the base's first blocks, and weights to copy (or neither has weights)."""
    sizes = {k for k, v in config.to_dict().items() if k.startswith("shadow_") and v is not None}
    depth = config.shadow_num_hidden_layers or 1
    if config.shadow != "mirror" or sizes - {"shadow_num_hidden_layers"} or depth > len(base.blocks):
        return False
    has_weights = not any(p.is_meta for block in base.blocks[:depth] for p in block.parameters())
    return architectures.is_cheap_to_mirror(base.config) and (has_weights or next(backbone.parameters()).is_meta)


def fresh_config(base: Architecture, config: ShadowConfig) -> PretrainedConfig:
    """Return the configuration of a mirrored or dense backbone with the sizes of ``config``.

    Args:
        base: the base's parts.
        config: resolved.

    Raises:
        ConfigError: sizes that do not fit together or do not exist in this architecture.
    """
    fields = {k.removeprefix("shadow_"): v for k, v in config.to_dict().items() if k.startswith("shadow_")}
    sizes = {"num_hidden_layers": 1, **{k: v for k, v in fields.items() if v is not None}}
    if config.shadow == "mirror" and architectures.is_cheap_to_mirror(base.config):
        return architectures.mirror_config(base.config, sizes, config.init_layers)
    return architectures.dense_config(base.config, sizes)


def _load_for(base: Architecture, path: str) -> Built:
    """Load a pretrained shadow for a base, with an initial projection where the widths differ.

    Raises:
        BaseModelError: it is not a causal decoder, is quantized, or has another vocabulary.
    """
    backbone, projection, head = load_pretrained(path)
    if not architectures.is_causal(backbone.config):
        raise BaseModelError(
            f"The pretrained shadow {path!r} ({backbone.config.model_type}) is not a causal decoder: its states would "
            "depend on the tokens that they predict."
        )
    if not all(quantized.is_plain(p) for p in backbone.parameters()):
        raise BaseModelError(
            f"The pretrained shadow {path!r} is quantized and cannot be trained: dequantize it first "
            "(`model.dequantize()` of transformers), or take its original."
        )
    backbone.train()
    rows, needed = backbone.config.vocab_size, architectures.vocabulary_size(base.embeddings)
    used = check_vocabulary(path, base.model.name_or_path)
    if rows < needed and used is not None and used <= rows:  # the base has more rows than tokens
        backbone.resize_token_embeddings(needed, mean_resizing=False)
    elif rows < needed:
        raise BaseModelError(
            f"The pretrained shadow {path!r} has {rows} tokens, the base {needed}: they must share one tokenizer. "
            "Take a shadow of the base's family, or shadow='mirror'."
        )
    if projection is None and head is not None:
        if architectures.states_width(backbone.config) != base.config.hidden_size:
            projection = aligned(base, head)
        elif _has_other_head(base, head):
            warnings.warn(
                f"The heads of the pretrained shadow {path!r} and of the base have one width but unrelated weights: the shadow's "
                "predictions start out poor. Adapt it to this base: umbra pretrain --base "
                f"{base.model.name_or_path or 'BASE'} --shadow {path}.",
                stacklevel=2,
            )
    return Built(backbone, projection)


@torch.no_grad()
def _has_other_head(base: Architecture, head: Tensor) -> bool:
    """Return whether the rows of the base's head and of a head (V, D) have a mean cosine below 0.5."""
    if not _has_readable_head(base):
        return False
    weight = quantized.linear_weight(base.head, base.model.dtype)
    if weight.shape[1] != head.shape[1]:  # the base transforms its states before the head
        return False
    rows = min(len(weight), len(head), ROWS)
    return float(torch.cosine_similarity(weight[:rows].float().cpu(), head[:rows].float().cpu()).mean()) < 0.5


def _has_readable_head(base: Architecture) -> bool:
    return not base.is_classifier and sharded.is_whole(base.head.weight) and not base.head.weight.is_meta


@torch.no_grad()
def aligned(base: Architecture, head: Tensor) -> Tensor | None:
    """Return the projection P (D, Ds) with which the base's head W best reproduces a pretrained shadow's head.

        P = argmin ‖W · P − head‖ = (Wᵀ · W)⁻¹ · Wᵀ · head        over the tokens that both have

    Args:
        base: the base's parts.
        head: (V, Ds) of the shadow.

    Returns:
        None for a classifier, or where the head's weights are not in memory.
    """
    if not _has_readable_head(base):
        return None
    weight = quantized.linear_weight(base.head, base.model.dtype)
    rows, D = min(len(weight), len(head)), weight.shape[1]
    gram = torch.zeros(D, D, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(D, head.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, rows, ROWS):
        part = weight[start : min(start + ROWS, rows)].float()
        gram += part.T @ part
        cross += part.T @ head[start : min(start + ROWS, rows)].to(part.device)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross).float() / architectures.logit_factor(base.model.config)


def has_base_embeddings(base: Architecture, backbone: PreTrainedModel) -> bool:
    """Return whether a pretrained shadow has the base's embeddings, up to bf16 and fp16: it was pretrained for this base."""
    embeddings = backbone.get_input_embeddings()
    table, base_table = architectures.weight_of(embeddings), base.embeddings.weight
    if not all(quantized.is_plain(one) and sharded.is_whole(one) for one in (table, base_table)):
        return False
    if architectures.embedding_scale(embeddings) != architectures.embedding_scale(base.embeddings):
        return False
    return table.shape == base_table.shape and all(
        torch.allclose(a.float(), b.to(a.device).float(), *ROUNDED)
        for a, b in zip(table.detach().split(ROWS), base_table.detach().split(ROWS), strict=True)
    )


def uses_own_embeddings(base: Architecture, config: ShadowConfig) -> bool:
    """Return whether a shadow has its own embedding table.

    Args:
        base: the base's parts.
        config: resolved.

    Raises:
        BaseModelError: it should, but the base merges images into its embeddings.
    """
    has_table = config.is_pretrained if config.embeddings == "auto" else config.embeddings == "own"
    if has_table and base.merges_embeddings:
        raise BaseModelError(
            f"A shadow with embeddings of its own cannot see the images that {type(base.model).__name__} puts among its "
            "embeddings: set embeddings='base'."
        )
    return has_table
