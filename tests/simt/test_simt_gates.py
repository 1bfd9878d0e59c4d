"""The gates of csrc/activations.cuh, phi(g) psi(u), against their rows in float64: values, slopes,
and what a whole epilogue makes of them."""

import pytest
import torch
from op_checks import PROBES, unlike
from simt_build import GATES, chosen, empty, guarded, load

from fusedmlp import reference
from fusedmlp.reference.activations import resolve

SOURCE = "tests/simt/functors.cu"
# Beyond every bound of `unlike` on both sides, the bounds themselves, and far out.
POINTS = torch.cat([
    torch.linspace(-12, 12, 4801), PROBES, torch.tensor([0.75, 1.25, 1.5, 90.0, 1e4]),
    -torch.tensor([0.75, 1.25, 1.5, 90.0, 1e4]),
])  # fmt: skip


def both(name):
    """At the defaults, and with parameters no two of which are alike."""
    return [name, unlike(name)]


SPELLED = [spelled for name in GATES for spelled in both(name)]


def on_host(function, x, activation):
    value, slope = (empty(len(x), dtype=torch.float32) for _ in range(2))
    load(SOURCE).call(function, guarded(x), value, slope, len(x), *chosen(activation))
    return value.tensor.double(), slope.tensor.double()


def exactly(formula, x):
    leaf = x.double().requires_grad_()
    value = formula(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("activation", SPELLED)
def test_phi_and_psi_with_slopes(activation):
    """A parameter that a functor takes for another shows here: no two are alike."""
    gate = resolve(activation)
    for function, formula in (("functor", gate.phi), ("functor_up", gate.psi)):
        for got, exact in zip(
            on_host(function, POINTS, activation), exactly(formula, POINTS), strict=True
        ):
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("activation", SPELLED)
def test_near_zero_relative_to_the_value(activation):
    gate = resolve(activation)
    for function, formula in (("functor", gate.phi), ("functor_up", gate.psi)):
        value, _ = on_host(function, PROBES, activation)
        exact, _ = exactly(formula, PROBES)
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", [a for a in SPELLED if resolve(a).row.kinks])
def test_the_slope_at_a_bound_is_that_of_the_inside(activation):
    row, scalars = resolve(activation)
    bounds = [scalars[list(row.parameters).index(kink)] for kink in row.kinks]
    for x in (torch.tensor([b, -b]) for b in bounds):
        _, slope = on_host("functor_up", x, activation)
        assert slope.tolist() == [1, 1]
        _, slope = on_host("functor", x, activation)
        _, inside = exactly(resolve(activation).phi, x * 0.99999)
        torch.testing.assert_close(slope, inside, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", SPELLED)
def test_the_whole_gate(activation):
    """h of either direction, to the bit, and dg and du with dh = 1."""
    some = torch.linspace(-9.97, 9.96, 113)
    g, u = (t.flatten().contiguous() for t in torch.meshgrid(some, some, indexing="ij"))
    h, again, dg, du = (empty(len(g), dtype=torch.float32) for _ in range(4))
    load(SOURCE).gate(guarded(g), guarded(u), h, again, dg, du, len(g), *chosen(activation))
    leaves = [t.double().requires_grad_() for t in (g, u)]
    exact = reference.gated_act(*leaves, activation)
    grads = torch.autograd.grad(exact.sum(), leaves)
    assert torch.equal(h.tensor, again.tensor)
    for got, value in ((h, exact.detach()), (dg, grads[0]), (du, grads[1])):
        torch.testing.assert_close(got.tensor.double(), value, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("activation", SPELLED)
def test_nan_passes_and_infinity_makes_none_that_pytorch_does_not(activation):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    gate = resolve(activation)
    for function, formula in (("functor", gate.phi), ("functor_up", gate.psi)):
        (value, slope), (exact, exact_slope) = on_host(function, x, activation), exactly(formula, x)
        assert value[0].isnan()
        torch.testing.assert_close(value, exact, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert (exact_slope[slope.isnan()]).isnan().all()
