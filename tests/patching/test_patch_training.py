"""A patched model inside what trainers put around a model."""

import copy

import pytest
import torch
from patch_blocks import MLP, GatedMLP, Model, Packed, Residual
from patch_models import batch, build
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp.testing import assert_close_to


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return Model(GatedMLP(), Packed(), MLP(), Residual()).to(dtype)


def patched():
    model = make()
    assert len(fusedmlp.patch(model).patched) == 4
    return model


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def results(run, model, x=X):
    x = x.clone().requires_grad_()
    y = run(x)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])
    return (y, *grads)


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing(reentrant, each_backend):
    model = patched()
    run = lambda x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    x = X.clone().requires_grad_()
    run(x).square().sum().backward()
    plain = x.grad, *(p.grad for p in model.parameters())
    assert_equal(plain, results(model, model)[1:])


def test_gradient_checkpointing_of_transformers():
    model, inputs = build("llama"), batch("llama")
    fusedmlp.patch(model)
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_equal(*grads)


@pytest.mark.parametrize("index", range(4))
def test_autocast(index, each_backend):
    """The autocast dtype in and out of the products, gradients in the parameters' own."""
    model, plain, exact = (m.blocks[index] for m in (patched(), make(), make(torch.float64)))
    outs = []
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(results(m, m))
    truth = results(exact, exact, X.double())
    for i, (ours, eager, true) in enumerate(zip(*outs, truth, strict=True)):
        assert ours.dtype == eager.dtype
        assert_close_to(ours, true, eager, name=str(i))


def test_grad_scaler():
    weights = []
    for model in (patched(), make()):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale(model(X).square().mean()).backward()
            scaler.step(optimiser)
            scaler.update()
        weights.append(list(model.parameters()))
    assert_equal(*weights)


def test_functional_call():
    """Parameters from outside, and torch.func.grad by the reference."""
    model = patched()
    others = {k: p.detach() * 0.5 for k, p in model.named_parameters()}
    loss = lambda p: functional_call(model, p, (X,)).square().mean()  # noqa: E731
    fusedmlp.unpatch(twin := copy.deepcopy(model))
    plain = lambda p: functional_call(twin, p, (X,)).square().mean()  # noqa: E731
    ours, expected = grad(loss)(others), grad(plain)(others)
    assert_equal(ours.values(), expected.values())


def test_a_frozen_model_and_second_backward(each_backend):
    model = patched()
    for p in model.parameters():
        p.requires_grad_(False)
    model.blocks[0].w2.weight.requires_grad_()
    x = X.clone().requires_grad_()
    y = model(x).square().sum()
    first = torch.autograd.grad(y, [x, model.blocks[0].w2.weight], retain_graph=True)
    assert_equal(first, torch.autograd.grad(y, [x, model.blocks[0].w2.weight]))
