"""Products with the base's frozen matrices on a CPU: y = x · Wᵀ + b.

PyTorch has MKL multiply in float32. On an AMD EPYC that takes up to twice as long as the oneDNN that PyTorch carries as well,
most of all for the few rows of decoding; on Intel's own CPUs it is the other way round (docs/LOG.md). `quicken` sends a linear
layer's products to oneDNN where that is faster.
"""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from umbra.method.kernels.switch import in_use

SMALLEST = 2**16  # entries of a matrix that are worth the call


def _is_intel() -> bool:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = platform.processor()
    return "GenuineIntel" in told


def _onednn_is_faster() -> bool:
    """By the CPU's maker, so that a machine rounds alike from run to run; where there is no MKL nothing was measured."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _is_intel()


ONEDNN_IS_FASTER = _onednn_is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`: (…, K), (N, K), (N,) → (…, N)."""
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() and x.requires_grad else _onednn(x, weight, bias)  # type: ignore[return-value]


def quicken(modules: Iterable[nn.Module]) -> None:
    """Have those that are large linear layers in float32 compute by `product`, until `leave_alone`."""
    for module in modules if ONEDNN_IS_FASTER else ():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if module.weight.dtype == torch.float32 and module.weight.numel() >= SMALLEST:
            vars(module)["forward"] = Quick(module)


def leave_alone(modules: Iterable[nn.Module]) -> None:
    """Take back what `quicken` did."""
    for module in modules:
        if isinstance(vars(module).get("forward"), Quick):
            del vars(module)["forward"]


class Quick:
    """In place of a linear layer's ``forward``."""

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        return product(input, self.module.weight, self.module.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override]
        return product(d_y, ctx.saved_tensors[0].T), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain float32 tensors on a CPU, with nobody to trace them, and only x may want a gradient."""
    if not ONEDNN_IS_FASTER or not in_use() or x.device.type != "cpu" or weight.numel() < SMALLEST or not x.numel():
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return not torch.is_autocast_enabled("cpu")
