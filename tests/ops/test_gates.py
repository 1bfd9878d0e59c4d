"""Rows with parameters, and with a factor of their own for u: how they are spelled, what they do at
their bounds, and that a number changes no kernel."""

import dataclasses
import inspect
import re

import launched
import op_checks
import pytest
import torch
from compiled import in_compiler
from torch import nn

import fusedmlp
from fusedmlp import reference
from fusedmlp.layers.parts.activation import name_of
from fusedmlp.patching.activation import name_by_values
from fusedmlp.reference.activations import ACTIVATIONS, resolve
from fusedmlp.testing import CASES, assert_close_to, evaluate

WITH_PARAMETERS = [name for name, row in ACTIVATIONS.items() if row.parameters]
GATES = [name for name, row in ACTIVATIONS.items() if row.up is not None]
BENT = [name for name, row in ACTIVATIONS.items() if row.kinks or row.positive]
# A row whose slope jumps only away from the default.
OTHER = {"elu": "elu(alpha=0.5)"}
# Every kernel that takes gates.
GATED = ("gated_act", "gated_mlp-bias", "masked_gated_linear-1", "moe_mlp-bias",
         "binary_gated_mlp")  # fmt: skip
GATE = "swiglu_oai(limit=2.5, alpha=1.5)"


# ---- spelling


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_a_name_alone_has_the_defaults_and_a_call_sets_some(name):
    row = ACTIVATIONS[name]
    assert resolve(name) == (row, tuple(row.parameters.values()))
    for i, parameter in enumerate(row.parameters):
        for text, value in (("2", 2.0), ("0.5", 0.5), (".25", 0.25), ("1e1", 10.0), ("+3.", 3.0)):
            scalars = list(row.parameters.values())
            scalars[i] = value
            assert resolve(f"{name}({parameter}={text})") == (row, tuple(scalars))
            assert resolve(row.spelled(**{parameter: value})) == (row, tuple(scalars))
    every = ", ".join(f"{p}=2" for p in reversed(row.parameters))
    assert resolve(f"{name}({every})").scalars == (2.0,) * len(row.parameters)
    assert row.spelled() == name
    assert resolve(f"{name}({every})") is not resolve(name)


def spoiled(name):
    """Every kind of bad spelling of a row: what is written, and what the error must say."""
    row = ACTIVATIONS[name]
    first = next(iter(row.parameters), "limit")
    broken = ("()", "(", f"({first}", f"({first}=)", f"({first}=1", f"{first}=1)", f"({first}=1))",
              "(7)", f"({first}=1,)", f"({first}=1;)", f"({first}: 1)", f"[{first}=1]",
              f"({first}=one)", f"({first}=nan)", f"({first}=inf)", f"({first}=-inf)",
              f"({first}=1_0)", f"({first}=0x1)", f"({first}=1, {first}=1)", "(nothing=1)",
              f" ({first}=1)", f"({first}=1) ", f"({first}==1)", f"({first}=1 2)")  # fmt: skip
    for text in broken:
        if "(" not in text or text[0] in " [":
            yield name + text, "must be one of silu, "  # no name of a row
        elif not row.parameters:
            yield name + text, f"must be {name!r} alone, which has no parameters"
        else:
            listed = f"some of its parameters {', '.join(row.parameters)}, each once and by name"
            yield name + text, f"must be {name!r}, or that with {listed} with a finite number, as "
    if row.parameters:
        yield f"{name}({first}=1e999)", f"must be {name!r} with a finite number for {first}"
    for parameter in row.kinks:
        if isinstance(parameter, str):
            yield f"{name}({parameter}=-1)", f"must be {name!r} with a {parameter} of 0 or more"
    for parameter in row.positive:
        for value in ("0", "-1"):
            yield f"{name}({parameter}={value})", f"must be {name!r} with a {parameter} above 0"


def test_a_kink_may_lie_at_0():
    for name, row in ACTIVATIONS.items():
        for at in (kink for kink in row.kinks if isinstance(kink, str)):
            if at not in row.positive:
                assert 0 in resolve(f"{name}({at}=0)").scalars


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bad_spellings(name, each_backend):
    g = torch.ones(2, 3)
    for text, said in spoiled(name):
        with pytest.raises(ValueError) as caught:
            fusedmlp.gated_act(g, g, activation=text)
        message = str(caught.value)
        assert message.startswith(f"gated_act: activation {said}"), text
        remedy = ". Any other runs in PyTorch as a module: " if "one of" in said else ""
        assert message.partition(f"got {text!r}")[2].startswith(remedy), text
        assert remedy or message.endswith(f"got {text!r}"), text


def plain_calls():
    x, w, t = torch.ones(2, 4), torch.ones(4, 4), torch.ones(1, 4, 4)
    routing = fusedmlp.top1_route(torch.ones(2, 1))
    yield "linear_act", lambda a: fusedmlp.linear_act(x, w, activation=a)
    yield "mlp", lambda a: fusedmlp.mlp(x, w, w, activation=a)
    yield "moe_mlp", lambda a: fusedmlp.moe_mlp(x, routing, t, None, t, activation=a)


@pytest.mark.parametrize("name", GATES)
def test_without_an_up_projection_a_gate_is_refused(name, each_backend):
    for op, call in plain_calls():
        for text in (
            name,
            ACTIVATIONS[name].spelled(**{next(iter(ACTIVATIONS[name].parameters)): 2}),
        ):
            said = f"{op}: activation must be a function of one tensor here, where there is no up"
            with pytest.raises(
                ValueError, match=f"^{said} .*; got {re.escape(repr(text))}, a gate"
            ):
                call(text)
        with pytest.raises(ValueError, match=f"{op}: activation must be one of ") as caught:
            call("swish")
        assert name not in str(caught.value)


# ---- bounds


def gated_cases():
    return [c for c in CASES.values() if c.gated and takes_activation(c)]


def takes_activation(case):
    return "activation" in inspect.signature(case.fn).parameters


@pytest.fixture
def recorded(monkeypatch):
    """A row that notes what its factors are given."""

    def record(name):
        row, seen = ACTIVATIONS[name], {"phi": [], "psi": []}

        def noting(what, fn):
            return lambda t, *scalars: seen[what].append(t) or fn(t, *scalars)

        changed = {"reference": noting("phi", row.reference)}
        if row.up is not None:
            changed["up"] = noting("psi", row.up)
        monkeypatch.setitem(ACTIVATIONS, name, dataclasses.replace(row, **changed))
        return seen

    return record


@pytest.mark.parametrize("name", BENT)
def test_the_inputs_of_every_case_pass_every_bend(name, recorded):
    """A fair share of what phi and psi are given lies below, between and above, and none of it so
    near a kink that rounding could carry it across."""
    row = ACTIVATIONS[name]
    bends = [row.parameters.get(k, k) for k in (*row.kinks, *row.positive)]
    for case in CASES.values():
        if not takes_activation(case) or (row.up is not None and not case.gated):
            continue
        seen = recorded(name)
        case.run_reference(
            case.inputs(24, 128, 40, torch.float32, activation=name), activation=name
        )
        for what, parts in seen.items():
            if not parts:
                continue
            t = torch.cat([part.flatten() for part in parts])
            for bend in bends:
                beyond = [(t < -bend).float().mean(), (t > bend).float().mean()]
                between = (t.abs() < bend).float().mean() if bend else 1
                assert min(beyond) > 0.05 and between > 0.01, (case.name, what, bend)
            # Elementwise there is no rounding before it; bits of masks are drawn as they fall; the
            # second factor of a mask is an even number of products, exact, so may be on a bound.
            as_it_falls = case.op == "gated_act" or "masks" in case.draws
            masked = "masks" in case.shapes(1, 1, 1)
            if row.kinks and not as_it_falls and not (masked and what == "psi"):
                kinks = torch.tensor([float(row.parameters.get(k, k)) for k in row.kinks])
                assert (t.abs().unsqueeze(1) - kinks).abs().min() > 0.05, (case.name, what)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_are_where_slopes_jump(name):
    gate = resolve(OTHER.get(name, name))
    parameters = dict(zip(gate.row.parameters, gate.scalars, strict=True))
    kinks = torch.tensor([float(parameters.get(k, k)) for k in gate.row.kinks]).double()
    step = 2.0**-10
    x = (torch.arange(-32 * 1024, 32 * 1024).double() + 0.5) * step
    found = []
    for factor in (gate.phi, gate.psi):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(factor(leaf).sum(), leaf)
        jumps = x[:-1][slope.diff().abs() > 0.1] + step / 2
        found += [t.abs().item() for t in jumps]
    for at in found:
        assert any(abs(at - kink) < 0.02 for kink in kinks), at
    assert all(any(abs(at - kink) < 0.02 for at in found) for kink in kinks)


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if row.kinks])
def test_slopes_at_a_kink_follow_pytorch(name, on_triton, device):
    """At it and an ulp to either side, in g and in u."""
    row = ACTIVATIONS[name]
    at = torch.tensor([float(row.parameters.get(k, k)) for k in row.kinks])
    at = torch.cat((at, -at))
    infinity = torch.full_like(at, torch.inf)
    near = torch.cat((at, at.nextafter(infinity), at.nextafter(-infinity)))
    g, u = (t.flatten() for t in torch.meshgrid(near, near, indexing="ij"))
    inputs, dy = {"g": g.to(device), "u": u.to(device)}, torch.ones_like(g).to(device)
    ours = evaluate(lambda t: fusedmlp.gated_act(**t, activation=name), inputs, dy)
    theirs = evaluate(lambda t: reference.gated_act(**t, activation=name), inputs, dy)
    for key, t in ours.items():
        torch.testing.assert_close(t, theirs[key], rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity(name, on_triton, device):
    """A NaN in g or u is one in h; of a gate all else, infinities too, is as PyTorch has it."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, -0.5, 30.0, -30.0])
    g, u = (t.flatten().to(device) for t in torch.meshgrid(odd, odd, indexing="ij"))
    h = fusedmlp.gated_act(g, u, activation=name)
    assert h[g.isnan() | u.isnan()].isnan().all()
    if name in GATES:
        torch.testing.assert_close(h, reference.gated_act(g, u, name), equal_nan=True)


def test_formulas_by_hand():
    one = lambda g, u, a: fusedmlp.gated_act(torch.tensor(g), torch.tensor(u), activation=a)  # noqa: E731
    sigmoid = lambda z: torch.tensor(z).sigmoid()  # noqa: E731
    tanh = lambda z: torch.tensor(z).tanh()  # noqa: E731
    for given, expected in (
        (([9.0], [-9.0], "swiglu_oai"), 7 * sigmoid(1.702 * 7) * -6),
        (([2.0], [0.5], "swiglu_oai(limit=1, alpha=3)"), sigmoid(3.0) * 1.5),
        (([9.0], [9.0], "clamped_swiglu"), 49 * sigmoid(7.0)),
        (([9.0], [-9.0], "swiglu_step"), torch.tensor(-49.0)),
        (([-9.0], [2.0], "swiglu_step"), -18 * sigmoid(-9.0)),
        (([8.0], [50.0], "softcap_swiglu"), 4 * tanh(2.0) * sigmoid(8.0) * 25 * tanh(2.0)),
        (([8.0], [50.0], "situ"), 4 * tanh(2.0) * sigmoid(8.0) * 25 * tanh(2.0)),
        (([2.0], [3.0], "scaled_swiglu(gate_scale=2, up_scale=5)"), 4 * sigmoid(4.0) * 15),
    ):
        torch.testing.assert_close(one(*given), expected.view(1))


# ---- one kernel for all numbers


def test_another_limit_compiles_nothing():
    """On the PTX machine, forward and backward, of each op that takes gates."""
    for name, kernels, (first, second), differ in in_compiler(launched.with_two_limits, GATED):
        assert kernels and 0 < first == second, (name, kernels)
        assert differ, name


# ---- everything else that an op does


@pytest.mark.parametrize(
    "backend, name",
    [("reference", "gated_linear"), ("triton", "gated_act"), ("triton", "moe_mlp-bias")],
)
def test_it_compiles_in_one_graph(backend, name, device):
    """By the reference, too, whose reading of the argument is then traced."""
    with fusedmlp.backend(backend):
        op_checks.compiles(CASES[name].with_activation(GATE), None, device)


SMOOTH = {"gated_act": GATE, "gated_mlp-up_gate-bias": GATE, "masked_gated_linear-1": "situ"}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck_and_second_derivatives(name):
    """In float64, of the formula, off the bounds; the kernels' are the formula's."""
    case = CASES[name].with_activation(SMOOTH[name])
    op_checks.gradcheck(case)
    inputs = case.inputs(3, 5, 4, torch.float64)
    leaves = [t.requires_grad_(k not in case.straight_through) for k, t in inputs.items()]
    run = lambda *tensors: case.run(dict(zip(inputs, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("name", ("gated_act", "gated_mlp-bias"))
def test_a_second_derivative_through_the_kernels(name, device):
    case = CASES[name].with_activation(GATE)
    inputs = case.inputs(5, 16, 24, torch.float32, device)
    found = {}
    for backend in ("reference", "triton"):
        with fusedmlp.backend(backend):
            leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
            (first,) = torch.autograd.grad(
                case.run(leaves).square().sum(), next(iter(leaves.values())), create_graph=True
            )
            found[backend] = torch.autograd.grad(first.square().sum(), list(leaves.values()))
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * theirs.abs().max().item())


def test_torch_func_and_autocast(each_backend, device):
    case = CASES["gated_linear"].with_activation(GATE)
    inputs = case.inputs(5, 16, 24, torch.float32, device)
    run = lambda x: case.run({**inputs, "x": x}).square().sum()  # noqa: E731
    expected = evaluate(lambda t: case.run(t).square().sum(), inputs, torch.ones((), device=device))
    torch.testing.assert_close(torch.func.grad(run)(inputs["x"]), expected["dx"])
    each = torch.func.vmap(torch.func.grad(run))(inputs["x"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(each, expected["dx"])
    with torch.autocast(device, dtype=torch.bfloat16):
        h = case.run(inputs)
    exact = case.run_reference({k: t.bfloat16().double() for k, t in inputs.items()})
    eager = case.run_reference({k: t.bfloat16() for k, t in inputs.items()})
    assert h.dtype == torch.bfloat16
    assert_close_to(h, exact, eager)


# ---- modules

MODULES = {
    "elu": nn.ELU(), "elu(alpha=0.5)": nn.ELU(0.5), "selu": nn.SELU(),
    "leaky_relu(negative_slope=0.2)": nn.LeakyReLU(0.2), "softplus(beta=2.0)": nn.Softplus(2),
    "softplus(beta=0.5, threshold=8.0)": nn.Softplus(0.5, 8.0),
    "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "hardsigmoid": nn.Hardsigmoid(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_module_s_attributes_are_its_row_s_parameters(name, each_backend, device):
    module = MODULES[name]
    assert name_of(module) == name_by_values(module) == name
    torch.manual_seed(0)
    layer = fusedmlp.layers.FeedForward(8, activation=lambda: module).to(device)
    assert f"fused as {name!r}" in fusedmlp.explain(layer)
    x = torch.randn(5, 8, device=device)
    first, last = layer.net[0], layer.net[3]
    torch.testing.assert_close(layer(x), last(module(first(x))))


def test_modules_whose_numbers_no_row_takes():
    for module in (nn.LeakyReLU(float("inf")), nn.Softplus(-1), nn.Softplus(1, 0), nn.PReLU()):
        assert name_of(module) is None
    layer = fusedmlp.layers.FeedForward(8, activation=lambda: nn.Softplus(-1))
    assert "Softplus in PyTorch" in fusedmlp.explain(layer)
    assert name_by_values(nn.Hardtanh(-2, 2)) is None


@pytest.mark.parametrize("kind", ("parameter", "buffer"))
def test_a_module_that_holds_numbers_is_no_activation_whatever_it_gives(kind):
    """They may change later, as a scale that is 1 today."""
    module = nn.ReLU()
    if kind == "parameter":
        module.scale = nn.Parameter(torch.ones(()))
    else:
        module.register_buffer("scale", torch.ones(()))
    assert name_by_values(nn.ReLU()) == "relu" and name_by_values(module) is None


def test_parameters_are_given_in_order():
    """A row's scalars reach phi and psi by position: no two of them can be swapped unseen."""
    g = torch.linspace(-3, 3, 7)
    for name in (n for n, row in ACTIVATIONS.items() if len(row.parameters) == 2):
        row = ACTIVATIONS[name]
        h = {
            order: reference.gated_act(
                g, 2 * g, row.spelled(**dict(zip(row.parameters, order, strict=True)))
            )
            for order in ((0.5, 2.0), (2.0, 0.5))
        }
        assert not torch.allclose(h[0.5, 2.0], h[2.0, 0.5]), name
    assert all(len(row.parameters) <= 3 for row in ACTIVATIONS.values())
