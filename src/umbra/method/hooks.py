"""Hooks on the base's blocks and its head: they apply the open `ForwardContext` of this thread.

A `ForwardContext` is open for the length of one forward of one thread; nothing of the state lies on a module. A block that runs
while no context is open raises: a hook that silently did nothing would answer with the bare base.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from umbra.base import private_torch
from umbra.base.added_tokens import AddedTokens
from umbra.errors import BaseModelError, ConfigError, StateError
from umbra.method import kernels
from umbra.method.adapter_state import AdapterState
from umbra.method.head_inputs import HeadInputs

StartStates = Callable[[dict[str, Any]], Sequence[AdapterState]]  # from the keyword arguments of the decoder


class _Stack(threading.local):
    """The open contexts of one thread; nested calls push."""

    def __init__(self) -> None:
        self.contexts: list[ForwardContext] = []


_stack = _Stack()


def open_contexts() -> "list[ForwardContext]":
    """Return this thread's open contexts, the innermost last."""
    return list(_stack.contexts)


def check_free(blocks: nn.ModuleList) -> None:
    """Raise if a shadow is attached already.

    Raises:
        BaseModelError: a block carries hooks of an `Attachment`.
    """
    if any(_is_attached(block) for block in blocks):
        raise BaseModelError("This base already carries a shadow: unload() it first.")


def _is_attached(module: nn.Module) -> bool:
    return any(isinstance(hook, _Hook) for hook in private_torch.forward_pre_hooks_of(module))


def _refuse_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Raise a ConfigError where PEFT takes a model with a shadow into one of its own, before it changes it."""
    if child is None or type(parent).__module__.partition(".")[0] != "peft":
        return
    if any(_is_attached(module) for module in child.modules()):
        raise ConfigError(
            f"{type(parent).__name__} of PEFT cannot adapt a model to which a shadow is attached: use one of them. unload() the "
            "shadow first; or train the PEFT adapter, merge_and_unload() it, and attach to the merged model."
        )


register_module_module_registration_hook(_refuse_wrapper)


class Attachment:
    """A handle on the hooks of a base: `remove` takes all of them off again.

    Args:
        blocks: the L decoder blocks, in the very list that the decoder runs.
        base: the model to which they belong.
        head_name: the name of its task head, whose input and output a context may replace.
        decoder: the blocks' own model, if the adapter states start from the keyword arguments that it is given; None if each
            context brings them along.
        stream: which of the parallel hidden states (N, B, T, D) of the blocks is coupled; None for one (B, T, D).
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        base: PreTrainedModel,
        head_name: str,
        decoder: nn.Module | None = None,
        stream: int | None = None,
    ):
        self.blocks, self.stream, self.is_removed = blocks, stream, False
        self.hooked: list[nn.Module] = []
        self.block_handles: list[RemovableHandle] = []
        self.head_handles: list[RemovableHandle] = []
        self.decoder_handles: list[RemovableHandle] = []
        self.base, self.head_name = base, head_name
        self.added_tokens: AddedTokens | None = None  # their hooks follow the base's embeddings and head
        self.move_head_hooks(base.get_submodule(head_name))
        self.refresh_hooks()
        if decoder is not None:
            self.decoder_handles.append(decoder.register_forward_pre_hook(_BeforeDecoder(self), with_kwargs=True))

    def move_head_hooks(self, head: nn.Module) -> None:
        """Move the hooks of the head to another module.

        Args:
            head: the module that is the head now.
        """
        self.head = head
        self.head_is_linear: bool | None = None  # whether its logits are the base's; None until they were compared
        for handle in self.head_handles:
            handle.remove()
        self.head_handles = [
            head.register_forward_pre_hook(_BeforeHead(self)),
            head.register_forward_hook(_AfterHead(self)),
        ]

    def refresh_hooks(self) -> None:
        """Put the hooks on the modules that are in place now.

        A wrapper that was put around a block after `attach` (activation checkpointing, FSDP) then has the hooks outside: it
        recomputes the block alone, never the coupling. A replaced head or embedding table gets its hooks.
        """
        if (head := self.task_head) is not self.head:
            self.move_head_hooks(head)
        if self.added_tokens is not None:
            self.added_tokens.refresh_hooks(self.base, head)
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

    def current(self) -> "ForwardContext | None":
        """Return this thread's open context.

        That is the innermost one; or, within the contexts of other attachments, one of this attachment that chooses a path.
        """
        stack = _stack.contexts
        for context in reversed(stack):
            if context.attachment is self:
                return context if context is stack[-1] or context.chooses_path else None
            if not context.chooses_path:
                return None
        return None

    @property
    def task_head(self) -> nn.Module:
        """The base's own task head."""
        return self.base.get_submodule(self.head_name)

    @property
    def is_disabled(self) -> bool:
        """Whether this thread runs the bare base."""
        context = self.current()
        return context is not None and context.disabled

    @property
    def only(self) -> str | None:
        """The one path that this thread runs, "attached" or "shadow"; None for both."""
        context = self.current()
        return None if context is None else context.only


class ForwardContext:
    """One forward of the base, as a context manager; or the choice of a path for all calls of the model within it.

    Args:
        attachment: the hooks that apply it.
        states: the state of each adapter that takes part, or a function that makes them from the keyword arguments of the
            decoder; empty for the bare base.
        head: the input and output of the task head; None leaves it alone.
        disabled: run the bare base in calls of the model within the context.
        only: "attached" or "shadow", the one path that calls of the model within the context run; the base itself must not
            be called there.
    """

    def __init__(
        self,
        attachment: Attachment,
        states: Sequence[AdapterState] | StartStates = (),
        head: HeadInputs | None = None,
        disabled: bool = False,
        only: str | None = None,
    ):
        self.attachment, self.head, self.disabled, self.only = attachment, head, disabled, only
        self.start = states if callable(states) else None
        self.states: Sequence[AdapterState] = () if callable(states) else states

    @property
    def chooses_path(self) -> bool:
        """Whether it applies to calls of the model within it, and is not a forward itself."""
        return self.disabled or self.only is not None

    def __enter__(self) -> "ForwardContext":
        """Open the context in this thread.

        Raises:
            StateError: the shadow was unloaded.
        """
        if self.attachment.is_removed:
            raise StateError(
                "unload() has returned the base, and this model cannot run without it: attach or load again."
            )
        self.attachment.refresh_hooks()
        _stack.contexts.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Close the context."""
        _stack.contexts.pop()


class _Hook:
    """A hook that an `Attachment` registers."""

    def __init__(self, attachment: Attachment, l: int = -1):
        self.attachment, self.l = attachment, l

    def context(self) -> ForwardContext:
        context = self.attachment.current()
        if context is None or context.only is not None:
            raise StateError(
                "A block of the base ran outside the forward of its ShadowModel (the base was called directly, or its own "
                "code recomputed the block with its hooks). Call the ShadowModel; for the bare base use "
                "`with model.disable_adapter():`, or unload()."
            )
        return context


class _BeforeDecoder(_Hook):
    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self.attachment.current()
        if context is not None and context.start is not None:
            context.states = context.start(kwargs)


class _BeforeBlock(_Hook):
    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states = self.context().states
        if not states:
            return None
        h = args[0] if args else kwargs["hidden_states"]
        streams, i = h, self.attachment.stream
        h = h if i is None else streams[i]
        for state in states:
            h = state.update_and_inject(self.l, h)
        h = h if i is None else torch.cat([streams[:i], h[None], streams[i + 1 :]])
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})


class _BeforeHead(_Hook):
    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        context = self.attachment.current()
        return None if context is None or context.head is None else (context.head.select(args[0]),)


class _AfterHead(_Hook):
    def __call__(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        context = self.attachment.current()
        return None if context is None or context.head is None else context.head.replace(args[0], output)


def is_plain_linear(head: nn.Module) -> bool:
    """Return whether a head is a linear layer without hooks other than those of an `Attachment`."""
    return kernels.is_plain(head, _Hook, {nn.Linear})
