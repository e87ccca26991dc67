"""The input rows of the task head in one forward, and the trained heads that replace it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class HeadInputs:
    """Select the rows that the head reads, and the weights that read them.

    Args:
        heads: trained copies of the head, "attached" and "shadow", for all rows of the batch (None) or some (N,); an empty
            dictionary leaves the base's head in place.
        flatten: read a list of positions instead of (B, T).
        positions: flat positions (N,) of (B, T) that the head reads; None for all.
        extra: (M, D) rows of s⁰ that the head reads after them.
        consume: called with the selected rows (N, D) in place of the head, which then reads no row.

    Attributes:
        num_rows: the number of attached rows; None until the head has run.
    """

    def __init__(
        self,
        heads: Sequence[tuple[Tensor | None, nn.ModuleDict]],
        flatten: bool = False,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
        consume: Callable[[Tensor], None] | None = None,
    ):
        self.heads = [(rows, copies) for rows, copies in heads if copies]
        self.flatten, self.positions, self.extra, self.consume = flatten, positions, extra, consume
        self.num_rows: int | None = None

    def select(self, h: Tensor) -> Tensor:
        """Return the input of the head, (B, T, D) or (1, N + M, D), from the last hidden states (B, T, D)."""
        if not self.flatten:
            return h
        rows = h.reshape(-1, h.shape[-1])
        rows = rows if self.positions is None else rows[self.positions.to(rows.device)]
        self.num_rows = len(rows)
        if self.consume is not None:
            self.consume(rows)
            return rows[None, :0]
        if self.extra is not None:
            rows = torch.cat([rows, self.extra.to(rows.dtype)])
        return rows[None]

    def replace(self, h: Tensor, logits: Tensor) -> Tensor:
        """Return the logits of the trained heads where there are any.

        Args:
            h: the input of the head, as `select` returned it.
            logits: the output of the base's head.
        """
        for rows, copies in self.heads:
            x = (h if rows is None else h[rows]).to(next(copies.parameters()).dtype)
            if rows is not None:
                logits = logits.index_copy(0, rows, copies["attached"](x).to(logits.dtype))
            elif self.extra is None:
                logits = copies["attached"](x)
            else:
                logits = torch.cat(
                    [copies["attached"](x[:, : self.num_rows]), copies["shadow"](x[:, self.num_rows :])], dim=1
                )
        return logits
