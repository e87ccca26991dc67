"""The vocabulary of an attached base: its fingerprint, resizing, and the rows of added tokens that adapters carry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.base.added_tokens import AddedTokens, Tables, check_resizable
from umbra.base.fingerprint import fingerprint
from umbra.errors import BaseModelError, ConfigError
from umbra.method import kernels
from umbra.method.hooks import Attachment
from umbra.model.adapter_set import AdapterSet
from umbra.model.checks import check_replacement
from umbra.shadow.network import Shadow


class Vocabulary:
    """Keep the base's tables, the adapters and the hooks on one number of tokens.

    Args:
        base: the base model.
        adapters: all of which share the rows of added tokens.
        attachment: the hooks on the base.
    """

    def __init__(self, base: PreTrainedModel, adapters: AdapterSet, attachment: Attachment):
        self.base, self.adapters, self.attachment = base, adapters, attachment
        self.rows_before: list[Tensor] = []  # of added tokens that the base had before they were carried
        self.fingerprint = fingerprint(architectures.locate(base))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the base, with the head and the embeddings that it has now."""
        if self._tables() != self._fingerprinted[1]:
            added = self.adapters.active.added_tokens
            self.fingerprint = fingerprint(architectures.locate(self.base), None if added is None else added.first)
        return self._fingerprinted[0]

    @fingerprint.setter
    def fingerprint(self, value: dict[str, Any]) -> None:
        self._fingerprinted = value, self._tables()

    def _tables(self) -> tuple[nn.Module, nn.Module, int]:
        """Return the base's head and embeddings, and the number of rows of the latter."""
        embeddings = self.base.get_input_embeddings()
        return self.attachment.task_head, embeddings, architectures.vocabulary_size(embeddings)

    def resize(self, *args: Any, **options: Any) -> nn.Embedding:
        """Resize the base's tables and what its shadows have of the vocabulary.

        Args:
            args: positional arguments of ``PreTrainedModel.resize_token_embeddings``.
            options: its keyword arguments.

        Raises:
            BaseModelError: the embeddings are quantised, offloaded or sharded.
        """
        check_resizable(architectures.locate(self.base))
        known = self.fingerprint
        self.attachment.refresh_hooks()
        if self.adapters.active.added_tokens is not None:
            self.adapters.active.added_tokens.write()
        table = self.base.resize_token_embeddings(*args, **options)
        located = architectures.locate(self.base)
        self.attachment.move_head_hooks(located.head)
        kernels.patch_linears([located.head])
        for shadow in self.adapters.shadows:
            shadow.resize(located)
        self._carry(known)
        return table

    def replace_embeddings(self, table: nn.Module) -> None:
        """Replace the base's input embeddings.

        Args:
            table: of the same size.

        Raises:
            ConfigError: the table has another size.
            BaseModelError: the table would separate head and embeddings after tokens were added to both.
        """
        before = self.base.get_input_embeddings()
        check_replacement("input embeddings", before, table)
        self._replace(self.base.set_input_embeddings, before, table)

    def replace_head(self, head: nn.Module) -> None:
        """Replace the base's head.

        Args:
            head: of the same size.

        Raises:
            ConfigError: an adapter has trained heads, or the head has another size.
            BaseModelError: as in `replace_embeddings`.
        """
        trained = [name for name in self.adapters.names if self.adapters.get(name).heads]
        if trained:
            raise ConfigError(
                f"The adapter {trained[0]!r} has trained heads, which replace the base's: another head would have no effect. "
                "Change model.shadow.heads, or attach with train_heads=False."
            )
        before = self.attachment.task_head
        check_replacement("head", before, head)
        self._replace(self.base.set_output_embeddings, before, head)
        kernels.patch_linears([head])

    def _replace(self, put: Callable[[nn.Module], None], before: nn.Module, after: nn.Module) -> None:
        put(after)
        try:
            self.attachment.refresh_hooks()
        except BaseModelError:
            put(before)
            raise

    def carry(self, first: int) -> None:
        """Let the adapters carry the rows from number ``first`` on, which the base has already.

        `restore` gives the base these rows back.
        """
        located = architectures.locate(self.base)
        check_resizable(located)
        self.rows_before = [table.detach()[first:].clone() for _, table in Tables(located).named()]
        self._carry(fingerprint(located, first))

    def _carry(self, known: dict[str, Any]) -> None:
        """Let all adapters carry the rows beyond the base's own vocabulary, that of its fingerprint ``known``."""
        base = architectures.locate(self.base)
        first, num_rows = known["vocab_size"], architectures.vocabulary_size(base.embeddings)
        shadow = self.adapters.active
        before, added = shadow.added_tokens, None
        if before is not None:
            before.remove()
        if num_rows > first:
            added = AddedTokens(base, first, shadow.dtype)
            trains = len(self.adapters.names) == 1 and any(p.requires_grad for p in shadow.parameters())
            if before is not None:
                added.copy_from(before)
                trains = before.is_trained
            reads_head = not shadow.heads
            added.set_trained(trains, reads_head)
            added.hook(base, reads_head)
        self.attachment.added_tokens = added
        for adapter in self.adapters.shadows:
            adapter.added_tokens = added
        self.fingerprint = known if num_rows >= first else fingerprint(base)

    def restore(self) -> None:
        """Give the base back the rows that it had before `attach`."""
        added = self.adapters.active.added_tokens
        if added is None:
            return
        added.remove()
        before = len(self.rows_before[0]) if self.rows_before else 0
        if before != len(added.embeddings):
            self.base.resize_token_embeddings(added.first + before, mean_resizing=False)
        for rows, (_, table) in zip(self.rows_before, Tables(architectures.locate(self.base)).named(), strict=False):
            table.data[added.first :] = rows
        for shadow in self.adapters.shadows:
            shadow.added_tokens = None

    def share(self, name: str, shadow: Shadow, path: str | Path) -> None:
        """Let an adapter share the rows of the others, which must be equal.

        Args:
            name: the adapter's name.
            shadow: the adapter.
            path: where it was read.

        Raises:
            BaseModelError: the rows differ; a base has one table for all its adapters.
        """
        carried, shared = shadow.added_tokens, self.adapters.active.added_tokens
        others = [n for n in self.adapters.names if n != name]
        if carried is None and shared is None:
            return
        if carried is None or shared is None or (others and not carried.equals(shared)):
            raise BaseModelError(
                f"{path} has other rows of added tokens than adapter {(others or self.adapters.names)[0]!r}, and a base has one "
                "table for all: load it beside a base of its own, by umbra.load."
            )
        shared.load_state_dict(carried.state_dict())
        shadow.added_tokens = shared
