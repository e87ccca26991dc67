"""The draft vocabulary: the tokens that a shadow may propose in speculative decoding."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbra.errors import ConfigError, shown

MOST_TOKENS = 8192  # of a draft vocabulary that is chosen from data


def frequent_tokens(
    labels: Iterable[Tensor | Sequence[int]], also: Iterable[int] = (), most: int = MOST_TOKENS
) -> list[int]:
    """Choose a draft vocabulary from data: the tokens in ``labels`` that are not negative, the most frequent first.

    Args:
        labels: rows of labels.
        also: tokens that are always included, such as the end of the text.
        most: the largest number of tokens.
    """
    also = list(dict.fromkeys(also))
    rows = [torch.as_tensor(row).reshape(-1).long() for row in labels]
    tokens, counts = torch.cat([torch.zeros(0, dtype=torch.long), *rows]).unique(return_counts=True)
    seen = [t for t in tokens[counts.argsort(descending=True, stable=True)].tolist() if t >= 0 and t not in also]
    return also + seen[: max(most - len(also), 0)]


def as_draft_tokens(token_ids: Iterable[int] | None, num_embeddings: int) -> list[int] | None:
    """Return a draft vocabulary as a list of distinct integers.

    Args:
        token_ids: integers, a tensor or an array; None for the whole vocabulary.
        num_embeddings: the number of rows of the base's embeddings.

    Raises:
        ConfigError: empty, or a number that is no token of the base.
    """
    if token_ids is None:
        return None
    listed = token_ids.tolist() if isinstance(token_ids, Tensor | np.ndarray) else token_ids
    tokens: list[Any] = list(dict.fromkeys(t.item() if isinstance(t, Tensor | np.generic) else t for t in listed))
    check_draft_tokens(tokens, num_embeddings)
    return tokens


def check_draft_tokens(tokens: Sequence[object], num_embeddings: int) -> None:
    """Check that a draft vocabulary fits a base with this number of embeddings.

    Raises:
        ConfigError: an empty vocabulary, a repeated token, or a number that is no token.
    """
    wrong = [t for t in tokens if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < num_embeddings]
    if wrong:
        raise ConfigError(f"A draft vocabulary holds tokens from 0 to {num_embeddings - 1}, got {shown(wrong[0])}.")
    if not tokens or len(set(tokens)) < len(tokens):
        raise ConfigError("A draft vocabulary holds one token or more, each once.")
