"""Hooks on the base's blocks, and the state of one forward in per-layer slots.

Nothing of the state lies on a module: a `Frame` is open for the length of one forward of one thread. The hook before
block l reads slot l and writes that of the next seam. A block that runs while no frame is open raises: a hook
that quietly does nothing would answer with the bare base.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from umbra.base import sharded
from umbra.errors import BaseModelError, ConfigError, StateError
from umbra.method import kernels
from umbra.method.core import Couplings


class _Frames(threading.local):
    """The stack of open frames of one thread; nested calls push. And the couplings that are packed within it."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.packs: dict[Couplings, dict[int, kernels.Pack]] = {}


_frames = _Frames()


@contextmanager
def packed(couplings: Iterable[Couplings]) -> Iterator[None]:
    """A context in which this thread decodes with packed weights, which must not change meanwhile."""
    before = _frames.packs
    _frames.packs = {c: c.packs() for c in couplings if sharded.is_whole(next(c.parameters()))}
    try:
        yield
    finally:
        _frames.packs = before


def check_free(blocks: nn.ModuleList) -> None:
    """Raise a BaseModelError where a shadow is attached already."""
    if any(isinstance(hook, _Hook) for block in blocks for hook in block._forward_pre_hooks.values()):
        raise BaseModelError("This base already carries a shadow: unload() it first.")


def _refuse_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Raise a ConfigError where PEFT takes a model with a shadow into one of its own, before it changes it."""
    if child is None or type(parent).__module__.partition(".")[0] != "peft":
        return
    if any(isinstance(hook, _Hook) for module in child.modules() for hook in module._forward_pre_hooks.values()):
        raise ConfigError(
            f"{type(parent).__name__} of PEFT cannot adapt a model that a shadow is attached to: take one of both. unload() the "
            "shadow first; or train the PEFT adapter, merge_and_unload() it, and attach to what that returns."
        )


register_module_module_registration_hook(_refuse_wrapper)


class Attachment:
    """The handle on a base's hooks: `remove` takes every one of them away again.

    Args:
        blocks: the L decoder blocks, in the very list that the decoder runs.
        base: the model of which they are.
        head_name: of its task head, whose input rows a frame may choose and whose output a frame may replace.
        decoder: the blocks' own model, where the lanes are to start from what that is given; None where a frame
            brings them along.
        stream: which of the parallel hidden states (N, B, T, D) of its blocks is coupled; None for one (B, T, D).
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        base: nn.Module,
        head_name: str,
        decoder: nn.Module | None = None,
        stream: int | None = None,
    ):
        self.blocks, self.hooked, self.stream, self.is_removed = blocks, [], stream, False
        self.block_handles: list[Any] = []
        self.head_handles: list[Any] = []
        self.decoder_handles: list[Any] = []
        self.base, self.head_name = base, head_name
        self.added_tokens: Any = None  # whose hooks follow the base's embeddings and head
        self.settle_head(base.get_submodule(head_name))
        self.settle()
        if decoder is not None:
            self.decoder_handles.append(decoder.register_forward_pre_hook(_BeforeDecoder(self), with_kwargs=True))

    def settle_head(self, head: nn.Module) -> None:
        """Move the hooks of the head to the module that is the head now."""
        self.head = head
        self.head_is_linear: bool | None = None  # whether its logits are the base's; not known yet
        for handle in self.head_handles:
            handle.remove()
        self.head_handles = [
            head.register_forward_pre_hook(_BeforeHead(self)),
            head.register_forward_hook(_AfterHead(self)),
        ]

    def settle(self) -> None:
        """Put the hooks on the modules that stand in the list now.

        A wrapper that was put around a block after `attach` (activation checkpointing, FSDP) has then the hooks outside:
        it recomputes the block alone, never the coupling. A head or embeddings put in the place of others get their hooks.
        """
        if (head := self.base.get_submodule(self.head_name)) is not self.head:
            self.settle_head(head)
        if self.added_tokens is not None:
            self.added_tokens.settle(self.base, head)
        if self.hooked == list(self.blocks):
            return
        for handle in self.block_handles:
            handle.remove()
        self.hooked = list(self.blocks)
        self.block_handles = [
            block.register_forward_pre_hook(_BeforeBlock(self, l), with_kwargs=True)
            for l, block in enumerate(self.hooked)
        ]

    def remove(self) -> None:
        """Take all hooks off the base, for good."""
        self.is_removed = True
        for handles in (self.block_handles, self.head_handles, self.decoder_handles):
            for handle in handles:
                handle.remove()
            handles.clear()

    def current(self) -> "Frame | None":
        """This thread's open frame: its innermost one, or the context of this attachment that those of others lie within."""
        stack = _frames.stack
        for frame in reversed(stack):
            if frame.attachment is self:
                return frame if frame is stack[-1] or frame.is_context else None
            if not frame.is_context:
                return None
        return None


class Lane:
    """One adapter's way through one forward: its state in a slot per seam.

    Args:
        s0: (B, T, D), or (N, T, D) where the adapter has only N rows of the batch.
        rows: (N,), which rows those are; None for all.
    """

    def __init__(self, couplings: Couplings, s0: Tensor, rows: Tensor | None = None):
        self.couplings, self.rows = couplings, rows
        self.slots: dict[int, Tensor] = {couplings.seams[0]: s0}
        self.packs = (_frames.packs.get(couplings) or None) if couplings.decodes(s0) else None
        self.fast = self.packs is None and sharded.is_whole(next(couplings.parameters())) and couplings.is_plain()

    def before(self, l: int, h: Tensor) -> Tensor:
        """The input of block l, (B, T, D), with this adapter's rows corrected."""
        seams = self.couplings.seams
        if l not in seams:
            return h
        mine = h if self.rows is None else h[self.rows]
        s = self._slot(l, mine)
        if self.packs is None:
            corrected, s = self.couplings.couple(l, mine, s, self.fast)
        else:
            corrected, s = kernels.couple_few(mine, s, self.packs[l])
        if not torch.is_grad_enabled():
            del self.slots[l]
        if l < seams[-1]:
            self.slots[seams[seams.index(l) + 1]] = s
        return corrected if self.rows is None else h.index_copy(0, self.rows, corrected)

    def _slot(self, l: int, h: Tensor) -> Tensor:
        s = self.slots.get(l)
        if s is None or s.shape != h.shape:
            found = "nothing" if s is None else f"a state of shape {tuple(s.shape)}"
            raise StateError(f"Block {l} has a hidden state of shape {tuple(h.shape)}, but its slot holds {found}.")
        return s


class Frame:
    """One forward of the base; a context manager.

    Args:
        lanes: the adapters that take part, or what makes them from the keyword arguments that the decoder is given;
            none for the bare base.
        head: what the task head reads and returns; None leaves it alone.
        disabled: whether calls of the model within are of the bare base, too.
        only: "attached" or "shadow", the one path that calls of the model within take; the base itself must not be called.
    """

    def __init__(
        self,
        attachment: Attachment,
        lanes: "Sequence[Lane] | Callable[[dict[str, Any]], Sequence[Lane]]" = (),
        head: "HeadPlan | None" = None,
        disabled: bool = False,
        only: str | None = None,
    ):
        self.attachment, self.head, self.disabled, self.only = attachment, head, disabled, only
        self.start = lanes if callable(lanes) else None
        self.lanes: Sequence[Lane] = () if callable(lanes) else lanes

    @property
    def is_context(self) -> bool:
        """Whether it is about calls of the model within, and not a forward itself."""
        return self.disabled or self.only is not None

    def __enter__(self) -> "Frame":
        if self.attachment.is_removed:
            raise StateError(
                "unload() has given the base back, and this model cannot run without it: attach or load again."
            )
        self.attachment.settle()
        _frames.stack.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _frames.stack.pop()


class HeadPlan:
    """Which rows the head reads, and by which weights.

    Args:
        heads: trained copies of the head, "attached" and "shadow", of all rows of the batch (None) or of some (N,);
            those that are empty leave the base's.
        flatten: read a list of positions instead of (B, T).
        keep: flat positions (N,) of (B, T) that the head reads; None for all.
        extra: (M, D) rows of s⁰ that the head reads after them.
        use: told the rows (N, D) instead of the head, which then has nothing to do.
    """

    def __init__(
        self,
        heads: Sequence[tuple[Tensor | None, nn.ModuleDict]],
        flatten: bool = False,
        keep: Tensor | None = None,
        extra: Tensor | None = None,
        use: Callable[[Tensor], None] | None = None,
    ):
        self.heads = [(rows, copies) for rows, copies in heads if copies]
        self.flatten, self.keep, self.extra, self.use = flatten, keep, extra, use
        self.rows: int | None = None  # of the attached path; set once the head has run

    def choose(self, h: Tensor) -> Tensor:
        if not self.flatten:
            return h
        rows = h.reshape(-1, h.shape[-1])
        rows = rows if self.keep is None else rows[self.keep.to(rows.device)]
        self.rows = len(rows)
        if self.use is not None:
            self.use(rows)
            return rows[None, :0]
        if self.extra is not None:
            rows = torch.cat([rows, self.extra.to(rows.dtype)])
        return rows[None]

    def replace(self, h: Tensor, logits: Tensor) -> Tensor:
        for rows, copies in self.heads:
            mine = (h if rows is None else h[rows]).to(next(copies.parameters()).dtype)
            if rows is not None:
                logits = logits.index_copy(0, rows, copies["attached"](mine).to(logits.dtype))
            elif self.extra is None:
                logits = copies["attached"](mine)
            else:
                logits = torch.cat(
                    [copies["attached"](mine[:, : self.rows]), copies["shadow"](mine[:, self.rows :])], dim=1
                )
        return logits


class _Hook:
    """What an `Attachment` registers."""

    def __init__(self, attachment: Attachment, l: int = -1):
        self.attachment, self.l = attachment, l

    def frame(self) -> Frame:
        frame = self.attachment.current()
        if frame is None or frame.only is not None:
            raise StateError(
                "A block of the base ran outside the forward of its ShadowModel (the base was called directly, or its own "
                "code recomputed the block with its hooks). Call the ShadowModel; for the bare base use "
                "`with model.disable_adapter():`, or unload()."
            )
        return frame


class _BeforeDecoder(_Hook):
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        frame = self.attachment.current()
        if frame is not None and frame.start is not None:
            frame.lanes = frame.start(kwargs)


class _BeforeBlock(_Hook):
    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> Any:
        lanes = self.frame().lanes
        if not lanes:
            return None
        h = args[0] if args else kwargs["hidden_states"]
        streams, i = h, self.attachment.stream
        h = h if i is None else streams[i]
        for lane in lanes:
            h = lane.before(self.l, h)
        h = h if i is None else torch.cat([streams[:i], h[None], streams[i + 1 :]])
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})


class _BeforeHead(_Hook):
    def __call__(self, head: nn.Module, args: tuple) -> Any:
        frame = self.attachment.current()
        if frame is None or frame.head is None:
            return None
        return (frame.head.choose(args[0]),)


class _AfterHead(_Hook):
    def __call__(self, head: nn.Module, args: tuple, output: Tensor) -> Any:
        frame = self.attachment.current()
        if frame is None or frame.head is None:
            return None
        return frame.head.replace(args[0], output)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is a linear layer on which there are no hooks but those of an `Attachment`."""
    return kernels.is_plain(head, _Hook, {nn.Linear})
