"""Time one block boundary on a GPU: core.py's modules, the fused PyTorch form and the Triton kernels. ``python -m bench.kernels``

Microseconds, medians of interleaved runs: the forward without gradients, eager and replayed from a CUDA graph, and forward
with backward, for a bf16 stream and an fp32 state. Each form's outputs are compared first.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umbra import ShadowConfig
from umbra.method.core import Couplings
from umbra.method.kernels import boundary_torch, boundary_triton
from umbra.method.kernels.boundary import NO_MASKS, boundary_of


def forms(made: Couplings) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Return three forms of the boundary before block 1."""
    boundary = boundary_of(made, 1)
    return {
        "core": lambda h, s: made.update_and_inject(1, h, s),
        "plain": lambda h, s: boundary_torch.update_and_inject(h, s, boundary, NO_MASKS),
        "triton": lambda h, s: boundary_triton.update_and_inject(h, s, boundary, NO_MASKS),
    }


def medians(runs: dict[str, Callable[[], Any]], repeats: int = 30) -> dict[str, float]:
    """Microseconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 5):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if number >= 5:
                times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of what ``run`` launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def step(run: Callable[[Tensor, Tensor], Any], h: Tensor, s: Tensor) -> None:
    """Forward and backward."""
    out, state = run(h, s)
    (out.float().sum() + state.sum()).backward()


def main() -> None:
    """Prints a table."""
    print(torch.cuda.get_device_name(), torch.__version__)
    config = ShadowConfig(rank=16, gate_rank=10, first_layer=0).resolve()
    for D in (1024, 2560, 4096):
        made: Any = Couplings(2, D, config).cuda().eval()
        torch.nn.init.normal_(made.injections["1"].up.weight, std=0.02)
        for N in (1, 8, 64, 512, 4096):
            h = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            s = torch.randn(N, D, device="cuda", requires_grad=True)
            with torch.no_grad():
                runs = {name: partial(f, h, s) for name, f in forms(made).items()}
                expected = runs["core"]()
                for name, run in runs.items():
                    for found, value in zip(run(), expected, strict=True):
                        torch.testing.assert_close(
                            found,
                            value,
                            rtol=0,
                            atol=1e-2 * float(value.abs().max()),
                            msg=lambda m, n=name: f"{n}: {m}",
                        )
                rows = {"eager": medians(runs), "graph": medians({name: graph(run) for name, run in runs.items()})}
            rows["step"] = medians({name: partial(step, f, h, s) for name, f in forms(made).items()})
            for kind, row in rows.items():
                print(f"D {D:5} N {N:5} {kind:6}", *(f"{name} {us:8.1f}" for name, us in row.items()), flush=True)


if __name__ == "__main__":
    main()
