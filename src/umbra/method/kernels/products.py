"""Products with the base's frozen matrices on a CPU: y = x · Wᵀ + b.

PyTorch multiplies in float32 by MKL. On an AMD EPYC, MKL takes up to twice as long as oneDNN, which PyTorch includes as well,
most of all for the few rows of decoding; on Intel CPUs it is the other way round (docs/explanation/log.md). `patch_linears` sends
the products of linear layers to oneDNN where it is faster.
"""

import platform
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umbra.base import private_torch
from umbra.method.kernels.first_order import Context
from umbra.method.kernels.switch import in_use

SMALLEST = 2**16  # entries of a matrix for which the call pays


def _is_intel() -> bool:
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        description = platform.processor()
    return "GenuineIntel" in description


def _onednn_is_faster() -> bool:
    """Decide by the CPU's vendor, so that a machine rounds alike in every run; builds without MKL were not measured."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and private_torch.has_onednn_linear() and not _is_intel()


ONEDNN_IS_FASTER = _onednn_is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, K), (N, K), (N,) → (…, N), as `F.linear`."""
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() and x.requires_grad else _onednn(x, weight, bias)


def patch_linears(modules: Iterable[nn.Module]) -> None:
    """Let large float32 linear layers compute by `product`, until `unpatch_linears`.

    Args:
        modules: modules of any kind; all but large float32 `nn.Linear` layers are left alone.
    """
    for module in modules if ONEDNN_IS_FASTER else ():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if module.weight.dtype == torch.float32 and module.weight.numel() >= SMALLEST:
            vars(module)["forward"] = PatchedForward(module)


def unpatch_linears(modules: Iterable[nn.Module]) -> None:
    """Undo `patch_linears`."""
    for module in modules:
        if isinstance(vars(module).get("forward"), PatchedForward):
            del vars(module)["forward"]


class PatchedForward:
    """The ``forward`` of a patched linear layer.

    Args:
        module: the layer, whose weights are read anew in every call.
    """

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        return product(input, self.module.weight, self.module.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return product(gradients[0], ctx.saved_tensors[0].T), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return private_torch.onednn_linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether these are plain float32 tensors on a CPU, nothing traces them, and at most x requires a gradient."""
    if not ONEDNN_IS_FASTER or not in_use() or x.device.type != "cpu" or weight.numel() < SMALLEST or not x.numel():
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if private_torch.is_transformed():
        return False
    return not torch.is_autocast_enabled("cpu")
