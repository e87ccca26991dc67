"""Tensors of another format's file, and which of ours hold the same numbers: one table for reading and for writing."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from umbra.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of theirs.

    It holds the same as each of ``mine``, or the stack of their transposes; without any of ours it feeds nothing, is
    dropped in reading and written as ``fill``.
    """

    shape: tuple[int, ...]
    mine: tuple[str, ...] = ()
    stacked: bool = False
    fill: Tensor | None = None


class Layout:
    """The table of one file.

    Args:
        own: our tensors by name.
    """

    def __init__(self, own: Tensors):
        self.own = own
        self.slots: dict[str, Slot] = {}

    def same(self, theirs: str, *mine: str) -> None:
        """One of theirs holds what each of ours holds."""
        self.slots[theirs] = Slot(tuple(self.own[mine[0]].shape), mine)

    def module(self, theirs: str, *mine: str) -> None:
        """Everything below a prefix of theirs is called alike below each of our prefixes."""
        for key in [k for k in self.own if k.startswith(mine[0])]:
            rest = key.removeprefix(mine[0])
            self.same(theirs + rest, *(prefix + rest for prefix in mine))

    def stack(self, theirs: str, mine: Iterable[str]) -> None:
        """One of theirs stacks matrices (m, n) of ours, transposed."""
        names = tuple(mine)
        m, n = self.own[names[0]].shape
        self.slots[theirs] = Slot((len(names), n, m), names, stacked=True)

    def dead(self, theirs: str, fill: Tensor) -> None:
        """One of theirs feeds nothing."""
        self.slots[theirs] = Slot(tuple(fill.shape), fill=fill)

    def read(self, tensors: Tensors, file: Path) -> Tensors:
        """Ours, from theirs.

        Raises:
            CheckpointError: a tensor is missing, left over, misshapen, not floating point or not finite.
        """
        check_names(self.slots.keys(), tensors.keys(), file)
        found: Tensors = {}
        for name, slot in self.slots.items():
            value = tensors[name]
            if tuple(value.shape) != slot.shape or not value.is_floating_point():
                raise CheckpointError(
                    f"{file}: {name!r} is {value.dtype} of shape {tuple(value.shape)}, needed beside this base is floating "
                    f"point of shape {slot.shape}."
                )
            if not value.isfinite().all():
                raise CheckpointError(f"{file}: {name!r} holds values that are no finite numbers.")
            for i, key in enumerate(slot.mine):
                found[key] = value[i].T if slot.stacked else value
        return found

    def write(self, form: str) -> Tensors:
        """Theirs, from ours.

        Raises:
            CheckpointError: tensors of ours that must be equal there differ.
        """
        written: Tensors = {}
        for name, slot in self.slots.items():
            values = [self.own[key] for key in slot.mine]
            if slot.stacked:
                written[name] = torch.stack([value.T for value in values])
            elif values:
                if any(not torch.equal(value, values[0]) for value in values):
                    raise CheckpointError(
                        f"{form} keeps one {name!r}, but this adapter has {len(values)} trained ones that differ: "
                        f"{', '.join(slot.mine)}."
                    )
                written[name] = values[0]
            else:
                assert slot.fill is not None
                written[name] = slot.fill
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in written.items()}


def check_names(needed: Iterable[str], found: Iterable[str], file: Path) -> None:
    """Raise a CheckpointError unless both are the same names."""
    needed, found = set(needed), set(found)
    for problem, names in (("lacks", needed - found), ("has unknown", found - needed)):
        if names:
            raise CheckpointError(f"{file} {problem} tensors: {len(names)}, {sorted(names)[0]!r} first.")
