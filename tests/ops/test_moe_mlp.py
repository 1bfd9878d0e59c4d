"""moe_mlp against the reference: routings of every kind, forward, backward, and bad input."""

import dataclasses

import pytest
import torch
from op_checks import FEW, opcheck, placed

import fusedmlp
from fusedmlp import Routing, moe_mlp, route_to, top1_route
from fusedmlp.kernels import device as device_module
from fusedmlp.kernels.arch import ARCHES, INTERPRETER
from fusedmlp.kernels.arch.tile import Fit
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.moe import backward as moe_mlp_bwd, moe_mlp as kernels
from fusedmlp.kernels.pick import pick_grouped_tile
from fusedmlp.ops import _experts as ops
from fusedmlp.packing import ORDERS, halves
from fusedmlp.reference.moe import by_expert
from fusedmlp.testing import CASES, assert_close_to, compare, evaluate, floating, yardsticks
from fusedmlp.testing.moe import EXPERTS, experts_case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOE = {name: case for name, case in CASES.items() if case.op == "moe_mlp"}
PLAIN = MOE["moe_mlp"]
FULL = MOE["moe_mlp-bias"]
# M, D, H: experts of several tiles, of one, of part of one; D and H of 8's multiples take TMA
# descriptors, the others element loads; both off every block.
SHAPES = [(40, 40, 24), (13, 19, 35)]


def check(case, inputs, **options):
    for name, numbers in compare(case, inputs, **options).items():
        assert_close_to(*numbers, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", MOE.values(), ids=MOE)
def test_kernel_matches_reference(case, shape, dtype, device, on_triton):
    if dtype == torch.float16:
        shape = (9, *shape[1:])  # the interpreter is slow, and nothing depends on it but the dtype
    check(case, case.inputs(*shape, dtype, device))


@pytest.mark.parametrize("activation", FEW)
def test_each_kind_of_activation(activation, device, on_triton):
    inputs = PLAIN.inputs(6, 16, 16, torch.float32, device, activation=activation)
    check(PLAIN, inputs, activation=activation)


ROUTINGS = {
    "all to the first": lambda T, E: torch.zeros(T, dtype=torch.int64),
    "all to the last": lambda T, E: torch.full((T,), E - 1),
    "none": lambda T, E: torch.full((T,), -1),
    "some outside": lambda T, E: torch.arange(T) % (E + 2) - 1,
    "one each": lambda T, E: torch.arange(T) % E,
    "first and last empty": lambda T, E: torch.arange(T) % (E - 2) + 1,
}


def assert_routed(inputs, expert, E, device, capacity=None, activation="silu"):
    """Forward and backward of a routing given whole, against the reference."""
    case = dataclasses.replace(
        FULL,
        adapt=lambda a, functions: {
            **{k: t for k, t in a.items() if k not in ("expert", "prob")},
            "routing": functions.route_to(a["expert"], a["prob"], E, capacity=capacity),
        },
    )
    check(case, {**inputs, "expert": expert.to(device)}, activation=activation)


@pytest.mark.parametrize("capacity", (None, 6))  # of fewer rows eager's error is a matter of luck
@pytest.mark.parametrize("routing", ROUTINGS)
def test_uneven_routings(routing, capacity, device, on_triton):
    T, E = 26, EXPERTS
    inputs = FULL.inputs(T, 16, 16, torch.float32, device)
    assert_routed(inputs, ROUTINGS[routing](T, E), E, device, capacity)


def test_one_expert(device, on_triton):
    case = experts_case("moe_mlp-bias", experts=1, bias=True)
    check(case, case.inputs(35, 24, 16, torch.float32, device))


def test_more_experts_than_tokens(device, on_triton):
    case = experts_case("moe_mlp-bias", experts=40, bias=True)
    check(case, case.inputs(7, 16, 8, torch.float32, device))


@pytest.mark.slow
def test_1024_experts(device, on_triton):
    case = experts_case("moe_mlp", experts=1024)
    check(case, case.inputs(300, 16, 16, torch.float32, device))


@pytest.mark.parametrize("case", MOE.values(), ids=MOE)
def test_no_tokens(case, device, each_backend):
    inputs = case.inputs(0, 6, 10, torch.float32, device)
    results = evaluate(case.run, inputs, torch.zeros(0, 6, device=device))
    assert results["out"].shape == (0, 6)
    for name, t in floating(inputs).items():
        assert results[f"d{name}"].shape == t.shape and not results[f"d{name}"].any()


@pytest.mark.parametrize("case", MOE.values(), ids=MOE)
def test_reference_passes_gradcheck(case):
    inputs = case.inputs(5, 4, 3, torch.float64)
    leaves = floating(inputs)
    run = lambda *tensors: case.run({**inputs, **dict(zip(leaves, tensors, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves.values()])


def test_by_hand(device, each_backend):
    """Two tokens to two experts of width 1, and a third dropped."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 5.0]], device=device)
    w_in = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], device=device)
    w_out = torch.tensor([[[2.0], [3.0]], [[4.0], [5.0]]], device=device)
    prob = torch.tensor([0.5, 0.25, 1.0], device=device)
    routing = route_to(torch.tensor([1, 0, 2], device=device), prob, 2)
    y = moe_mlp(x, routing, w_in, None, w_out, activation="identity")
    expected = [[0.5 * 2 * 4, 0.5 * 2 * 5], [0.25 * 3 * 2, 0.25 * 3 * 3], [0, 0]]
    torch.testing.assert_close(y, torch.tensor(expected, device=device))


def test_router_learns_through_prob(device, on_triton):
    """logits -> routing -> experts: the gradient of the logits, and of x through both."""
    inputs = FULL.inputs(20, 24, 16, torch.float32, device)
    del inputs["expert"], inputs["prob"]
    inputs["router"] = torch.randn(EXPERTS, 24, device=device) / 5

    def run(t):
        routing = top1_route(t["x"] @ t["router"].t(), capacity=8)
        return moe_mlp(routing=routing, **{k: v for k, v in t.items() if k != "router"})

    dy = torch.randn(20, 24, device=device)
    ours = evaluate(run, inputs, dy)
    with fusedmlp.backend("reference"):
        known = yardsticks(run, inputs, dy)
        for name, out in ours.items():
            assert_close_to(out, *known[name], name=name)


def test_float32_prob_with_16_bit_tokens(device, on_triton):
    inputs = PLAIN.inputs(20, 24, 16, torch.bfloat16, device)
    inputs["prob"] = inputs["prob"].float()
    results = compare(PLAIN, inputs)
    assert results["dprob"][0].dtype == torch.float32 and results["out"][0].dtype == torch.bfloat16
    for name, numbers in results.items():
        assert_close_to(*numbers, name=name)


def test_leading_dimensions(device, each_backend):
    inputs = PLAIN.inputs(12, 16, 24, torch.float32, device)
    flat = PLAIN.run(inputs)
    shaped = PLAIN.run({**inputs, "x": inputs["x"].view(2, 3, 2, 16)})
    torch.testing.assert_close(shaped.flatten(0, 2), flat, rtol=0, atol=0)


def _strided(t, how):
    if how == "wide rows":
        return placed(t, step=3)
    if how == "every other":
        return torch.stack([t, torch.full_like(t, 7)], 1).flatten(0, 1)[::2]
    return t.mT.contiguous().mT if t.dim() > 1 else t


@pytest.mark.parametrize("how", ("wide rows", "every other", "transposed"))
@pytest.mark.parametrize("name", ("moe_mlp-bias", "moe_mlp-up_gate-bias", "moe_mlp-top2-bias"))
def test_strides_are_read_in_place(name, how, device, on_triton):
    case = MOE[name]
    inputs = case.inputs(13, 24, 24, torch.float32, device)
    check(case, {k: _strided(t, how) for k, t in inputs.items()})


def test_zero_stride_upstream_gradient(device, on_triton):
    inputs = FULL.inputs(9, 24, 16, torch.float32, device)
    check(FULL, inputs, dy=torch.ones((), device=device).expand(9, 24))


@pytest.mark.parametrize("name", ("moe_mlp-bias", "moe_mlp-up_gate-bias", "moe_mlp-top2-bias"))
def test_each_gradient_alone(name, device, on_triton):
    """And all but that of x: between them they take every branch."""
    case = MOE[name]
    inputs = case.inputs(5, 8, 8, torch.float32, device)
    names = list(floating(inputs))
    dy = torch.randn(5, 8, device=device)
    full = evaluate(case.run, inputs, dy)
    for wanted in (*((name,) for name in names), tuple(names[1:])):
        part = evaluate(case.run, inputs, dy, wanted)
        for key in part:
            torch.testing.assert_close(part[key], full[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", MOE.values(), ids=MOE)
def test_second_backward_and_reruns_are_bit_equal(case, device, on_triton):
    inputs = case.inputs(20, 24, 16, torch.bfloat16, device)
    wanted = [t.requires_grad_() for t in floating(inputs).values()]
    before = [t.detach().clone() for t in wanted]
    out = case.run(inputs)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(out, wanted, dy)
    again = case.run(inputs)
    third = torch.autograd.grad(again, wanted, dy)
    assert torch.equal(out, again)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(before, wanted, strict=True))


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("spoiled", ("x", "prob"))
def test_bad_tokens_stay_in_their_rows(spoiled, bad, device, on_triton):
    """And in their own expert's gradients: others share its tiles' memory, not its values."""
    inputs = FULL.inputs(35, 24, 40, torch.float32, device)
    dy = torch.ones(35, 24, device=device)
    clean = evaluate(FULL.run, inputs, dy)
    inputs[spoiled] = inputs[spoiled].clone()
    inputs[spoiled][7] = bad
    dirty = evaluate(FULL.run, inputs, dy)
    rows = [t for t in range(35) if t != 7]
    experts = [e for e in range(EXPERTS) if e != inputs["expert"][7]]
    for key in clean:
        others = rows if key in ("out", "dx", "dprob") else experts
        assert torch.equal(clean[key][others], dirty[key][others]), key
    assert not dirty["out"][7].isfinite().all()


def test_a_dropped_token_is_0_whatever_it_holds(device, each_backend):
    inputs = FULL.inputs(12, 16, 8, torch.float32, device)
    inputs["x"][5] = inputs["prob"][5] = float("nan")
    inputs["expert"][5] = -1
    results = evaluate(FULL.run, inputs, torch.ones(12, 16, device=device))
    assert not results["out"][5].any() and not results["dx"][5].any()
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize(
    "name", ("moe_mlp-bias", "moe_mlp-plain-recompute-bias", "moe_mlp-top2-bias")
)
def test_autocast(name, device, each_backend):
    case = MOE[name]
    inputs = case.inputs(6, 16, 24, torch.float32, device)
    half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs.items()}
    # As a router under autocast has it: float32 probabilities stay so.
    half["prob"] = inputs["prob"]
    dy = torch.ones(6, 16, device=device, dtype=torch.bfloat16)

    def run(leaves):
        with torch.autocast(device, torch.bfloat16):
            return case.run(leaves)

    mixed, plain = evaluate(run, inputs, dy), evaluate(case.run, half, dy)
    assert mixed["out"].dtype == torch.bfloat16
    for key in mixed:
        assert key == "out" or mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key].bfloat16(), plain[key].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prob_of_any_dtype_under_autocast(dtype, device, each_backend):
    """In 16 bits it becomes autocast's, float32 stays as it is."""
    inputs = PLAIN.inputs(6, 16, 8, torch.float32, device)
    inputs["prob"] = inputs["prob"].to(dtype)
    with torch.autocast(device, torch.bfloat16):
        y = PLAIN.run(inputs)
    half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs.items()}
    if dtype == torch.float32:
        half["prob"] = inputs["prob"]
    assert torch.equal(y, PLAIN.run(half)) and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ("moe_mlp-up_gate-bias", "moe_mlp-plain-recompute-bias", "moe_mlp-top2-bias")
)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(name, dynamic, device, each_backend):
    torch._dynamo.reset()
    case = MOE[name]
    inputs = case.inputs(6, 16, 8, torch.float32, device)
    dy = torch.randn(6, 16, device=device)
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = evaluate(case.run, inputs, dy)
    for key, t in evaluate(compiled, inputs, dy).items():
        torch.testing.assert_close(t, eager[key])


def test_results_may_be_modified_in_place(device, each_backend):
    inputs = FULL.inputs(6, 16, 8, torch.float32, device)
    wanted = [t.requires_grad_() for t in floating(inputs).values()]
    plain = torch.autograd.grad(FULL.run(inputs).sum(), wanted)
    changed = torch.autograd.grad(FULL.run(inputs).mul_(2).sum(), wanted)
    for a, b in zip(plain, changed, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_memory_plan(device, on_triton):
    """g and u of every token, and with recompute nothing but the routing."""
    T, D, H = 33, 16, 64
    expected = {"moe_mlp": 2 * T * H, "moe_mlp-plain-recompute-bias": 0}
    for name, elements in expected.items():
        case = MOE[name]
        inputs = case.inputs(T, D, H, torch.float32, device)
        routing = route_to(inputs.pop("expert"), inputs.pop("prob"), EXPERTS)
        arguments = {t.data_ptr() for t in (*inputs.values(), *routing[:6])}
        kept = {}

        def pack(t, arguments=arguments, kept=kept):
            if t.data_ptr() not in arguments:
                kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaves = {k: t.requires_grad_() for k, t in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            moe_mlp(routing=routing, **{"w_up": None, **leaves}, **case.options)
        assert sum(kept.values()) == 4 * elements, name


def test_opcheck(device):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    t = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
    routing = route_to(torch.arange(5, device=device) % 3, t(5), 3)
    x, w, wd, b, bd, gu = t(5, 16), t(3, 8, 16), t(3, 16, 8), t(3, 8), t(3, 16), t(2, 5, 8)
    route = (routing.tokens, routing.offsets)
    # Traced once each: that is what takes long.
    opcheck(ops.up, (x, *route, w, w, b, b, "gelu", True, True), test_utils=tests)
    for h, pair in ((True, True), (True, False), (False, True)):
        opcheck(ops.up, (x, *route, w, None, None, None, "gelu", h, pair), test_utils=tests[:2])
    down = (t(5, 8), *route, wd)
    opcheck(ops.down, (*down, None, None, bd, routing.prob, False), test_utils=tests)
    opcheck(ops.down, (*down, t(5, 8), wd, None, None, True), test_utils=tests[:2])
    dh = (x, *route, routing.prob, wd)
    for packed, g, how in (
        (None, gu, tests),
        ("up_gate", gu, tests[:2]),
        ("interleaved", gu, tests[:2]),
        (None, gu[:1], tests[:2]),
    ):
        opcheck(ops.dh, (*dh, g, bd, "silu", packed, True, True, True, True), test_utils=how)
    opcheck(ops.dh, (*dh, gu, None, "silu", None, False, False, False, False), test_utils=tests[:2])
    opcheck(ops.wgrad, (t(5, 8), x, *route, False, True), test_utils=tests)
    opcheck(ops.bias_grad, (x, *route), test_utils=tests)


@pytest.mark.interpreter
@pytest.mark.parametrize("loads", ("tma", "vector", "element"))
@pytest.mark.parametrize("subtiles", (1, 4))
def test_every_way_of_cutting_gives_the_same_numbers(
    loads, subtiles, device, on_triton, monkeypatch
):
    """The constexprs that tiles of real GPUs use and the interpreter's own tiles do not."""
    interpreter = INTERPRETER
    rows = {
        key: (dataclasses.replace(tiles[0], block_n=64, subtiles=subtiles, loads=loads),)
        for key, tiles in interpreter.tiles.items()
        if key[0].startswith("moe_")
    }
    monkeypatch.setattr(device_module, "INTERPRETER", dataclasses.replace(interpreter, tiles=rows))
    for module in (kernels, moe_mlp_bwd):
        monkeypatch.setattr(module, "fit_of", lambda *rows: Fit[loads.upper()])
        monkeypatch.setattr(module, "experts_fit", lambda *weights: Fit.TMA)
    for name in ("moe_mlp-bias", "moe_mlp-plain-recompute-bias", "moe_mlp-top2-bias", "moe_linear"):
        check(CASES[name], CASES[name].inputs(45, 24, 72, torch.float16))


@pytest.mark.parametrize("T, block_m", [(1, 16), (64 * 16, 16), (64 * 17, 32), (64 * 64, 64),
                                        (64 * 65, 128), (1 << 17, 128)])  # fmt: skip
def test_tiles_go_by_the_tokens_of_an_expert(T, block_m):
    x = torch.empty(1, dtype=torch.bfloat16)
    for arch in ARCHES.values():
        with pretend(arch, 132):
            for kernel in ("moe_up", "moe_down", "moe_dh"):
                assert pick_grouped_tile(kernel, x, T, 64, Fit.TMA).block_m == block_m
            assert pick_grouped_tile("moe_up", x, T, 64, Fit.ELEMENT).loads == "element"


def good(**changed):
    inputs = FULL.inputs(4, 16, 24, torch.float32)
    routing = route_to(inputs.pop("expert"), inputs.pop("prob"), EXPERTS)
    return {**inputs, "routing": routing, **changed}


ROUTING = route_to(torch.zeros(4, dtype=torch.int64), torch.ones(4), EXPERTS)
BAD = [
    ({"x": torch.ones(4, 7)}, ValueError, r"x must be \(\.\.\., 16\): D of w_gate; got \(4, 7\)"),
    ({"x": torch.ones(5, 16)}, ValueError, r"routing.expert must have shape \(5,\) for x's 5 tokens and the weights' 3 experts, got \(4,\)"),
    ({"x": torch.ones(4, 16).double()}, TypeError, "w_gate must have x's dtype torch.float64"),
    ({"w_gate": torch.ones(24, 16)}, ValueError, r"w_gate must be \(E, rows, columns\), got \(24, 16\)"),
    ({"w_gate": torch.ones(0, 24, 16)}, ValueError, r"w_gate must hold at least 1 expert, got \(0, 24, 16\)"),
    ({"w_up": torch.ones(4, 23, 16)}, ValueError, r"w_up must have shape \(3, 24, 16\), got \(4, 23, 16\)"),
    ({"w_down": torch.ones(4, 16, 24)}, ValueError, r"w_down must have shape \(3, 16, 24\), got \(4, 16, 24\)"),
    ({"b_gate": torch.ones(4, 3)}, ValueError, r"b_gate must have shape \(3, 24\), got \(4, 3\)"),
    ({"b_down": torch.ones(4, 3)}, ValueError, r"b_down must have shape \(3, 16\), got \(4, 3\)"),
    ({"w_up": None}, ValueError, "b_up must be None where w_up is None, got a tensor"),
    ({"packed": "gate_up"}, ValueError, "w_up must be None when packed, got a tensor"),
    ({"packed": "gu"}, ValueError, "packed must be None, 'gate_up', 'up_gate' or 'interleaved', got 'gu'"),
    ({"packed": "gate_up", "w_up": None, "w_gate": torch.ones(4, 7, 16)}, ValueError, r"w_gate must be \(E, 2H, D\) when packed"),
    ({"packed": "interleaved", "w_up": None, "w_gate": torch.ones(4, 7, 16)}, ValueError, r"w_gate must be \(E, 2H, D\) when packed, got \(4, 7, 16\)"),
    ({"routing": (1, 2)}, TypeError, "routing must be a Routing, got tuple"),
    ({"routing": route_to(torch.zeros(4, dtype=torch.int64), torch.ones(4), 2)}, ValueError, r"routing.offsets must have shape \(5,\) for x's 4 tokens and the weights' 3 experts, got \(4,\)"),
    ({"routing": ROUTING._replace(prob=torch.ones(4).double())}, TypeError, "routing.prob must have x's dtype torch.float32 or torch.float32"),
    ({"routing": ROUTING._replace(prob=torch.ones(4, device="meta"))}, ValueError, "routing.prob must be on x's device cpu, got meta"),
    ({"routing": ROUTING._replace(prob=torch.ones(1))}, ValueError, r"routing.prob must have shape \(4,\) .*, got \(1,\)"),
    ({"routing": ROUTING._replace(prob=None)}, TypeError, "routing.prob must be a Tensor, got NoneType"),
    ({"routing": ROUTING._replace(tokens=ROUTING.tokens[:2])}, ValueError, r"routing.tokens must have shape \(4,\) .*, got \(2,\)"),
    ({"routing": ROUTING._replace(tokens=ROUTING.tokens.long())}, TypeError, "routing.tokens must be torch.int32, got torch.int64"),
    ({"routing": ROUTING._replace(rows=ROUTING.rows[:2])}, ValueError, r"routing.rows must have shape \(4,\) .*, got \(2,\)"),
    ({"w_gate": None}, TypeError, "w_gate must be a Tensor, got NoneType"),
    ({"w_down": None}, TypeError, "w_down must be a Tensor, got NoneType"),
    ({"activation": "swish"}, ValueError, "activation must be one of silu, .*; got 'swish'"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD, ids=range(len(BAD)))
def test_one_clear_error(changed, error, message, each_backend):
    with pytest.raises(error, match=message) as caught:
        moe_mlp(**good(**changed))
    assert str(caught.value).startswith("moe_mlp: ")


W, DOWN = torch.ones(EXPERTS, 24, 16), torch.ones(EXPERTS, 16, 24)
CONSUMERS = {
    "moe_mlp": lambda routing: moe_mlp(torch.ones(4, 16), routing, W, W, DOWN),
    "moe_linear": lambda routing: fusedmlp.moe_linear(torch.ones(4, 16), routing, W),
}


@pytest.mark.parametrize("field", Routing._fields[:6])
@pytest.mark.parametrize("op", CONSUMERS)
def test_a_field_of_the_routing_that_is_read_is_looked_at(op, field, each_backend):
    """moe_linear reads no prob, so that may be anything."""
    t = getattr(ROUTING, field)
    wrong = [
        (None, TypeError, "must be a Tensor, got NoneType"),
        (t[:-1], ValueError, rf"must have shape \({len(t)},\) for x's 4 tokens and the weights' 3 exp"),
        (t.double(), TypeError, r"must (be|have) .*torch\.\w+, got torch.float64"),
        (t.to("meta"), ValueError, "must be on x's device cpu, got meta"),
    ]  # fmt: skip
    for value, error, message in wrong:
        routing = ROUTING._replace(**{field: value})
        if (op, field) == ("moe_linear", "prob"):
            assert CONSUMERS[op](routing).isfinite().all()
            continue
        with pytest.raises(error, match=rf"^{op}: routing\.{field} {message}"):
            CONSUMERS[op](routing)


def test_one_expert_is_a_dense_block(device, each_backend):
    torch.manual_seed(0)
    x, w, down = (torch.randn(s, device=device) / 4 for s in ((5, 16), (1, 24, 16), (1, 16, 24)))
    routing = route_to(torch.zeros(5, dtype=torch.int64, device=device), x.new_ones(5), 1)
    y = moe_mlp(x, routing, w, w, down)
    dense = fusedmlp.gated_mlp(x, w[0], w[0], down[0])
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fusedmlp.moe_linear(x, routing, w), x @ w[0].T)


@pytest.mark.parametrize("capacity", [None, 1])
def test_the_formula_runs_no_expert_without_rows(capacity):
    """But the first, whose gradients are then 0 and not missing."""
    routing = route_to(torch.tensor([2, 5, 2, 9]), torch.ones(4), 7, capacity=capacity)
    ran = []

    def run(rows, e):
        ran.append((e, rows[:, 0].tolist()))
        return rows

    by_expert(torch.arange(4.0).unsqueeze(1), routing, run)
    assert ran == [(0, []), (2, [0, 2] if capacity is None else [0]), (5, [1])]


def test_a_routing_is_a_pytree():
    leaves, spec = torch.utils._pytree.tree_flatten(ROUTING)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), Routing)


@pytest.mark.parametrize("packed", ORDERS)
def test_packed_experts_take_gates(packed):
    """One weight is gate and up all the same."""
    x, w, down = (torch.randn(shape) for shape in ((4, 8), (3, 12, 8), (3, 8, 6)))
    routing = route_to(torch.tensor([0, 2, 1, 2]), torch.ones(4), 3)
    gate, up = halves(w, packed, 1)
    y = moe_mlp(x, routing, w, None, down, activation="swiglu_oai", packed=packed)
    torch.testing.assert_close(y, moe_mlp(x, routing, gate, up, down, activation="swiglu_oai"))
