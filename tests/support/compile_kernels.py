"""Compiles every Triton kernel that a block boundary launches, for GPUs that need not be there; a script, run by test_kernels.py.

The interpreter is lax about types, and knows no limits. ``python compile_kernels.py 90`` prints a line per kernel: its
name, and the bytes of shared memory that it takes on a GPU of compute capability 9.0.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from umbra.method.kernels import boundary_triton
from umbra.method.kernels.boundary import Boundary, Masks

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def compile_for(capability: int):
    """What stands in for a launch."""

    def run(kernel, *args, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        stages = {key: given.pop(key) for key in ("num_warps", "num_stages")}
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        signature = {name: kind(given[name]) if name not in constants else "constexpr" for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=stages)
        print(kernel.fn.__name__, made.metadata.shared)

    return run


def kind(value) -> str:
    """Triton's word for the type of an argument."""
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32" if isinstance(value, int) else "fp32"


def boundary(D: int, G: int, R: int, dtype: torch.dtype, bias: bool) -> Boundary:
    """A boundary of one dialect, whose weights require gradients."""

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, requires_grad=True)

    def half():
        return weight(G, D), weight(G) if bias else None, weight(D, G), weight(D) if bias else None

    norm = None if bias else (weight(D), weight(D), 1e-5)
    return Boundary(norm, half(), half(), "gelu" if bias else "silu", weight(R, D), weight(D, R), 0.7)


if __name__ == "__main__":
    JITFunction.run = compile_for(int(sys.argv[1]))  # type: ignore[method-assign]
    N, D = 2, 576
    h = torch.randn(N, D, dtype=torch.bfloat16)
    for G, R, dtype, bias in ((10, 16, torch.bfloat16, False), (32, 64, torch.float32, True)):
        s, weights = torch.randn(N, D, dtype=dtype), boundary(D, G, R, dtype, bias)
        transform, rank, delta = (torch.ones(N, size, dtype=dtype) for size in (G, R, D))
        masks = Masks(delta=delta) if bias else Masks(transform, rank)
        out, state = boundary_triton.update_and_inject(h, s, weights, masks)
        (out.sum() + state.sum()).backward()
        if not bias:
            with torch.no_grad():
                boundary_triton.update_and_inject(h, s, weights, masks)
