"""The one switch between the fast forms and the plain ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_is_reference = os.environ.get("UMBRA_KERNELS") == "reference"


def in_use() -> bool:
    """Return whether the fast forms run."""
    return not _is_reference and not torch.compiler.is_compiling()


@contextmanager
def reference() -> Iterator[None]:
    """Run the plain forms within this context, in every thread."""
    global _is_reference
    before, _is_reference = _is_reference, True
    try:
        yield
    finally:
        _is_reference = before
