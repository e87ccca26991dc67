"""Time one block boundary on a GPU: core.py's modules, the fused PyTorch form and the Triton kernels: ``python -m bench.kernels``.

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
from umbra.method import kernels
from umbra.method.core import Couplings
from umbra.method.kernels import couple_triton
from umbra.method.kernels.couple import NO_MASKS, _Couple, forward, weights_of


def forms(made: Couplings) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Return the three forms of the boundary before block 1."""
    seam = made._seam("0", "1")

    def core(h: Tensor, s: Tensor) -> Any:
        with kernels.reference():
            return made.couple(1, h, s)

    def plain(h: Tensor, s: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _Couple.apply(h, s, seam, NO_MASKS, *weights_of(seam))  # type: ignore[misc]
        return forward(h, s, seam, NO_MASKS)[:2]

    return {"core": core, "plain": plain, "triton": lambda h, s: couple_triton.couple(h, s, seam, NO_MASKS)}


def medians(runs: dict[str, Callable[[], Any]], repeats: int = 30) -> dict[str, float]:
    """Return the median microseconds of each run, interleaved."""
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
    """Capture the kernels that ``run`` launches, and return their replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def step(run: Callable[[Tensor, Tensor], Any], h: Tensor, s: Tensor) -> None:
    """Run forward and backward."""
    out, state = run(h, s)
    (out.float().sum() + state.sum()).backward()


def main() -> None:
    """Print the table."""
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
                    for actual, value in zip(run(), expected, strict=True):
                        torch.testing.assert_close(
                            actual,
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
