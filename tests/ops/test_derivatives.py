"""Derivatives beyond the first: on the kernels what they are on the reference, for every op and
every input; and autocast that is on around backward alone, or around forward alone."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

import fusedmlp
from fusedmlp.testing import CASES, floating

SIZE = (3, 8, 5)
# The first and the last of each op's cases: without and with biases, mixings, recompute.
OPS = {case.op: case for case in CASES.values()}
DIFFERENTIABLE = {
    case.name: case
    for case in CASES.values()
    if not case.forward_only
    and (case is OPS[case.op] or "recompute" in case.name or case.name == case.op)
}
each_case = pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
close = {"rtol": 2e-3, "atol": 2e-3}


def drawn(case, device):
    """Inputs of `case`, and which of them have derivatives; scales too are in float32."""
    inputs = case.inputs(*SIZE, torch.float32, device)
    names = list(floating(inputs))
    return {k: t.float() if k in names else t for k, t in inputs.items()}, names


def both(run):
    """What `run` gives on the reference and on the kernels."""
    results = []
    for backend in ("reference", "triton"):
        with fusedmlp.backend(backend):
            results.append(run())
    return results


def function(case, inputs, names):
    """case.run of the tensors called `names`, the others fixed."""
    return lambda *tensors: case.run({**inputs, **dict(zip(names, tensors, strict=True))})


@each_case
def test_gradient_penalty(case, device):
    """dy requires no gradient, as where a loss is a sum; the saved inputs alone do."""
    inputs, names = drawn(case, device)

    def penalised():
        leaves = [inputs[k].clone().requires_grad_() for k in names]
        out = function(case, inputs, names)(*leaves).sum()
        first = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True)
        loss = out + sum(d.square().sum() for d in first if d is not None)
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for name, expected, got in zip(names, *both(penalised), strict=True):
        torch.testing.assert_close(got, expected, **close, msg=name)


@each_case
def test_tangents_of_each_input(case, device):
    """torch.func.jvp and make_dual, of inputs that require no gradient."""
    inputs, names = drawn(case, device)
    for name in names:
        one = function(case, inputs, [name])
        t = torch.ones_like(inputs[name])

        def tangents(one=one, x=inputs[name], t=t):
            by_func = jvp(one, (x,), (t,))[1]
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(one(forward_ad.make_dual(x, t))).tangent
            return by_func, dual

        (expected, _), got = both(tangents)
        for tangent in got:
            torch.testing.assert_close(tangent, expected, **close, msg=name)


@each_case
def test_torch_func(case, device):
    inputs, names = drawn(case, device)
    run = function(case, inputs, names)
    tensors = [inputs[k] for k in names]
    places = tuple(range(len(names)))
    dy = torch.ones_like(run(*tensors))
    mean = lambda *ts: run(*ts).square().mean()  # noqa: E731
    first = function(case, inputs, names[:1])
    for way in (
        lambda: grad(mean, places)(*tensors),
        lambda: vjp(run, *tensors)[1](dy),
        lambda: hessian(lambda x: first(x).square().sum())(tensors[0]),
    ):
        for expected, got in zip(*both(way), strict=True):
            torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("name", ("gated_mlp", "moe_mlp", "top1_route"))
def test_many_gradients_at_once(name, device):
    """vmap over backward alone: forward was the kernels'."""
    inputs, names = drawn(CASES[name], device)
    run = function(CASES[name], inputs, names[:1])
    x = inputs[names[0]].requires_grad_()
    dy = torch.randn(4, *run(x).shape, device=device)

    def batched():
        out = run(x)
        return vmap(lambda d: torch.autograd.grad(out, x, d, retain_graph=True)[0])(dy)

    expected, got = both(batched)
    torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("name", ("gated_mlp-bias", "moe_mlp"))
def test_compiled(name, device, on_triton):
    """A compiled gradient has the kernels in it, transforms in compiled code the reference; what
    compiled kernels lack raises."""
    torch._dynamo.reset()
    inputs, names = drawn(CASES[name], device)
    run = function(CASES[name], inputs, names[:1])
    x = inputs[names[0]]
    total = lambda x: run(x).square().sum()  # noqa: E731
    for way in (grad(total), hessian(total), lambda x: jvp(run, (x,), (x,))[1]):
        compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), way(x), **close)
    compiled, leaf = torch.compile(run, backend="aot_eager", fullgraph=True), x.requires_grad_()
    (dx,) = torch.autograd.grad(compiled(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


def test_compiled_gradients_come_from_the_kernels(device, on_triton):
    torch._dynamo.reset()
    inputs, names = drawn(CASES["gated_mlp"], device)
    graphs = []
    keep = lambda graph, _: graphs.append(graph.code) or graph.forward  # noqa: E731
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    run = torch.compile(function(CASES["gated_mlp"], inputs, names), backend=backend)
    run(*(inputs[k].requires_grad_() for k in names)).sum().backward()
    forward, backward = graphs
    assert "fusedmlp.gated_linear_fwd" in forward and "fusedmlp.gated_linear_bwd" in backward


@pytest.mark.parametrize("name", ("binary_gated_linear", "binary_gated_mlp"))
def test_frozen_scales_say_what_a_second_derivative_needs(name, device, on_triton):
    """The one input that is not saved wherever it is not needed for a first derivative."""
    inputs, _ = drawn(CASES[name], device)
    x = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: a second derivative needs x"):
        torch.autograd.grad(CASES[name].run(inputs).sum(), x, create_graph=True)


def test_frozen_scales_of_a_linear_need_nothing(device):
    inputs, _ = drawn(CASES["binary_linear"], device)

    def penalised():
        x = inputs["x"].clone().requires_grad_()
        out = CASES["binary_linear"].run({**inputs, "x": x}).square().sum()
        (dx,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    expected, got = both(penalised)
    torch.testing.assert_close(got, expected, **close)


def test_one_tensor_twice(device):
    """Each argument's gradient is its own, though both are one tensor."""
    g = torch.linspace(-1, 1, 6, device=device).view(2, 3)

    def penalised():
        x = g.clone().requires_grad_()
        (dx,) = torch.autograd.grad(fusedmlp.gated_act(x, x).sum(), x, create_graph=True)
        return dx, torch.autograd.grad(dx.square().sum(), x)[0]

    for expected, got in zip(*both(penalised), strict=True):
        torch.testing.assert_close(got, expected, **close)


@each_case
def test_autocast_around_backward_alone(case, device, on_triton):
    """Bit for bit what backward gives without, and with create_graph=True too."""
    inputs, names = drawn(case, device)
    for graph in (False, True):

        def gradients(around, graph=graph):
            leaves = [inputs[k].clone().requires_grad_() for k in names]
            out = function(case, inputs, names)(*leaves)
            dy = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
            with torch.autocast(device, torch.bfloat16, enabled=around):
                return torch.autograd.grad(out, leaves, dy, create_graph=graph)

        for name, plain, within in zip(names, gradients(False), gradients(True), strict=True):
            torch.testing.assert_close(within, plain, rtol=0, atol=0, msg=name)


@each_case
def test_autocast_around_forward_alone(case, device, on_triton):
    """Bit for bit what backward gives inside of it."""
    inputs, names = drawn(case, device)

    def gradients(around):
        leaves = [inputs[k].clone().requires_grad_() for k in names]
        with torch.autocast(device, torch.bfloat16):
            out = function(case, inputs, names)(*leaves)
            dy = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out)
            with torch.autocast(device, enabled=around, dtype=torch.bfloat16):
                return torch.autograd.grad(out, leaves, dy)

    for name, plain, within in zip(names, gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(within, plain, rtol=0, atol=0, msg=name)
