"""The tolerance rule itself: it must pass honest rounding and fail every kind of broken kernel."""

import importlib
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedmlp.kernels.activations import DEVICE
from fusedmlp.kernels.dense import gated_linear as kernels
from fusedmlp.ops import gated_linear as op
from fusedmlp.testing import CASES, Error, assert_close_to, compare, error_of, poison
from fusedmlp.testing.memory import kept_bytes

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


def test_poison_calls_for_every_tensor_that_has_memory():
    """Fake and meta tensors have none. PyTorch's own functions are back afterwards, whatever
    happened."""
    importlib.import_module("torch._dynamo")  # which fake tensors import
    own, finders = (torch.empty, torch.empty_like, torch.Tensor.new_empty), [*sys.meta_path]
    made = []
    with pytest.raises(KeyError), poison(made.append):
        t = torch.empty(3, requires_grad=True)
        whole = torch.empty_like(t, dtype=torch.int32)
        torch.empty(3, device="meta")
        with FakeTensorMode():
            torch.empty(3)
        assert len(made) == 2 and made[0] is t and made[1] is whole and t.isnan().all()
        sys.meta_path[0].find_spec("torch.nn", None)
        assert torch.empty is not own[0]
        sys.meta_path[0].find_spec("torch._dynamo", None)  # as Python asks before it is imported
        assert torch.empty is own[0]
        raise KeyError
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == own
    assert sys.meta_path == finders


def test_bytes_that_are_kept_for_backward():
    """Each storage once, and none that the arguments have already."""
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, 10)
    assert kept_bytes(lambda: (x.view(1, 10) * w.mT).sum(), (x, w)) == 0
    assert kept_bytes(lambda: (x.view(1, 10) * w.mT).sum(), (x,)) == 400
    assert kept_bytes(lambda: x.exp() * x, (x,)) == 40
    assert kept_bytes(lambda: x.exp()[:5] * x.detach()[:5], (x,)) == 40
    with pytest.raises(AssertionError, match="kept_bytes: the call must be differentiable, got no"):
        kept_bytes(lambda: w * w, (w,))


@pytest.mark.parametrize("size, errors, ulps", ((63, 4, 4), (64, 2, 1)))
def test_the_numbers_of_an_error(size, errors, ulps):
    exact = (torch.arange(size) % 5 - 1).double()
    out, eager = exact.bfloat16(), exact.bfloat16()
    out[5] += 0.25
    out[6] = -torch.inf
    exact[6] = -torch.inf  # not a part of what is measured, nor is eager's overflow
    eager[6], eager[8] = 1, torch.inf
    eager[7] += 0.5
    eps, rms = 2**-7, (exact.nan_to_num(neginf=0)).square().mean() ** 0.5
    near = lambda x: pytest.approx(float(x), rel=1e-5)  # noqa: E731
    for rounding in (None, (1e-9, 1e-9), (0.75, 0.125)):
        e = error_of(out, exact, eager, rounding and (lambda given=rounding: given))
        mine = rounding if rounding and not e.max <= errors * 0.5 + 4 * ulps * eps else (0, 0)
        assert e.worst == (5,)
        assert [e.max, e.rms, e.relative_l2] == [
            near(0.25), near(0.25 / size**0.5), near(0.25 / size**0.5 / rms)
        ]  # fmt: skip
        assert [e.eager_max, e.eager_rms] == [near(0.5), near(0.5 / size**0.5)]
        assert [e.rounding_max, e.rounding_rms] == [*mine]
        assert e.max_bound == near(errors * 0.5 + ulps * eps * 3)
        assert e.rms_bound == near(errors * 0.5 / size**0.5 + ulps * eps * rms)
    assert error_of(out[:0], exact[:0], eager[:0]) == Error(*[0] * 9, ())
    zero = exact[8:9] * 0
    assert error_of(zero + 1, zero, zero).relative_l2 == pytest.approx(1e300)


def test_both_bounds_hold_or_the_rule_does_not():
    """Both include what is equal."""
    for max_bound, rms_bound, passed in ((2, 1, True), (1.9, 1, False), (2, 0.9, False)):
        assert Error(2, 1, 0, 0, 0, 0, 0, max_bound, rms_bound, ()).passed is passed


def test_a_bound_is_of_what_fits_the_dtype():
    """Where the result overflows it, so do the errors that are allowed."""
    exact = torch.full((200,), 2.0**20, dtype=torch.float64)
    limits = torch.finfo(torch.float16)
    infinite = torch.full((200,), torch.inf, dtype=torch.float16)
    e = error_of(infinite, exact, infinite)
    assert not e.passed and e.max_bound == e.rms_bound == limits.eps * limits.max
    exact = torch.full((200,), 3.0, dtype=torch.float64, requires_grad=True)
    assert error_of(torch.full((200,), 3.0), exact, torch.full((200,), 3.0)).passed


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
