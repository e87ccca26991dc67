"""Private names of bitsandbytes that Umbra calls: see `umbra.base.private`."""

from typing import Any

import torch
from torch import Tensor

from umbra.base import private
from umbra.base.private import PrivateName

SUPPORTED = ">=0.50"  # as in pyproject.toml
NAMES = (PrivateName("bitsandbytes.functional", "_convert_weight_packed_for_cpu_inverse"),)


def check() -> None:
    """Check the private names of bitsandbytes.

    Raises:
        ImportError: a name is missing.
    """
    private.check("bitsandbytes", SUPPORTED, NAMES)


def unpack_for_cpu(packed: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
    """Return 4-bit weights in their usual order, from the order that a CPU kernel reads, and their quantization state."""
    check()
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight, state = _convert_weight_packed_for_cpu_inverse(packed, quant_state)
    assert isinstance(weight, torch.Tensor)
    return weight, state
