"""Hooks on the base's blocks, and the state of one forward in per-layer slots.

Nothing of the state lies on a module: a `Frame` is open for the length of one forward of one thread. Before block l
its hook reads slot l, after the block it writes slot l + 1. A coupled block that runs while no frame is open raises:
a hook that quietly does nothing would answer with the bare base.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .core import Couplings
from .errors import BaseModelError, StateError


class _Frames(threading.local):
    """The stack of open frames of one thread; nested calls push."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []


_frames = _Frames()


class Attachment:
    """The handle on a base's hooks: `remove` takes every one of them away again.

    Args:
        blocks: the L decoder blocks.
        head: the task head, whose input rows a frame may choose and whose output a frame may replace.
        first: the first coupled block.
        decoder: the blocks' own model, where the state is to start from what that is given; None where a frame
            brings it along.
        stream: which of the parallel hidden states (N, B, T, D) of its blocks is coupled; None for one (B, T, D).
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        head: nn.Module,
        first: int,
        decoder: nn.Module | None = None,
        stream: int | None = None,
    ):
        if any(isinstance(hook, _Hook) for block in blocks for hook in block._forward_pre_hooks.values()):
            raise BaseModelError("This base already carries a shadow: unload() it first.")
        last = len(blocks) - 1
        self.handles, self.stream = [], stream
        if decoder is not None:
            self.handles.append(decoder.register_forward_pre_hook(_BeforeDecoder(self), with_kwargs=True))
        for l in range(first, len(blocks)):
            self.handles.append(blocks[l].register_forward_pre_hook(_BeforeBlock(self, l), with_kwargs=True))
            if l < last:
                self.handles.append(blocks[l].register_forward_hook(_AfterBlock(self, l)))
        self.handles.append(head.register_forward_pre_hook(_BeforeHead(self)))
        self.handles.append(head.register_forward_hook(_AfterHead(self)))

    def remove(self) -> None:
        """Take all hooks off the base."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def current(self) -> "Frame | None":
        """This thread's open frame, if its innermost one is of this attachment."""
        stack = _frames.stack
        return stack[-1] if stack and stack[-1].attachment is self else None


class Frame:
    """The state of one forward; a context manager.

    Args:
        couplings: the adapter, or None to run the bare base.
        s0: (B, T, D), the state before the first coupled block; or a function that computes it from what the decoder
            is given (a dict of its keyword arguments).
        head: what the task head reads and returns; None leaves it alone.
    """

    def __init__(
        self,
        attachment: Attachment,
        couplings: Couplings | None = None,
        s0: Tensor | Callable[[dict[str, Any]], Tensor] | None = None,
        head: "HeadPlan | None" = None,
    ):
        self.attachment, self.couplings, self.head = attachment, couplings, head
        self.start = s0 if callable(s0) else None
        self.slots: dict[int, Tensor] = {} if couplings is None or not torch.is_tensor(s0) else {couplings.first: s0}

    def __enter__(self) -> "Frame":
        _frames.stack.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _frames.stack.pop()

    def before(self, l: int, h: Tensor) -> Tensor:
        assert self.couplings is not None
        stream = self.attachment.stream
        if stream is None:
            return self.couplings.inject(l, h, self._slot(l, h))
        active = self.couplings.inject(l, h[stream], self._slot(l, h[stream]))
        return torch.cat([h[:stream], active[None], h[stream + 1 :]])

    def after(self, l: int, h: Tensor) -> None:
        assert self.couplings is not None
        h = h if self.attachment.stream is None else h[self.attachment.stream]
        self.slots[l + 1] = self.couplings.update(l, h, self._slot(l, h))
        if not torch.is_grad_enabled():
            del self.slots[l]

    def _slot(self, l: int, h: Tensor) -> Tensor:
        s = self.slots.get(l)
        if s is None or s.shape != h.shape:
            found = "nothing" if s is None else f"a state of shape {tuple(s.shape)}"
            raise StateError(f"Block {l} has a hidden state of shape {tuple(h.shape)}, but its slot holds {found}.")
        return s


class HeadPlan:
    """Which rows the head reads, and by which weights.

    Args:
        keep: flat positions (N,) of (B, T) that the head reads; None for all.
        extra: (M, D) rows of s⁰ that the head reads after them.
        heads: trained copies of the head by path, "attached" and "shadow"; empty to use the base's.
    """

    def __init__(self, keep: Tensor | None, extra: Tensor | None, heads: nn.ModuleDict, flatten: bool = True):
        self.keep, self.extra, self.heads, self.flatten = keep, extra, heads, flatten
        self.rows: int | None = None  # of the attached path; set once the head has run

    def choose(self, h: Tensor) -> Tensor:
        if not self.flatten:
            return h
        rows = h.reshape(-1, h.shape[-1])
        rows = rows if self.keep is None else rows[self.keep.to(rows.device)]
        self.rows = len(rows)
        if self.extra is not None:
            rows = torch.cat([rows, self.extra.to(rows.dtype)])
        return rows[None]

    def replace(self, h: Tensor, logits: Tensor) -> Tensor:
        if not self.heads:
            return logits
        h = h.to(next(self.heads.parameters()).dtype)
        attached, shadow = self.heads["attached"], self.heads["shadow"]
        if self.extra is None:
            return attached(h)
        return torch.cat([attached(h[:, : self.rows]), shadow(h[:, self.rows :])], dim=1)


class _Hook:
    def __init__(self, attachment: Attachment, l: int = -1):
        self.attachment, self.l = attachment, l

    def frame(self) -> Frame:
        frame = self.attachment.current()
        if frame is None:
            raise StateError(
                "A block of the base ran outside the forward of its ShadowModel (the base was called directly, or a "
                "checkpoint wrapper around the block recomputed it). Call the ShadowModel; for the bare base use "
                "`with model.disable_adapter():`, or unload()."
            )
        return frame


class _BeforeDecoder(_Hook):
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        frame = self.attachment.current()
        if frame is not None and frame.couplings is not None and frame.start is not None:
            frame.slots[frame.couplings.first] = frame.start(kwargs)


class _BeforeBlock(_Hook):
    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> Any:
        frame = self.frame()
        if frame.couplings is None:
            return None
        if args:
            return (frame.before(self.l, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": frame.before(self.l, kwargs["hidden_states"])}


class _AfterBlock(_Hook):
    def __call__(self, block: nn.Module, args: tuple, output: Any) -> None:
        frame = self.frame()
        if frame.couplings is not None:
            frame.after(self.l, output[0] if isinstance(output, tuple | list) else output)


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
