"""The choice of a kernel for each block boundary: core.py itself, PyTorch, Triton, or packed weights.

A fast form reads the weights outside their modules, so core.py runs wherever a module could do something else: a hook, a
parametrisation, a wrapper, autocast.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from umbra.method.core import Couplings, Injection, Update
from umbra.method.kernels import boundary_torch
from umbra.method.kernels.boundary import NO_MASKS, Boundary, Masks, boundary_of, draw_masks
from umbra.method.kernels.packed import MAX_ROWS, PackedBoundary, pack
from umbra.method.kernels.plain import PLAIN_KINDS, is_plain
from umbra.method.kernels.switch import in_use

KINDS = PLAIN_KINDS | {Injection, Update, Couplings}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
MAX_GATE, MAX_RANK = 32, 64  # G and R that boundary_triton.py takes, which bounds its registers


def update_and_inject(
    couplings: Couplings, l: int, h: Tensor, s: Tensor, is_readable: bool = True
) -> tuple[Tensor, Tensor]:
    """Return h and s after the boundary before block l, as `Couplings.update_and_inject`.

    Args:
        couplings: the modules.
        l: the block before which the boundary lies.
        h: (…, D), the output of block l − 1.
        s: (…, D), the state, in the dtype of the weights.
        is_readable: whether the weights may be read outside their modules: see `are_plain`.
    """
    if is_readable and _may_fuse(h):
        return fused(h, s, boundary_of(couplings, l), draw_masks(couplings, l, h))
    return couplings.update_and_inject(l, h, s)


def fused(h: Tensor, s: Tensor, boundary: Boundary, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
    """Return h and s after one boundary, computed by Triton on a GPU and by PyTorch elsewhere.

    Args:
        h: (…, D), of any floating dtype; the result has the same.
        s: (…, D), in the dtype of the weights.
        boundary: the weights.
        masks: dropout masks.
    """
    if takes_triton(h, s, boundary):
        return _triton().update_and_inject(h, s, boundary, masks)
    return boundary_torch.update_and_inject(h, s, boundary, masks)


def are_plain(couplings: Couplings) -> bool:
    """Return whether the kernels may read the weights: no module is hooked, wrapped or parametrised."""
    return all(is_plain(module, kinds=KINDS) for module in couplings.modules())


def may_decode_packed(couplings: Couplings, s: Tensor) -> bool:
    """Return whether a forward with this state (B, T, D) may use packed weights: few rows on a CPU, no gradients."""
    if couplings.training or torch.is_grad_enabled() or not _may_fuse(s):
        return False
    return s.device.type == "cpu" and s.shape[0] * s.shape[1] <= MAX_ROWS


def pack_all(couplings: Couplings) -> dict[int, PackedBoundary]:
    """Return the packed weights of each boundary, empty if they cannot be packed; valid until the weights change."""
    if not are_plain(couplings):
        return {}
    return {l: pack(boundary_of(couplings, l)) for l in couplings.boundaries}


def takes_triton(h: Tensor, s: Tensor, boundary: Boundary) -> bool:
    """Return whether boundary_triton.py takes this boundary: on a GPU, with a G and an R that are not too wide."""
    if not h.is_cuda or not has_triton(h.device):
        return False
    G, R = boundary.sizes()
    return G <= MAX_GATE and R <= MAX_RANK and {h.dtype, s.dtype} <= FLOATS


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and supports this GPU: NVIDIA, compute capability 8 (A100) or later."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _triton() -> ModuleType:
    from umbra.method.kernels import boundary_triton  # triton is not installed everywhere

    return boundary_triton


def _may_fuse(x: Tensor) -> bool:
    return in_use() and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
