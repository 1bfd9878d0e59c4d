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
from simt_build import FUNCTORS

import fusedmlp
from fusedmlp import reference
from fusedmlp.backends import choice
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
    for arch in simt_extension.SOURCES:
        numbers = simt_extension.extension(arch).ACTIVATIONS
        assert numbers == {name: i for i, name in enumerate(FUNCTORS)}


@pytest.mark.parametrize("activation", FUNCTORS)
def test_functor_and_slope_near_zero(activation):
    value, slope = (simt_build.empty(len(PROBES), dtype=torch.float32) for _ in range(2))
    arguments = (simt_build.guarded(PROBES), value, slope, len(PROBES), FUNCTORS.index(activation))
    simt_build.load("tests/simt/functors.cu").functor(*arguments)
    assert_precise_near_zero(activation, value.tensor, slope.tensor)


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
