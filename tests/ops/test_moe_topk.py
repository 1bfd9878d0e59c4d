"""moe_mlp for k experts a token, beside what the Cases show: against a plain loop over tokens, what
is saved, what is launched, and that k = 1 costs nothing more."""

import contextlib

import pytest
import torch
from compiled import in_compiler
from torch.nn import functional as F

import fusedmlp
from fusedmlp import Routing, moe_mlp, route_to, top1_route, topk_route
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.testing import assert_close_to, evaluate, yardsticks
from fusedmlp.testing.moe import experts_case

SIZE = T, D, H = 21, 24, 16


def given(E, k, dtype=torch.float32, device="cpu", **options):
    case = experts_case("moe_mlp-bias", E, k=k, bias=True, **options)
    inputs = case.inputs(*SIZE, dtype, device)
    return case, inputs


def by_loop(x, expert, prob, w_gate, w_up, w_down, b_gate, b_up, b_down, capacity=None):
    """Token by token, choice by choice, in float64; an expert that is full, or none, adds
    nothing."""
    E, load = len(w_gate), {}
    y = []
    for t in range(len(x)):
        row = torch.zeros(w_down.shape[1], dtype=x.dtype)
        for j, e in enumerate(expert[t].tolist()):
            load[e] = load.get(e, 0) + 1
            if not 0 <= e < E or (capacity is not None and load[e] > capacity):
                continue
            h = F.silu(x[t] @ w_gate[e].T + b_gate[e]) * (x[t] @ w_up[e].T + b_up[e])
            row = row + prob[t, j] * (h @ w_down[e].T + b_down[e])
        y.append(row)
    return torch.stack(y)


@pytest.mark.parametrize("capacity", (None, 4))
@pytest.mark.parametrize("k", (1, 2, 4, 8))
def test_reference_against_a_loop_over_tokens(k, capacity):
    _, inputs = given(8, k, torch.float64)
    expert, prob = (inputs.pop(name).view(T, k) for name in ("expert", "prob"))
    expert[3, 0], expert[5, k - 1] = 8, -1  # another rank's, and none

    def ours(t):
        routing = route_to(expert, t["prob"], 8, capacity=capacity)
        return moe_mlp(routing=routing, **{n: v for n, v in t.items() if n != "prob"})

    dy = torch.randn(T, D, dtype=torch.float64)
    leaves = {**inputs, "prob": prob}
    results = evaluate(ours, leaves, dy)
    known = evaluate(lambda t: by_loop(expert=expert, capacity=capacity, **t), leaves, dy)
    for name, exact in known.items():
        torch.testing.assert_close(results[name], exact, msg=lambda m, n=name: f"{n}: {m}")


ROUTINGS = {
    "all to the same": lambda T, k, E: torch.arange(k).expand(T, k),
    "none": lambda T, k, E: torch.full((T, k), E),
    "twice the same": lambda T, k, E: torch.arange(T).unsqueeze(1).expand(T, k) % E,
    "some outside": lambda T, k, E: (torch.arange(T * k) % (E + 2) - 1).view(T, k),
}


@pytest.mark.parametrize("capacity", (None, 9))
@pytest.mark.parametrize("name", ROUTINGS)
def test_uneven_routings(name, capacity, device, on_triton):
    E, k = 5, 3
    _, inputs = given(E, k, device=device)
    del inputs["expert"]
    expert = ROUTINGS[name](T, k, E).contiguous().to(device)

    def run(t):
        routing = route_to(expert, t["prob"], E, capacity=capacity)
        return moe_mlp(routing=routing, **{n: v for n, v in t.items() if n != "prob"})

    dy = torch.randn(T, D, device=device)
    results = evaluate(run, inputs, dy)
    with fusedmlp.backend("reference"):
        known = yardsticks(run, inputs, dy)
    for key, out in results.items():
        assert_close_to(out, *known[key], name=key)


@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 3), (9, 1, 1), (1, 4, 4), (7, 3, 3)])
def test_no_tokens_one_expert_every_expert(T, E, k, device, each_backend):
    case = experts_case("moe_mlp-bias", E, k=k, bias=True)
    inputs = case.inputs(T, D, H, torch.float32, device)
    inputs |= {name: inputs[name].view(T, k) for name in ("expert", "prob")}
    results = evaluate(case.run, inputs, torch.ones(T, D, device=device))
    for name, t in inputs.items():
        if t.is_floating_point():
            assert results[f"d{name}"].shape == t.shape
            assert T or not results[f"d{name}"].any()
    with fusedmlp.backend("reference"):
        torch.testing.assert_close(results["out"], case.run(inputs), rtol=1e-4, atol=1e-5)


def test_a_dropped_choice_adds_nothing_whatever_it_holds(device, each_backend):
    case, inputs = given(5, 2, device=device)
    inputs["expert"][4] = torch.tensor([-1, 2], device=device)
    inputs["prob"][4, 0] = float("nan")
    results = evaluate(case.run, inputs, torch.ones(T, D, device=device))
    assert all(t.isfinite().all() for t in results.values())
    assert results["dprob"][4, 0] == 0 and results["out"][4].any()


def test_router_learns_through_prob(device, on_triton):
    """logits -> topk_route -> experts: the gradient of the router, and of x through both."""
    _, inputs = given(8, 4, device=device)
    del inputs["expert"], inputs["prob"]
    inputs["router"] = torch.randn(8, D, device=device) / 5
    bias = torch.linspace(-0.2, 0.2, 8, device=device)

    def run(t):
        logits = t["x"] @ t["router"].t()
        routing = topk_route(
            logits, 4, score="sigmoid", scale=2.5, bias=bias, groups=4, topk_group=3, capacity=12
        )  # fmt: skip
        return moe_mlp(routing=routing, **{k: v for k, v in t.items() if k != "router"})

    dy = torch.randn(T, D, device=device)
    ours = evaluate(run, inputs, dy)
    with fusedmlp.backend("reference"):
        known = yardsticks(run, inputs, dy)
    for name, out in ours.items():
        assert_close_to(out, *known[name], name=name)


# ---- memory


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("k", (1, 8))
def test_x_is_saved_once(k, recompute, device, on_triton):
    """g and u of each choice's row, or with recompute nothing, beside what the call was given."""
    case, inputs = given(11, k, device=device)
    routing = route_to(inputs.pop("expert"), inputs.pop("prob"), 11)
    arguments = {t.data_ptr() for t in (*inputs.values(), *routing[:6])}
    made, seen = {}, []

    def pack(t):
        seen.append(t.data_ptr())
        if t.data_ptr() not in arguments:
            made[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_mlp(routing=routing, **leaves, recompute=recompute)
    assert seen.count(inputs["x"].data_ptr()) == 1
    assert sum(made.values()) == (0 if recompute else 4 * 2 * T * k * H)


# ---- cost of k = 1

FORWARD, ONE = ["_up_kernel", "_down_kernel"], ["_combine_kernel"]
BIASES = ["_bias_kernel", "_column_sums_kernel", "_dprob_kernel"]
SUMS = ["_bias_kernel", "_column_sums_kernel"] * 2


@pytest.mark.parametrize("k", (1, 2))
def test_launches(k, device, on_triton, launched):
    """Where k is 1 those that it had before there was any other k, for (T,) and (T, 1) alike."""
    case, inputs = given(4, k, device=device)
    more = ONE if k > 1 else []
    for shape in ((T,), (T, 1)) if k == 1 else ((T, k),):
        inputs |= {name: inputs[name].view(shape) for name in ("expert", "prob")}
        routing = route_to(inputs["expert"], inputs["prob"], 4)
        leaves = {
            n: t.detach().requires_grad_() for n, t in inputs.items() if n not in ("expert", "prob")
        }
        routing = routing._replace(prob=routing.prob.detach().requires_grad_())
        launched.clear()
        y = moe_mlp(routing=routing, **leaves)
        assert launched == [*FORWARD, *more]
        launched.clear()
        y.sum().backward()
        backward = ["_dh_kernel", *SUMS, *BIASES, "_down_kernel", *more, *["_wgrad_kernel"] * 3]
        assert sorted(launched) == sorted(backward)


def test_routing_of_one_choice_launches_what_it_did(device, on_triton, launched):
    logits = torch.randn(T, 4, device=device, requires_grad=True)
    routing = top1_route(logits)
    assert launched == ["_count_kernel", "_place_kernel"]
    launched.clear()
    routing.prob.sum().backward()
    assert launched == ["_bwd_kernel"]
    assert isinstance(routing, Routing) and routing.expert.shape == (T,)


# What gathers by token, with the argument that says how many choices there are.
DIVISION = "return (number.to(tl.int32) // k).to(tl.int64)"


def _compiled(arch, k, divides):
    """{kernel: PTX} of moe_mlp's kernels on `arch`, with token_of as it is or without its
    division. For the process that compiles."""
    from rewriting import rewritten

    from fusedmlp.bench.gate.compiling import compile_only
    from fusedmlp.kernels.moe import backward, grouped, moe_mlp as kernels

    new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)  # noqa: E731
    T, D, H, E = 64, 128, 256, 4
    x, dy, gu, prob = new(T, D), new(T, D), new(2, k * T, H), new(k * T)
    tokens, offsets = new(k * T, dtype=torch.int32), new(E + 2, dtype=torch.int32)
    gate, up = new(2, E, H, D)  # of one tensor: how far apart they lie decides the kernel
    down, bias = new(E, D, H), new(E, D)
    plain = contextlib.nullcontext()
    change = plain if divides else rewritten(grouped.token_of, DIVISION, "return number")
    with change, compile_only(ARCHES[arch]) as launches:
        # What was compiled is found by a hash that holds the sources of all callees.
        for fn in (
            grouped.gathered_at, kernels._up_kernel, backward._dh_kernel, backward._wgrad_kernel,
            backward._bias_kernel,
        ):  # fmt: skip
            fn.hash = None
            fn.device_caches.clear()
        kernels.moe_up(x, tokens, offsets, gate, up, None, None, "silu", True, True)
        backward.moe_dh(
            dy, tokens, offsets, prob, down, gu, bias, "silu", None, True, True, True, True
        )  # fmt: skip
        backward.moe_wgrad(gu[0], x, tokens, offsets, False, True)
        return {launch.name: _code(launch.kernel.asm["ptx"]) for launch in launches}


def _code(ptx):
    """Instructions, without the lines of the source that they came from."""
    body = ptx.partition(".section")[0].splitlines()
    return [
        line for line in body if not line.strip().startswith((".loc", ".file", "//", "$L__tmp"))
    ]


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_one_choice_compiles_to_the_code_without_a_division(arch):
    gathering = {"_up_kernel", "_dh_kernel", "_wgrad_kernel", "_bias_kernel"}
    one, bare = (in_compiler(_compiled, arch, 1, divides) for divides in (True, False))
    two, wrong = (in_compiler(_compiled, arch, 2, divides) for divides in (True, False))
    assert gathering < one.keys()
    for name in one:
        assert one[name] == bare[name], name
        assert (two[name] != wrong[name]) == (name in gathering), name
