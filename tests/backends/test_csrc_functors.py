"""The functors of csrc/activations.cuh near 0. An activation without one: Unfit for every CUDA
kernel that has an activation, before anything is enqueued, and Triton's under auto."""

import re

import cuda_fake
import pytest
import simt_build
import simt_extension
import torch
import torch.nn.functional as F
from op_checks import PROBES, assert_precise_near_zero, check
from simt_build import FUNCTORS, NUMBERS, chosen

import fusedmlp
from fusedmlp import reference
from fusedmlp.backends import choice
from fusedmlp.backends.cuda.gated_linear import activation_of
from fusedmlp.backends.cuda.loader import Unfit
from fusedmlp.kernels.activations import DEVICE
from fusedmlp.ops import gated_linear, linear_act
from fusedmlp.reference.activations import ACTIVATIONS, Activation
from fusedmlp.testing import CASES, assert_close_to

bf16 = torch.bfloat16
BOTH = (("gated_linear_fwd", "sm_90a"), ("gated_linear_bwd", "sm_90a"))


@pytest.fixture
def stranger(monkeypatch):
    """The name of an activation that no functor was written for; it computes silu."""
    row = Activation("stranger", F.silu)
    monkeypatch.setitem(ACTIVATIONS, row.name, row)
    monkeypatch.setitem(DEVICE, row.name, DEVICE["silu"])
    return row.name


def refusal(kernel):
    held = re.escape(f"{', '.join(FUNCTORS)} (those with a functor in csrc/activations.cuh)")
    return (
        f"{kernel}: backend 'cuda' needs activation to be one of {held}, got 'stranger'; "
        r"backend\('triton'\) takes it"
    )


def test_the_extension_lists_the_table_of_the_header():
    assert FUNCTORS and set(FUNCTORS) <= ACTIVATIONS.keys()
    for table, gates in ((simt_build.PLAIN, False), (simt_build.GATES, True)):
        assert {ACTIVATIONS[name].up is not None for name in table} == {gates}
    for arch in simt_extension.SOURCES:
        numbers = simt_extension.extension(arch).ACTIVATIONS
        assert numbers == NUMBERS and list(numbers) == FUNCTORS


@pytest.mark.parametrize("activation", simt_build.PLAIN)
def test_functor_and_slope_near_zero(activation):
    value, slope = (simt_build.empty(len(PROBES), dtype=torch.float32) for _ in range(2))
    arguments = (simt_build.guarded(PROBES), value, slope, len(PROBES))
    simt_build.load("tests/simt/functors.cu").functor(*arguments, *chosen(activation))
    assert_precise_near_zero(activation, value.tensor, slope.tensor)


@pytest.mark.parametrize("arch", ("sm_90a", "sm_100a"))
def test_a_launcher_refuses_a_gate_without_up(arch):
    """Python has refused it before; the kernel holds no such code and would write nothing."""
    extension = simt_extension.extension(arch)
    numbers = [*[0] * 8, *[8] * 8, *chosen("swiglu_oai"), 0, 0, 3, -1, 0]
    for kernel in ("linear_act_fwd", "linear_act_bwd"):
        with pytest.raises(RuntimeError, match="the activation is a gate, and there is no up"):
            extension.OPS[kernel, arch](*numbers)


def test_scalars_go_in_the_order_of_the_row(monkeypatch):
    with simt_extension.installed(monkeypatch, "sm_80"):
        for activation, scalars in {
            "silu": (0, 0, 0),
            "swiglu_oai": (7, 1.702, 0),
            "swiglu_oai(alpha=1.5, limit=0.25)": (0.25, 1.5, 0),
        }.items():
            number = NUMBERS[activation.partition("(")[0]]
            assert activation_of("gated_linear_fwd", activation) == (number, scalars)


def test_a_refusal_quotes_the_parameters(stranger, monkeypatch):
    asked = f"{stranger}(slope=0.5)"
    row = Activation(stranger, lambda x, slope: slope * x, parameters={"slope": 1.0})
    monkeypatch.setitem(ACTIVATIONS, stranger, row)
    with (
        simt_extension.installed(monkeypatch, "sm_80"),
        pytest.raises(Unfit, match=re.escape(f"got {asked!r}; backend('triton') takes it")),
    ):
        activation_of("linear_act_fwd", asked)


@pytest.mark.parametrize("arch", ("sm_90a", "sm_100a"))
@pytest.mark.parametrize("name", ("gated_mlp-bias", "mlp"))
def test_a_gate_of_exactly_zero(name, arch, monkeypatch):
    case = CASES[name]
    inputs = case.inputs(3, 16, 24, bf16)
    inputs["x"].zero_()
    if "b_up" in inputs:
        inputs["b_gate"].zero_(), inputs["b_up"].fill_(1)
    with simt_extension.installed(monkeypatch, arch), fusedmlp.backend("cuda"):
        check(case, inputs, activation="relu")


GEMMS = {"gated_linear": "gated_linear_fwd", "gated_mlp": "gated_linear_fwd",
         "linear_act": "linear_act_fwd", "mlp": "linear_act_fwd"}  # fmt: skip


@pytest.mark.parametrize("name, kernel", GEMMS.items(), ids=GEMMS)
def test_the_gemms_refuse_it(name, kernel, stranger, monkeypatch):
    case = CASES[name]
    with (
        simt_extension.installed(monkeypatch, "sm_90a"),
        fusedmlp.backend("cuda"),
        pytest.raises(Unfit, match=refusal(kernel)),
    ):
        case.run(case.inputs(3, 16, 24, bf16), activation=stranger)


PORTABLE = {"masked_gated_linear-1-bits": "masked_gated_linear_fwd",
            "binary_gated_linear": "binary_gated_linear_fwd"}  # fmt: skip


@pytest.mark.parametrize("name, kernel", PORTABLE.items(), ids=PORTABLE)
def test_the_kernels_for_few_rows_refuse_it(name, kernel, stranger, monkeypatch):
    case = CASES[name]
    inputs = {k: t.detach() for k, t in case.inputs(3, 128, 128, bf16).items()}
    with (
        simt_extension.installed(monkeypatch, "sm_80"),
        fusedmlp.backend("cuda"),
        pytest.raises(Unfit, match=refusal(kernel)),
    ):
        case.run(inputs, activation=stranger)


@pytest.mark.interpreter
def test_a_backward_copies_no_gradient_before_it_refuses(stranger, monkeypatch):
    """TMA cannot read an expanded dy, and what makes a copy is a launch as well."""
    dy, w = torch.ones((), dtype=bf16).expand(3, 16), torch.ones(16, 24, dtype=bf16)
    copies, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **k: copies.append(t) or clone(t, **k))
    with cuda_fake.installed() as calls, fusedmlp.backend("cuda"):
        linear_act.bwd(dy, w, torch.ones(3, 24, dtype=bf16), "silu", False, False)
        assert len(copies) == len(calls) == 1
        with pytest.raises(Unfit, match="linear_act_bwd: .* needs activation to be one of .*"):
            linear_act.bwd(dy, w, torch.ones(3, 24, dtype=bf16), stranger, False, False)
        assert len(copies) == len(calls) == 1


@pytest.mark.interpreter
def test_auto_goes_to_triton(stranger):
    """Forward and backward, as autograd reaches them, on CPU tensors under the fake."""
    x, w = torch.randn(40, 16, dtype=bf16), torch.randn(24, 16, dtype=bf16)
    with cuda_fake.installed(proven=BOTH) as calls:
        h, gu = gated_linear.fwd(x, w, w, None, None, stranger, True, True)
        gated_linear.bwd(x, w.t().contiguous(), gu, stranger, None, False, False)
        for kernel, _ in BOTH:
            assert choice.SERVED[kernel].startswith(f"triton, not cuda: {kernel}: backend 'cuda'")
        assert "got 'stranger'; backend('triton') takes it" in fusedmlp.explain()
        assert not calls
        gated_linear.fwd(x, w, w, None, None, "silu", True, True)
        assert [kernel for kernel, _ in calls] == ["gated_linear_fwd"]
    exact = reference.gated_linear(x.double(), w.double(), w.double(), activation="silu")
    assert_close_to(h, exact, reference.gated_linear(x, w, w, activation="silu"))
