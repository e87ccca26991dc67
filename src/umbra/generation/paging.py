"""Continuous batching: pages that base and shadow share.

Continuous batching of transformers keeps keys and values in pages of one shape and dtype. The forward receives them as
the argument ``cache``, with one attention mask per layer type.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from umbra.base import architectures
from umbra.errors import BaseModelError


def check_pages(base: PretrainedConfig, shadow: PretrainedConfig) -> None:
    """Check that a shadow's keys and values fit the pages that transformers allocates for the base.

    Raises:
        BaseModelError: key-value heads or window differ in size.
    """
    for what, size in (
        ("key and value heads (number, width)", architectures.head_shape),
        ("window", architectures.window),
    ):
        shadow_size, base_size = size(shadow), size(base)
        if shadow_size != base_size and None not in (shadow_size, base_size):
            raise BaseModelError(
                f"Continuous batching gives every layer the base's {what}: {base_size}; the shadow has {shadow_size}. Use "
                "generate(), or a shadow with the base's attention sizes."
            )


def for_path(batch: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return the batch with the attention masks of one path's layer types; unchanged outside continuous batching.

    Args:
        batch: arguments of a forward.
        config: of the base, or of a shadow's backbone.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, dict) or not isinstance(batch.get("cache"), PagedAttentionCache):
        return batch
    types = set(architectures.layer_types(config.get_text_config(decoder=True)))
    return {**batch, "attention_mask": mask[types.pop()] if len(types) == 1 else mask}


def for_shadow(batch: dict[str, Any], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the batch as `for_path` does, with pages and masks converted to the shadow's dtype.

    Args:
        batch: arguments of a forward.
        config: of the shadow's backbone.
        dtype: of the shadow; pages and masks have the base's.
    """
    pages, batch = batch.get("cache"), for_path(batch, config)
    if not isinstance(pages, PagedAttentionCache):
        return batch
    mask = batch["attention_mask"]
    if isinstance(mask, dict):
        mask = {kind: one.to(dtype) for kind, one in mask.items()}
    elif mask is not None:
        mask = mask.to(dtype)
    return {**batch, "attention_mask": mask, "cache": CastPages(pages)}


class CastPages(PagedAttentionCache):
    """Pages that accept keys and values of any dtype and store them in their own.

    Args:
        pages: allocated by transformers in the base's dtype.
    """

    def __init__(self, pages: PagedAttentionCache):
        self.pages: Any = pages  # a PagedAttentionCache, whose decorated methods have no type

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values as the parent class does, and return all of them in the dtypes that were passed."""
        dtype = self.pages.dtype
        keys, values = self.pages.update(key_states.to(dtype), value_states.to(dtype), layer_idx, kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)
