"""Several shadows beside one base: named, activated, replaced, deleted; and which row of a batch has which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from umbra.base import architectures
from umbra.base.added_tokens import AddedTokens, Tables, check_resizable
from umbra.base.architectures import Anatomy
from umbra.base.fingerprint import fingerprint
from umbra.config import ShadowConfig, check_kind
from umbra.errors import BaseModelError, ConfigError, StateError
from umbra.method import kernels
from umbra.method.hooks import Attachment, ForwardContext
from umbra.shadow.network import Shadow

DEFAULT = "default"  # the name of the shadow that `attach` and `load` make
BASE = "__base__"  # in adapter_names: no adapter, as is None


class Adapters:
    """What a `ShadowModel` can do with more than one shadow.

    The active one is ``model.shadow``; it alone is trained, and runs where a call names none. The others lie frozen in
    ``model.resting``. Each keeps its keys in layers of its own of the common cache, and these never change while it is
    loaded: a decode that is under way may go on while others come and go.
    """

    base: PreTrainedModel
    config: PretrainedConfig
    shadow: Shadow
    resting: nn.ModuleDict
    active_adapter: str
    _keys_to_ignore_on_save: set[str]
    all_tied_weights_keys: dict[str, str]
    _attachment: Attachment
    base_fingerprint: Any
    _rows_before: list[Tensor]

    @property
    def adapters(self) -> list[str]:
        """The names of all shadows, the active one first."""
        return [self.active_adapter, *self.resting.keys()]

    def adapter(self, name: str | None = None) -> Shadow:
        """A shadow by its name, the active one by default.

        Raises:
            ConfigError: no shadow of that name.
        """
        if name is None or name == self.active_adapter:
            return self.shadow
        if not isinstance(name, str) or name not in self.resting:
            raise ConfigError(f"There is no adapter {name!r}: this model has {', '.join(self.adapters)}.")
        return self.resting[name]  # type: ignore[return-value]

    def _named(self, names: Sequence[str | None] | None) -> list[Shadow]:
        """The shadows that a batch's ``adapter_names`` name; the active one without any."""
        if names is None:
            return [self.shadow]
        return [self.adapter(name) for name in dict.fromkeys(names) if name not in (None, BASE)]

    def add_adapter(self, config: ShadowConfig, name: str | None = None) -> None:
        """Put a fresh shadow beside the others; `set_adapter` activates it.

        Raises:
            ConfigError: the name is taken or no name, sizes that do not fit the base, or no `ShadowConfig`.
        """
        check_kind(config)
        name = self._check_new_name(name)
        with ForwardContext(self._attachment, disabled=True):  # the base may be asked for its hidden states
            shadow = Shadow(architectures.locate(self.base), config.resolve())
        self._seat(name, shadow)

    def load_adapter(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        replace: bool = False,
        trainable: bool = False,
        allow_other_base: bool = False,
        shadow: str | None = None,
    ) -> None:
        """Read an adapter folder and put its shadow beside the others; `set_adapter` activates it.

        Args:
            replace: take the place of the adapter of that name, active or not; nothing changes where reading fails.
            trainable, allow_other_base, shadow: as in `umbra.load`.

        Raises:
            ConfigError: the name is taken and ``replace`` is False, or is no name.
            CheckpointError, BaseModelError: as in `umbra.load`.
        """
        from umbra.adapters.checkpoint import load_shadow

        if not (replace and name in self.adapters):
            name = self._check_new_name(name)
        found = load_shadow(path, self.base, trainable=trainable, allow_other_base=allow_other_base, shadow=shadow)
        self._share_added_tokens(name, found, path)
        self._seat(name, found)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one: the one that is trained, saved, detached, and run where a call names none.

        Raises:
            ConfigError: no shadow of that name.
        """
        chosen, before = self.adapter(name), self.shadow
        if chosen is before:
            return
        others = {n: s for n, s in self.resting.items() if n != name}
        before.freeze()
        chosen.unfreeze()
        self.resting = nn.ModuleDict({self.active_adapter: before, **others})
        self.shadow, self.active_adapter = chosen, name
        self._settle()

    def delete_adapter(self, name: str) -> None:
        """Forget a resting adapter and free its weights.

        Raises:
            ConfigError: no shadow of that name.
            StateError: it is the active one.
        """
        self.adapter(name)
        if name == self.active_adapter:
            raise StateError(f"{name!r} is active: set_adapter(…) another one first, or unload() the model.")
        del self.resting[name]
        self._settle()

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ConfigError: no shadow of that name, or the new one is taken or no name.
        """
        self.adapter(old)
        self._check_new_name(new)
        if old == self.active_adapter:
            self.active_adapter = new
        else:
            self.resting = nn.ModuleDict({new if n == old else n: s for n, s in self.resting.items()})
        self._settle()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
        """As in transformers, for the base and for what its shadows have of the vocabulary.

        Rows beyond the base's own vocabulary are trained with the shadow while there is one adapter, and are saved in its
        folder; `umbra.load` resizes a base that does not have them. `unload` takes them away again.

        Raises:
            BaseModelError: embeddings that are quantised, offloaded or sharded.
        """
        if new_num_tokens is None and not options.get("pad_to_multiple_of") and not args:
            return self.base.get_input_embeddings()
        check_resizable(architectures.locate(self.base))
        known = self.base_fingerprint
        self._attachment.settle()
        if self.shadow.added_tokens is not None:
            self.shadow.added_tokens.write()
        table = self.base.resize_token_embeddings(new_num_tokens, *args, **options)
        located = architectures.locate(self.base)
        self._attachment.settle_head(located.head)
        kernels.patch_linears([located.head])
        for name in self.adapters:
            self.adapter(name).resize(located)
        self.config.get_text_config(decoder=True).vocab_size = architectures.vocabulary_size(table)
        self.all_tied_weights_keys = {f"base.{k}": f"base.{v}" for k, v in self.base.all_tied_weights_keys.items()}
        self._carry_added_tokens(located, known)
        return table

    def active_adapters(self) -> list[str]:
        """As in transformers: the name of the active adapter."""
        return [self.active_adapter]

    def disable_adapters(self) -> None:
        """Not as in transformers, where it holds until further notice, for every thread."""
        raise ConfigError(
            "A shadow is disabled for a block of code: `with model.disable_adapter():`; unload() is for good."
        )

    def enable_adapters(self) -> None:
        """See `disable_adapters`."""
        raise ConfigError("A shadow is enabled wherever `with model.disable_adapter():` does not disable it.")

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: Any = None) -> dict[str, Any]:
        """Not as in transformers, whose format is that of other adapters."""
        raise ConfigError(
            "A shadow's weights are model.adapter(name).state_dict(); save_pretrained() writes its folder."
        )

    def enable_peft_hotswap(self, *args: Any, **options: Any) -> None:
        """Not as in transformers: nothing need be prepared."""
        raise ConfigError("load_adapter(path, name, replace=True) takes the place of a loaded shadow at any time.")

    def carry_added_tokens(self, own: int, count: int) -> None:
        """Let the adapters carry ``count`` rows beyond the first ``own``, which are the base's.

        The base is resized, unless it has these rows already; then they are what `unload` restores.
        """
        located = architectures.locate(self.base)
        if architectures.vocabulary_size(located.embeddings) == own:
            self.resize_token_embeddings(own + count, mean_resizing=False)
            return
        check_resizable(located)
        self._rows_before = [table.detach()[own:].clone() for _, table in Tables(located).named()]
        self._carry_added_tokens(located, fingerprint(located, own))

    def _carry_added_tokens(self, base: Anatomy, known: dict[str, Any]) -> None:
        """Let all adapters carry the rows beyond the base's own vocabulary, that of its fingerprint ``known``."""
        own, rows = known["vocab_size"], architectures.vocabulary_size(base.embeddings)
        before, added = self.shadow.added_tokens, None
        if before is not None:
            before.remove()
        if rows > own:
            added = AddedTokens(base, own, self.shadow.dtype)
            trains = len(self.adapters) == 1 and any(p.requires_grad for p in self.shadow.parameters())
            if before is not None:
                added.copy_from(before)
                trains = before.is_trained
            reads_head = not self.shadow.heads
            added.set_trained(trains, reads_head)
            added.hook(base, reads_head)
        self._attachment.added_tokens = added
        for name in self.adapters:
            self.adapter(name).added_tokens = added
        self.base_fingerprint = known if rows >= own else fingerprint(base)
        self._settle()

    def _remove_added_tokens(self) -> None:
        """Give the base back the rows that it had before `attach`."""
        added = self.shadow.added_tokens
        if added is None:
            return
        added.remove()
        before = len(self._rows_before[0]) if self._rows_before else 0
        if before != len(added.embeddings):
            self.base.resize_token_embeddings(added.first + before, mean_resizing=False)
        for rows, (_, table) in zip(self._rows_before, Tables(architectures.locate(self.base)).named(), strict=False):
            table.data[added.first :] = rows
        for name in self.adapters:
            self.adapter(name).added_tokens = None

    def _share_added_tokens(self, name: str, shadow: Shadow, path: str | Path) -> None:
        """Let an adapter that was read from ``path`` share the rows of the others, which must be the same.

        Raises:
            BaseModelError: other rows; a base has one table for all its adapters.
        """
        carried, shared = shadow.added_tokens, self.shadow.added_tokens
        others = [n for n in self.adapters if n != name]
        if carried is None and shared is None:
            return
        if carried is None or shared is None or (others and not carried.equals(shared)):
            raise BaseModelError(
                f"{path} has other rows of added tokens than adapter {(others or self.adapters)[0]!r}, and a base has one table "
                "for all: load it beside a base of its own, by umbra.load."
            )
        shared.load_state_dict(carried.state_dict())
        shadow.added_tokens = shared

    def _check_new_name(self, name: Any) -> str:
        if not isinstance(name, str) or not name or "." in name or name == BASE:
            raise ConfigError(f"An adapter's name is a text without dots, and not {BASE}; got {name!r}.")
        if name in self.adapters:
            raise ConfigError(f"There is an adapter {name!r} already: delete_adapter it, or load with replace=True.")
        return name

    def _seat(self, name: str, shadow: Shadow) -> None:
        before = self.adapter(name) if name in self.adapters else None
        shadow.place(self._free_cache_layer(len(shadow.cache_layers), before))
        kernels.patch_linears(shadow.modules())
        shadow.train(self.shadow.training)
        shadow.added_tokens = self.shadow.added_tokens
        if shadow.added_tokens is not None and self.adapters != [name]:
            shadow.added_tokens.requires_grad_(False)  # a training of one adapter would change the others
        if before is self.shadow:
            self.shadow = shadow
        else:
            shadow.freeze()
            self.resting[name] = shadow
        self._settle()

    def _free_cache_layer(self, count: int, leaving: Shadow | None) -> int:
        shadows = [s for s in map(self.adapter, self.adapters) if s is not leaving]
        taken = {l for shadow in shadows for l in shadow.cache_layers}
        start = architectures.cache_depth(architectures.locate(self.base))
        while not taken.isdisjoint(range(start, start + count)):
            start += 1
        return start

    def _settle(self) -> None:
        """Bring up to date what depends on which adapters there are: the cache's layers, and what no checkpoint holds."""
        shadows = {s.first_cache_layer: s.backbone.config for s in map(self.adapter, self.adapters)}
        architectures.lay_out(self.config, architectures.composite_config(self.base.config, shadows))
        elsewhere = {key for key in self._keys_to_ignore_on_save if not key.startswith("resting.")}
        self._keys_to_ignore_on_save = elsewhere | set(self.resting.state_dict(prefix="resting."))


def group_rows(names: Sequence[str | None], rows: int, device: torch.device) -> dict[str, Tensor]:
    """Which rows of a batch each adapter has: name → (N,) row numbers; rows without an adapter are in none.

    Args:
        names: one for each sequence; None or `BASE` for the bare base.
        rows: B, a multiple of ``len(names)`` where beams or several answers stand beside each other.

    Raises:
        ConfigError: B is no multiple.
    """
    names = list(names)
    if not names or rows % len(names):
        raise ConfigError(f"adapter_names holds {len(names)} names for a batch of {rows}: give one for each row.")
    groups: dict[str, list[int]] = {}
    for row in range(rows):
        name = names[row // (rows // len(names))]
        if name is not None and name != BASE:
            groups.setdefault(name, []).append(row)
    return {name: torch.tensor(mine, device=device) for name, mine in groups.items()}


def pick_rows(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Those rows (N,) of each entry that has one for each sequence.

    Raises:
        ConfigError: a packed batch, whose rows are no sequences.
    """
    if batch.get("cu_seq_lens_q") is not None:
        raise ConfigError("adapter_names needs one sequence a row: this batch is packed (cu_seq_lens).")
    return {k: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) > 1 else v for k, v in batch.items()}
