"""Block boundaries, fused: the PyTorch form and the Triton kernels against core.py, in every output and gradient.

Without a GPU Triton's interpreter runs the kernels, in numpy (conftest.py asks for it); with one they run as they are.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from support.tiny import scramble
from umbra import ShadowConfig
from umbra.method import kernels
from umbra.method.core import Couplings
from umbra.method.kernels import dispatch
from umbra.method.kernels.boundary import NO_MASKS, Masks, boundary_of, draw_masks
from umbra.method.kernels.boundary_torch import update_and_inject as torch_form
from umbra.method.kernels.boundary_triton import update_and_inject as triton_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDARIES = {"injection": 0, "both": 1, "update": 2}  # of the coupled blocks 0, 1 and 3
SHAPES = [(1, 32, 10, 8), (3, 100, 1, 16), (17, 576, 16, 3), (5, 40, 10, 64), (0, 32, 10, 8)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-D{0[1]}-G{0[2]}-R{0[3]}".format)
dialects = pytest.mark.parametrize("dialect", ["paper", "peft"])
modes = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@pytest.fixture(autouse=True)
def no_luck_with_memory():
    """What `torch.empty` gives out is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def couplings(dialect: str, D: int, G: int, R: int, dropout: float = 0.0, dtype=torch.float32) -> Couplings:
    """Random couplings in training mode."""
    config = ShadowConfig(
        dialect=dialect,
        rank=R,
        gate_rank=G,
        alpha=0.7,
        dropout=dropout,
        constants={"down_init": "normal"},
        layers=(0, 1, 3),
    )
    return scramble(Couplings(4, D, config.resolve()), std=0.1).to(DEVICE, dtype).train()


def tensors(*size: int, dtype=torch.float32, count: int = 4) -> list[Tensor]:
    """h, s and the gradients of h' and s'."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count)]


class Factors(nn.Module):
    """Dropout with what it drops."""

    def __init__(self, factors: Tensor | None):
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x if self.factors is None else x * self.factors


def fix(made: Couplings, l: int, h: Tensor) -> Masks:
    """Draw masks for this boundary, and make core.py use them too."""
    masks = draw_masks(made, l, h)
    if str(l - 1) in made.updates:
        made.updates[str(l - 1)].transform[2] = Factors(masks.transform)
    if str(l) in made.injections:
        made.injections[str(l)].dropout_rank = Factors(masks.rank)
        made.injections[str(l)].dropout_delta = Factors(masks.delta)
    return masks


def core(made: Couplings, l: int):
    """A boundary as core.py computes it."""
    return lambda h, s: made.update_and_inject(l, h, s)


def fused(form, made: Couplings, l: int, masks: Masks = NO_MASKS):
    """A boundary in a form under test."""
    return lambda h, s: form(h, s, boundary_of(made, l), masks)


def results(run, made: Couplings, h: Tensor, s: Tensor, d_out: Tensor | None, d_state: Tensor | None):
    """h', s' and every gradient."""
    h, s = h.detach().requires_grad_(), s.detach().requires_grad_()
    given = [(x, d) for x, d in zip(run(h, s), (d_out, d_state), strict=True) if d is not None]
    names, leaves = zip(*[("h", h), ("s", s), *made.named_parameters()], strict=True)
    found = torch.autograd.grad([x for x, _ in given], leaves, [d for _, d in given], allow_unused=True)
    outputs = {f"output {i}": x.detach() for i, (x, _) in enumerate(given)}
    return outputs | {name: d for name, d in zip(names, found, strict=True) if d is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    """Each within ``tolerance`` of the other's norm, or of 0.1 where larger terms cancel; an unused weight's may be 0 or None."""
    assert found.keys() <= expected.keys()
    for name, value in expected.items():
        if name not in found:
            assert not value.any(), f"{name} is missing"
            continue
        assert found[name].shape == value.shape
        error, norm = float((found[name].to(value.dtype) - value).norm()), float(value.norm())
        assert error <= tolerance * max(norm, 0.1), f"{name}: {error:.1e} of {norm:.1e}"


def check(form, made: Couplings, l: int, given: list[Tensor | None], tolerance: float):
    """A form against core.py: with gradients, and the outputs again without."""
    h, s = given[:2]
    masks = fix(made, l, h)
    expected = results(core(made, l), made, *given)
    assert_close(results(fused(form, made, l, masks), made, *given), expected, tolerance)
    with torch.no_grad():
        out, state = fused(form, made, l, masks)(h, s)
    assert out.dtype == h.dtype and state.dtype == s.dtype
    assert_close({"output 0": out, "output 1": state}, {k: v for k, v in expected.items() if "output" in k}, tolerance)


# -- the plain form ------------------------------------------------------------------------------------------------


@shapes
@dialects
@modes
@boundaries
def test_plain_form_equals_core(shape, dialect, dropout, boundary):
    N, D, G, R = shape
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        made = couplings(dialect, D, G, R, dropout, dtype)
        check(torch_form, made, BOUNDARIES[boundary], tensors(N, D, dtype=dtype), tolerance)


@dialects
@boundaries
def test_plain_form_passes_gradcheck(dialect, boundary):
    made = couplings(dialect, 12, 3, 2, 0.3, torch.float64)
    h, s = (x.requires_grad_() for x in tensors(5, 12, dtype=torch.float64, count=2))
    weights = boundary_of(made, BOUNDARIES[boundary])
    masks = draw_masks(made, BOUNDARIES[boundary], h)
    assert torch.autograd.gradcheck(lambda h, s, *_: torch_form(h, s, weights, masks), (h, s, *made.parameters()))


@dialects
def test_equal_seeds_drop_equal_elements(dialect):
    made = couplings(dialect, 100, 10, 8, 0.3).to("cpu")
    h, s, *_ = (x.cpu() for x in tensors(2, 3, 100))
    drawn = []
    for run, seed in (
        (core(made, 1), 0),
        (lambda h, s: kernels.update_and_inject(made, 1, h, s), 0),
        (core(made, 1), 1),
    ):
        torch.manual_seed(seed)
        drawn.append(run(h, s)[0])
    torch.testing.assert_close(drawn[1], drawn[0])
    assert not torch.allclose(drawn[2], drawn[0], atol=1e-3)


# -- Triton --------------------------------------------------------------------------------------------------------


@shapes
@dialects
@modes
def test_kernels_equal_core(shape, dialect, dropout):
    N, D, G, R = shape
    check(triton_form, couplings(dialect, D, G, R, dropout), BOUNDARIES["both"], tensors(N, D), 2e-6)


@dialects
@modes
@pytest.mark.parametrize("boundary", ["injection", "update"])
def test_partial_update_and_inject_equals_core(dialect, dropout, boundary):
    check(
        triton_form,
        couplings(dialect, 100, 10, 8, dropout),
        BOUNDARIES[boundary],
        tensors(3, 100),
        2e-6,
    )


@pytest.mark.parametrize(("dialect", "D"), [("paper", 100), ("peft", 576)])
def test_rows_beyond_one_tile_are_handled(dialect, D):
    """With D = 576 the columns are programs enough, and one of them walks over all rows."""
    check(triton_form, couplings(dialect, D, 10, 8, 0.3), BOUNDARIES["both"], tensors(70, D), 2e-6)


@pytest.mark.parametrize("used", ["output", "state"])
def test_single_used_result_gives_right_gradient(used):
    h, s, d_out, d_state = tensors(3, 100)
    given = [h, s, d_out, None] if used == "output" else [h, s, None, d_state]
    made = couplings("paper", 100, 10, 8)
    for form in (torch_form, triton_form):
        found = results(fused(form, made, BOUNDARIES["both"]), made, *given)
        assert_close(found, results(core(made, BOUNDARIES["both"]), made, *given), 2e-6)


def test_any_strides_are_supported():
    given = [x.permute(2, 1, 0) for x in tensors(100, 3, 2)]
    assert not any(x.is_contiguous() for x in given)
    made = couplings("peft", 100, 10, 8, 0.3)
    made.injections["1"].down.weight.data = made.injections["1"].down.weight.data.T.contiguous().T
    check(triton_form, made, BOUNDARIES["both"], given, 2e-6)


@pytest.mark.parametrize(
    ("stream", "state", "tolerance"),
    [
        (torch.float16, torch.float32, 2e-3),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float16, torch.float16, 4e-3),
        (torch.bfloat16, torch.bfloat16, 3e-2),
    ],
)
@dialects
def test_base_dtypes_are_supported(dialect, stream, state, tolerance):
    """Against fp32 throughout, from the same weights and inputs. The interpreter truncates where a GPU rounds."""
    made = couplings(dialect, 100, 10, 8, 0.3).to(state)
    h, s, d_out, d_state = (x.to(t) for x, t in zip(tensors(17, 100), (stream, state, stream, state), strict=True))
    masks = fix(made, 1, h)
    found = results(fused(triton_form, made, 1, masks), made, h, s, d_out, d_state)
    assert found["output 0"].dtype == found["h"].dtype == stream
    assert found["output 1"].dtype == found["s"].dtype == state
    made, given = made.float(), [x.float() for x in (h, s, d_out, d_state)]
    expected = results(
        fused(torch_form, made, 1, Masks(*(m if m is None else m.float() for m in masks))),
        made,
        *given,
    )
    assert_close(found, expected, tolerance)


def test_large_mean_stream_stays_accurate():
    """A mean of 100 deviations costs two digits of the in-projections, no more."""
    h, *others = tensors(17, 576)
    check(triton_form, couplings("paper", 576, 10, 8), BOUNDARIES["both"], [h + 100, *others], 5e-4)


def test_kernels_compile_for_gpu_and_fit(tmp_path):
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "80"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [line.split() for line in done.stdout.splitlines()]
    training, generation = ["forward", "rows_backward", "columns_backward"], ["forward"] * 3
    assert [name for name, _ in shared] == training + generation + training
    assert all(int(size) <= 99 * 1024 for _, size in shared), (
        shared
    )  # what 8.6 grants a program, least of all from 8 on


def test_kernels_are_chosen_only_when_supported(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda device: True)
    narrow, wide, gate = (boundary_of(couplings("paper", 100, *w), 1) for w in ((32, 64), (10, 65), (33, 8)))
    with FakeTensorMode():
        h, s = torch.empty(3, 100, device="cuda", dtype=torch.bfloat16), torch.empty(3, 100, device="cuda")
        assert dispatch.takes_triton(h, s, narrow)
        assert not dispatch.takes_triton(h, s, wide) and not dispatch.takes_triton(h, s, gate)
        assert not dispatch.takes_triton(h, s.double(), narrow)
        assert not dispatch.takes_triton(h.cpu(), s.cpu(), narrow)
