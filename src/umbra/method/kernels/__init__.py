"""Fast forms of the method, compared with core.py and PyTorch in tests, and the one switch between fast and plain.

`update_and_inject` runs a block boundary (dispatch.py), `linear_loss` the heads and their losses (head_loss.py),
`recompute_activations` saves memory (recomputation.py), `patch_linears` speeds up linear layers on a CPU (products.py).
``UMBRA_KERNELS=reference`` in the environment, or ``with kernels.reference():``, runs core.py and PyTorch instead: the same numbers
to 1e-6 in fp32, gradients included, but slower. They also run within torch.compile, whose compiler fuses them itself.
"""

from umbra.method.kernels.dispatch import are_plain, may_decode_packed, pack_all, update_and_inject
from umbra.method.kernels.head_loss import Head, linear_loss
from umbra.method.kernels.packed import PackedBoundary, update_and_inject_packed
from umbra.method.kernels.plain import is_plain
from umbra.method.kernels.products import patch_linears, product, unpatch_linears
from umbra.method.kernels.recomputation import recompute_activations
from umbra.method.kernels.switch import in_use, reference

__all__ = [
    "Head",
    "PackedBoundary",
    "are_plain",
    "in_use",
    "is_plain",
    "linear_loss",
    "may_decode_packed",
    "pack_all",
    "patch_linears",
    "product",
    "recompute_activations",
    "reference",
    "unpatch_linears",
    "update_and_inject",
    "update_and_inject_packed",
]
