"""Added tokens: their rows of the base's embeddings and head are trained with the shadow.

    embedding(t) = rows[t − V]      logits[t] = h · head[t − V]      for V ≤ t < V + K

The base is resized to V + K rows, and before each lookup the last K are overwritten with these. Any code that reads the
base's tables then reads the trained rows; hooks add their gradients. The first V rows have no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from umbra.base import architectures, quantized, sharded
from umbra.base.architectures import Architecture
from umbra.errors import BaseModelError

PREFIX = "shadow.added_tokens."  # of the rows in an adapter's file


class AddedTokens(nn.Module):
    """The rows of K added tokens: ``embeddings`` (K, E), and for an untied base ``head`` (K, D) and ``bias`` (K,).

    All adapters of a model share one such module. It can be trained while the model has one adapter.

    Args:
        base: after resizing.
        first: V, the first added token.
        dtype: of the rows.
    """

    embeddings: nn.Parameter
    head: nn.Parameter
    bias: nn.Parameter

    def __init__(self, base: Architecture, first: int, dtype: torch.dtype):
        super().__init__()
        self.first, self.base = first, Tables(base)
        self.handles: list[RemovableHandle] = []
        self.reads_head = True
        for name, table in self.base.named():
            self.register_parameter(name, nn.Parameter(table.detach()[first:].to(dtype, copy=True)))

    @property
    def is_trained(self) -> bool:
        """Whether the rows are trained."""
        return self.embeddings.requires_grad

    def equals(self, other: "AddedTokens") -> bool:
        """Return whether both modules hold the same rows."""
        rows, others = self.state_dict(), other.state_dict()
        return rows.keys() == others.keys() and all(
            v.shape == others[k].shape and torch.equal(v, others[k].to(v)) for k, v in rows.items()
        )

    @torch.no_grad()
    def copy_from(self, before: "AddedTokens") -> None:
        """Copy the rows of a module for more or fewer tokens of the same base."""
        for name, rows in self.named_parameters():
            old = before.get_parameter(name)
            count = min(len(rows), len(old))
            rows[:count] = old[:count]

    def set_trained(self, trains: bool, reads_head: bool) -> None:
        """Train the rows or freeze them.

        Args:
            trains: whether to train them.
            reads_head: whether the base's head computes the logits; otherwise its rows stay frozen.
        """
        for name, rows in self.named_parameters():
            rows.requires_grad_(trains and (reads_head or name == "embeddings"))

    @torch.no_grad()
    def write(self, *_: object) -> None:
        """Write the rows into the base's tables.

        Raises:
            BaseModelError: FSDP or ZeRO-3 have sharded the tables.
        """
        for name, table in self.base.named():
            if not sharded.is_whole(table):
                raise BaseModelError(
                    "Added tokens need the base's embeddings whole: train them without FSDP and ZeRO-3."
                )
            table.data[self.first :] = self.get_parameter(name)  # .data: autograd does not count it as a change

    def hook(self, base: Architecture, reads_head: bool) -> None:
        """Register hooks on the embeddings and the head of the base, until `remove`.

        Args:
            base: after resizing.
            reads_head: whether the base's head computes the logits, and not a trained copy.
        """
        self.remove()
        self.reads_head = reads_head
        self.handles.append(base.embeddings.register_forward_pre_hook(self.write))
        self.handles.append(base.embeddings.register_forward_hook(self._after_lookup))
        if not base.is_classifier:
            self.handles.append(base.head.register_forward_pre_hook(self.write))
            if reads_head:
                self.handles.append(base.head.register_forward_hook(self._after_head))

    def remove(self) -> None:
        """Remove the hooks from the base."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def refresh_hooks(self, model: PreTrainedModel, head: nn.Module) -> None:
        """Move the hooks to the base's current tables, where the caller has replaced them.

        Args:
            model: the base.
            head: its head.

        Raises:
            BaseModelError: the new tables differ in rows, tying or bias.
        """
        before = self.base
        if before.embeddings is model.get_input_embeddings() and before.head in (None, head):
            return
        base = architectures.locate(model)
        after = Tables(base)
        shapes = {name: table[self.first :].shape for name, table in after.named()}
        if shapes != {name: rows.shape for name, rows in self.named_parameters()}:
            raise BaseModelError(
                "The base's embeddings or head were replaced after tokens had been added, by modules with other rows, or tied or "
                "biased otherwise. Replace them first, then call resize_token_embeddings()."
            )
        self.base = after
        self.hook(base, self.reads_head)

    def _after_lookup(self, table: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not (self.is_trained and torch.is_grad_enabled()):
            return None
        tokens = args[0] - self.first
        rows = F.embedding(tokens.clamp(min=0), self.embeddings).to(output.dtype) * architectures.embedding_scale(table)
        return output + torch.where(tokens[..., None] >= 0, rows - rows.detach(), 0.0)  # only the gradient is added

    def _after_head(self, head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        if not (self.is_trained and torch.is_grad_enabled()):
            return None
        weight = self.embeddings if self.base.is_tied else self.head
        bias = self.bias if "bias" in self._parameters else None
        new = F.linear(args[0].detach().to(weight.dtype), weight, bias).to(logits.dtype)
        return torch.cat([logits[..., : self.first], logits[..., self.first :] + (new - new.detach())], dim=-1)


class Tables:
    """The tensors of a base with a row per token. It is no module, so that they are not saved or moved with the rows."""

    def __init__(self, base: Architecture):
        self.embeddings, self.is_tied = base.embeddings, base.is_tied
        self.head = None if base.is_classifier else base.head

    def named(self) -> list[tuple[str, Tensor]]:
        """Return the tensors with the names of their rows in `AddedTokens`."""
        tables = [("embeddings", self.embeddings.weight)]
        if self.head is not None and not self.is_tied:
            tables.append(("head", self.head.weight))
        if self.head is not None and self.head.bias is not None:
            tables.append(("bias", self.head.bias))
        return tables


def check_resizable(base: Architecture) -> None:
    """Raise a BaseModelError for tables that are quantized, offloaded or sharded, which cannot be resized."""
    for name, table in Tables(base).named():
        if not quantized.is_plain(table):
            raise BaseModelError(
                f"The base's {name} cannot be resized: they are quantised, offloaded or sharded. Load the base without that, "
                "or leave its embeddings and head out of the quantisation."
            )


def added_count(weights: dict[str, Tensor]) -> int:
    """Return K, the number of added tokens in an adapter folder's tensors."""
    rows = weights.get(f"{PREFIX}embeddings")
    return 0 if rows is None or not rows.ndim else len(rows)


def expected_rows(base: Architecture, count: int) -> dict[str, Tensor]:
    """Return the tensors that the file of an adapter with ``count`` added tokens must hold, by name, on meta."""
    tables = Tables(base).named() if count else []
    return {f"{PREFIX}{name}": torch.empty(count, *table.shape[1:], device="meta") for name, table in tables}
