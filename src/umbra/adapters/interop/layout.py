"""Correspondence between the tensors of another package's file and those of a shadow: one table for reading and writing."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from umbra.adapters.files import Tensors
from umbra.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """One tensor of the file.

    It equals each of the shadow's tensors ``sources``, or stacks their transposes. Without sources it has no effect on the
    output: it is dropped when read and written as ``fill``.

    Args:
        shape: of the file's tensor.
        sources: names of the shadow's tensors.
        stacked: whether it stacks their transposes.
        fill: the value of a tensor without sources.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    stacked: bool = False
    fill: Tensor | None = None


class Layout:
    """The table of one file.

    Args:
        state: the shadow's tensors by name.
    """

    def __init__(self, state: Tensors):
        self.state = state
        self.slots: dict[str, Slot] = {}

    def same(self, name: str, *sources: str) -> None:
        """Let the file's tensor ``name`` equal each of the shadow's tensors ``sources``."""
        self.slots[name] = Slot(tuple(self.state[sources[0]].shape), sources)

    def module(self, prefix: str, *source_prefixes: str) -> None:
        """Let every tensor below ``prefix`` in the file equal the one of the same name below each source prefix."""
        for key in [k for k in self.state if k.startswith(source_prefixes[0])]:
            suffix = key.removeprefix(source_prefixes[0])
            self.same(prefix + suffix, *(source + suffix for source in source_prefixes))

    def stack(self, name: str, sources: Iterable[str]) -> None:
        """Let the file's tensor ``name`` (N, n, m) stack the transposes of N matrices (m, n) of the shadow."""
        names = tuple(sources)
        m, n = self.state[names[0]].shape
        self.slots[name] = Slot((len(names), n, m), names, stacked=True)

    def unused(self, name: str, fill: Tensor) -> None:
        """Let the file's tensor ``name`` be one without an effect, written as ``fill``."""
        self.slots[name] = Slot(tuple(fill.shape), fill=fill)

    def read(self, tensors: Tensors, file: Path) -> Tensors:
        """Return the shadow's tensors.

        Args:
            tensors: the file's tensors by name.
            file: the file, for the message.

        Raises:
            CheckpointError: a tensor is missing, unknown, misshapen, not floating point or not finite.
        """
        check_names(self.slots.keys(), tensors.keys(), file)
        state: Tensors = {}
        for name, slot in self.slots.items():
            value = tensors[name]
            if tuple(value.shape) != slot.shape or not value.is_floating_point():
                raise CheckpointError(
                    f"{file}: {name!r} is {value.dtype} of shape {tuple(value.shape)}, this base needs floating point of "
                    f"shape {slot.shape}."
                )
            if not value.isfinite().all():
                raise CheckpointError(f"{file}: {name!r} holds values that are no finite numbers.")
            for i, key in enumerate(slot.sources):
                state[key] = value[i].T if slot.stacked else value
        return state

    def write(self, package: str) -> Tensors:
        """Return the file's tensors, copied to the CPU.

        Args:
            package: the format's name, for the message.

        Raises:
            CheckpointError: the file has one tensor where the shadow has several that differ.
        """
        tensors: Tensors = {}
        for name, slot in self.slots.items():
            values = [self.state[key] for key in slot.sources]
            if slot.stacked:
                tensors[name] = torch.stack([value.T for value in values])
            elif values:
                if any(not torch.equal(value, values[0]) for value in values):
                    raise CheckpointError(
                        f"{package} stores one {name!r}, but this adapter has {len(values)} trained ones that differ: "
                        f"{', '.join(slot.sources)}."
                    )
                tensors[name] = values[0]
            else:
                assert slot.fill is not None
                tensors[name] = slot.fill
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def check_names(expected: Iterable[str], names: Iterable[str], file: Path) -> None:
    """Raise a CheckpointError unless a file's tensors have the expected names."""
    expected, names = set(expected), set(names)
    for problem, differing in (("lacks", expected - names), ("has unknown", names - expected)):
        if differing:
            raise CheckpointError(f"{file} {problem} tensors: {len(differing)}, {sorted(differing)[0]!r} first.")
