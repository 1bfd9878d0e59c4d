"""The tolerance rule itself: it must pass honest rounding and fail every kind of broken kernel."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from fusedmlp.kernels.activations import DEVICE
from fusedmlp.kernels.dense import gated_linear as kernels
from fusedmlp.ops import gated_linear as op
from fusedmlp.testing import CASES, Error, assert_close_to, compare, error_of

# Kernels are broken by patching what the interpreter runs.
pytestmark = pytest.mark.interpreter
SHAPE = 37, 67, 91  # element loads: every tile is launched on its own


def verdicts(case, dtype=torch.bfloat16):
    results = compare(case, case.inputs(*SHAPE, dtype))
    return {name: error_of(*numbers).passed for name, numbers in results.items()}


def test_honest_kernels_pass(on_triton):
    for name in ("gated_mlp", "mlp-bias", "gated_act"):
        assert all(verdicts(CASES[name]).values())


@triton.jit
def _silu_wrong_slope(x):
    s = tl.sigmoid(x)
    return x * s, s


@triton.jit
def _silu_wrong_value(x):
    s = tl.sigmoid(1.01 * x)
    return x * s, s + x * s * (1 - s)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("gated_act", "gated_linear", "gated_mlp"))
def test_a_wrong_slope_fails_in_the_gradients(name, dtype, on_triton, monkeypatch):
    monkeypatch.setitem(DEVICE, "silu", _silu_wrong_slope)
    passed = verdicts(CASES[name], dtype)
    assert passed["out"] and not all(passed.values())


@pytest.mark.parametrize("name", ("gated_act", "gated_linear", "gated_mlp"))
def test_a_value_one_percent_off_fails(name, on_triton, monkeypatch):
    monkeypatch.setitem(DEVICE, "silu", _silu_wrong_value)
    assert not verdicts(CASES[name], torch.float32)["out"]


@triton.jit
def _last_tile_lost(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    kept = min(index, tiles_m * tiles_n - 2)
    return kept % tiles_m, kept // tiles_m


@pytest.mark.parametrize("name", ("gated_linear", "gated_mlp", "mlp"))
def test_a_dropped_last_tile_fails(name, on_triton, monkeypatch):
    monkeypatch.setattr(kernels, "tile_at", _last_tile_lost)
    assert not verdicts(CASES[name])["out"]


def test_swapped_halves_fail(on_triton):
    case = CASES["gated_mlp-gate_up-bias"]
    inputs = case.inputs(*SHAPE, torch.bfloat16)
    swapped = case.run(inputs, packed="up_gate")
    exact = case.run_reference({k: t.double() for k, t in inputs.items()})
    assert not error_of(swapped, exact, case.run_reference(inputs)).passed


def _tail(tensors):
    for t in tensors:
        if t.numel():
            t[..., -8:, -8:] = 0
    return tensors


def _swap(tensors):
    pair = next(t for t in tensors if t.dim() == 3)
    pair.copy_(pair.flip(0))
    return tensors


def _one_element(tensors):
    next(t for t in tensors if t.numel()).view(-1)[17] += 0.5
    return tensors


def _all_four_ulps_up(tensors):
    for t in tensors:
        t.mul_(1 + 2**-5)
    return tensors


@pytest.mark.parametrize("change", (_tail, _swap, _one_element, _all_four_ulps_up))
@pytest.mark.parametrize("stage", ("fwd", "bwd"))
def test_a_damaged_result_fails(stage, change, on_triton, monkeypatch):
    honest = getattr(op, stage)
    monkeypatch.setattr(op, stage, lambda *args: change(honest(*args)))
    assert not all(verdicts(CASES["gated_mlp"]).values())


def judged(out, exact, eager=None) -> Error:
    return error_of(out, exact.double(), exact.to(out.dtype) if eager is None else eager)


def test_nan_and_inf_never_pass():
    exact = torch.linspace(-1, 1, 200)
    for bad in (float("nan"), float("inf")):
        out = exact.clone()
        out[3] = bad
        assert not judged(out, exact).passed
        assert judged(out, out).passed  # where the exact result has them too, they are right
    wrong_sign = torch.full((100,), float("inf"))
    wrong_sign[0] = -float("inf")
    assert not judged(-wrong_sign, wrong_sign).passed


def test_rms_catches_what_the_maximum_hides():
    """Eager is far off in one element; that must not excuse a small error in all of them."""
    exact = torch.linspace(-1, 1, 1000)
    eager = exact.clone()
    eager[0] += 0.1
    out = exact + 0.05
    verdict = judged(out, exact, eager)
    assert verdict.max <= verdict.max_bound and verdict.rms > verdict.rms_bound


def test_tiny_tensors_get_more_ulps_and_large_ones_do_not():
    eps = torch.finfo(torch.bfloat16).eps
    for size, passes in ((63, True), (64, False)):
        exact = torch.ones(size)
        assert judged((exact * (1 + 2 * eps)).bfloat16(), exact).passed is passes


def test_the_message_names_the_worst_coordinate():
    exact = torch.ones(20, 30)
    out = exact.clone()
    out[11, 7] = 2
    with pytest.raises(
        AssertionError, match=r"dx: max error 1\.000e\+00 .*worst at \(11, 7\): 2\.0.*exact 1\.0"
    ):
        assert_close_to(out, exact.double(), exact, name="dx")


def test_shape_and_dtype_must_match():
    exact = torch.ones(4, 4)
    with pytest.raises(AssertionError, match=r"shape \(4, 1\), expected \(4, 4\)"):
        assert_close_to(torch.ones(4, 1), exact.double(), exact)
    with pytest.raises(AssertionError, match="dtype torch.float16, expected torch.float32"):
        assert_close_to(exact.half(), exact.double(), exact)


def test_poison_reaches_every_way_of_allocating(on_triton):
    x = torch.ones(3)
    for t in (
        torch.empty(4),
        torch.empty_like(x),
        x.new_empty(2),
        x.new_empty((2,), dtype=torch.float16),
    ):
        assert t.isnan().all()
    assert torch.empty(3, dtype=torch.int32).dtype == torch.int32


def test_kinked_inputs_stay_off_the_kink():
    """Pre-activations of relu cases are multiples of a step far above rounding, and never 0."""
    for D in (40, 67):
        inputs = CASES["gated_linear"].inputs(64, D, 96, torch.float64, activation="relu")
        g = inputs["x"] @ inputs["w_gate"].t()
        assert g.abs().min() > 2**-4
        rounded = inputs["x"].bfloat16().float() @ inputs["w_gate"].bfloat16().float().t()
        assert torch.equal(rounded.double(), g)
        biased = CASES["gated_linear-bias"].inputs(64, D, 96, torch.float64, activation="relu")
        g = biased["x"] @ biased["w_gate"].t() + biased["b_gate"]
        assert biased["b_gate"].any() and g.abs().min() > 2**-4


def test_the_router_has_as_many_experts_as_models_have():
    experts = [CASES["top1_route"].shapes(5, 12, H)["logits"][1] for H in (8, 128, 4096)]
    assert experts == [8, 128, 128]


def test_cases_are_what_their_names_say():
    """A bias where the name has one; and routers with normalised shares and without."""
    for name, case in CASES.items():
        biases = [k for k in case.shapes(4, 16, 24) if k.startswith("b_") or k == "b"]
        assert bool(biases) == ("bias" in name or name == "moe_linear"), name
    norms = {case.options.get("norm", True) for case in CASES.values() if case.op == "topk_route"}
    assert norms == {True, False}


def test_poison_ends_before_dynamo_is_imported():
    """Or PyTorch would take the poisoned functions for its own, for good."""
    code = """
import sys, torch
from fusedmlp.testing import poison
own = torch.empty, torch.empty_like, torch.Tensor.new_empty
with poison():
    assert torch.empty(3).isnan().all()
    assert "torch._dynamo" not in sys.modules
    import torch._dynamo
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == own
assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == own
with poison():
    assert torch.empty(3).isnan().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
