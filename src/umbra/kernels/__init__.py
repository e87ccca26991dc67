"""The fast forms of what core.py says plainly, and the one switch between the two.

`couple` is the seam between two blocks (couple.py; on a GPU couple_triton.py), `linear_loss` the heads and their losses
(loss.py). ``UMBRA_KERNELS=reference`` in the environment, or ``with kernels.reference():``, runs core.py instead: the same
numbers to 1e-6 in fp32, gradients included, more slowly. Within torch.compile core.py runs too: the compiler fuses it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .couple import FEW as FEW
from .couple import Pack as Pack
from .couple import couple as couple
from .couple import couple_few as couple_few
from .couple import pack as pack
from .loss import Head as Head
from .loss import linear_loss as linear_loss
from .saved import sparing as sparing

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
