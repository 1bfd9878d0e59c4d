"""fusedmlp.activations: values, slopes, exactness of straight-through values, fusing."""

import math

import pytest
import torch
import torch.nn.functional as F
from layer_checks import DTYPES, assert_compiles, assert_matches, draw, randomise_
from torch import nn

import fusedmlp
from fusedmlp.activations import (
    BSiLU,
    Gelu2,
    NeLU,
    ReluNelu,
    ReluSquared,
    StraightThroughEstimator,
    Sugar,
    SugarReLU,
)
from fusedmlp.layers import FeedForward
from fusedmlp.layers.parts.activation import name_of
from fusedmlp.reference.activations import ACTIVATIONS

CLASSES = (BSiLU, Gelu2, NeLU, ReluNelu, ReluSquared, SugarReLU)
SMOOTH = {BSiLU: "bsilu", Gelu2: "gelu2", ReluSquared: "relu_sq"}


def both(fn, *points):
    """Values and slopes of fn at the points, in float64."""
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    y = fn(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.tolist(), slope.tolist()


def test_relu_squared():
    for module in (ReluSquared(), ReluSquared(signed=True)):
        value, slope = both(module, -2.0, 0.0, 1.5)
        assert value == [0.0, 0.0, 2.25] and slope == [0.0, 0.0, 3.0]
    assert repr(ReluSquared()) == "ReluSquared()"
    assert repr(ReluSquared(signed=True)) == "ReluSquared(signed=True)"


def test_gelu2():
    value, _ = both(Gelu2(), -1.0, 0.0, 1.0)
    assert value == pytest.approx([0.02517, 0.0, 0.70786], abs=1e-5)


def test_bsilu():
    value, slope = both(BSiLU(), 0.0, 1.0, -1.0, -2.0, -60.0)
    assert value == pytest.approx([0.0, 1.116926, -0.65480, -0.874337, -0.835], abs=1e-5)
    assert slope[0] == pytest.approx(0.9175)
    assert both(BSiLU(alpha=0.0), -2.0, 0.3)[0] == pytest.approx(
        F.silu(torch.tensor([-2.0, 0.3], dtype=torch.float64)).tolist()
    )
    assert repr(BSiLU(alpha=0.5)) == "BSiLU(alpha=0.5)"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bsilu_is_zero_at_zero(dtype):
    assert BSiLU()(torch.zeros(3, dtype=dtype)).eq(0).all()


def test_nelu():
    value, slope = both(NeLU(), -2.0, -1.0, 0.0, 1.0, 2.0)
    assert value == pytest.approx([-0.01, -0.025, -0.05, -0.025, -0.01])
    assert slope == pytest.approx([-0.008, -0.025, 0.0, 0.025, 0.008])
    assert both(NeLU(alpha=1.0), 0.0)[0] == [-1.0]


def test_relu_nelu():
    value, slope = both(ReluNelu(), -2.0, -1.0, 0.0, 1.0, 2.0, math.inf)
    assert value == [0.0, 0.0, 0.0, 1.0, 2.0, math.inf]
    # NeLU's slope at inf is not a number in floating point; it must not reach the positive side.
    assert slope == pytest.approx([-0.008, -0.025, 0.0, 1.0, 1.0, 1.0])
    assert repr(ReluNelu()) == "ReluNelu(\n  (forward_fn): ReLU()\n  (backward_fn): NeLU()\n)"
    assert isinstance(ReluNelu(), Sugar)
    assert both(ReluNelu(alpha=1.0), -1.0)[1] == [-0.5]


def test_sugar_relu():
    value, slope = both(SugarReLU(), -2.0, -1.0, 0.0, 1.0, 2.0)
    assert value == [0.0, 0.0, 0.0, 1.0, 2.0]
    assert slope == pytest.approx([0.10499, 0.19661, 0.25, 0.19661, 0.10499], abs=1e-5)


@pytest.mark.parametrize("kind", (StraightThroughEstimator, Sugar))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_values_are_exact(kind, dtype):
    """Adding and subtracting a surrogate of size 1e4 would lose all of the value."""
    estimator = kind(torch.tanh, lambda x: 1e4 * x)
    x = draw(1000, dtype=dtype).requires_grad_()
    assert torch.equal(estimator(x), torch.tanh(x))
    (slope,) = torch.autograd.grad(estimator(x).sum(), x)
    straight = torch.full_like(x, 1e4)
    if kind is Sugar:
        leaf = x.detach().requires_grad_()
        (own,) = torch.autograd.grad(torch.tanh(leaf).sum(), leaf)
        straight = torch.where(x > 0, own, straight)
    torch.testing.assert_close(slope, straight)


@pytest.mark.parametrize("kind", (StraightThroughEstimator, Sugar))
def test_the_surrogate_runs_for_gradients_only(kind):
    calls = []

    def surrogate(x):
        calls.append(1)
        return x

    estimator = kind(torch.round, surrogate)
    x = draw(5)
    assert torch.equal(estimator(x), torch.round(x)) and not calls
    with torch.no_grad():
        estimator(x.requires_grad_())
    assert not calls
    estimator.eval()(x).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("cls", (ReluNelu, SugarReLU))
def test_tangents_are_the_surrogates(cls):
    x = torch.tensor([-1.5, -0.5, 0.5, float("inf")])
    ones = torch.ones_like(x)
    value, tangent = torch.func.jvp(cls(), (x,), (ones,))
    slopes = torch.func.vjp(cls(), x)[1](ones)[0]
    assert torch.equal(value, cls()(x))
    torch.testing.assert_close(tangent, slopes)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(tangent, torch.autograd.grad(cls()(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("cls", (ReluNelu, SugarReLU))
def test_second_derivatives_are_the_surrogates(cls):
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(cls(), (x,))
    per_value = torch.func.vmap(torch.func.grad(cls()))(x.detach())
    torch.testing.assert_close(per_value, torch.tensor(both(cls(), *x.tolist())[1]).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_keeps_shape_and_dtype(cls, dtype):
    x = draw(2, 3, 4, dtype=dtype).requires_grad_()
    y = cls()(x)
    y.sum().backward()
    assert y.shape == x.shape and y.dtype == dtype and x.grad.dtype == dtype
    assert cls()(x[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize("cls", (BSiLU, ReluNelu, SugarReLU))
def test_compiles(cls):
    assert_compiles(cls(), draw(5, 8))


@pytest.mark.parametrize("cls", CLASSES)
def test_layers_fuse_what_the_kernels_know(cls):
    name = SMOOTH.get(cls)
    layer = FeedForward(16, activation=cls)
    assert name_of(cls()) == name
    x = draw(50, 3)
    if name is not None:
        torch.testing.assert_close(ACTIVATIONS[name].reference(x), cls()(x))
    path = f"{cls.__name__} in PyTorch" if name is None else f"{cls.__name__} fused as {name!r}"
    assert path in repr(layer)
    one = "" if name is None else "one mlp, "
    assert f"the layer (FeedForward): {one}{path}" in fusedmlp.explain(layer)


def test_another_alpha_is_not_fused():
    assert name_of(BSiLU(alpha=1.0)) is None
    layer = FeedForward(16, activation=lambda: BSiLU(alpha=1.0))
    assert "BSiLU in PyTorch" in repr(layer)


@pytest.mark.parametrize("cls", CLASSES)
def test_in_a_layer(cls, each_backend, device):
    """Fused or not, the value and the slope are the module's."""
    layer = randomise_(FeedForward(16, mult=2, activation=cls)).to(device)

    def formula(p, x):
        h = cls()(F.linear(x, p["net.0.weight"], p["net.0.bias"]))
        return F.linear(h, p["net.3.weight"], p["net.3.bias"])

    assert_matches(layer, formula, draw(5, 16, device=device))


def test_top_level_names():
    for name in fusedmlp.activations.__all__:
        assert getattr(fusedmlp, name) is getattr(fusedmlp.activations, name)
    for name in ("GELU", "ReLU", "Sigmoid", "SiLU"):
        assert getattr(fusedmlp, name) is getattr(nn, name)
    for name in fusedmlp.layers.__all__:
        assert getattr(fusedmlp, name) is getattr(fusedmlp.layers, name)
