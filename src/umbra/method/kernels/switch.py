"""The one switch between the fast forms and the plain ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_plain = os.environ.get("UMBRA_KERNELS") == "reference"


def in_use() -> bool:
    """Whether the fast forms run."""
    return not _plain and not torch.compiler.is_compiling()


@contextmanager
def reference() -> Iterator[None]:
    """A context in which every thread runs the plain forms."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
