"""No verdict of the tolerance rule hangs on the processor: honest results pass beside the luckiest
eager there can be, in whatever order they are summed, and wrong ones near 0 fail."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmlp.ops import gated_linear
from fusedmlp.testing import CASES, compare, error_of, evaluate, judge, yardsticks
from fusedmlp.testing.rounding import rounding_errors

aten = torch.ops.aten
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# A single element, sums of one term, and sums whose results are few.
SIZES = [(1, 1, 1), (17, 1, 33), (17, 33, 1), (9, 16, 24)]


def passes(out, exact, eager, rounding=None):
    """By the rule, beside an eager whose only error is that of rounding the exact result."""
    return error_of(out, exact, exact.to(eager.dtype), rounding).passed


class Sequential(TorchDispatchMode):
    """Another processor: it adds term after term in float32, in an order of its own."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.mm, aten.bmm):
            return self.product(*args).to(args[0].dtype)
        if func.overloadpacket is aten.addmm and not kwargs:
            return (self.product(*args[1:]) + args[0]).to(args[0].dtype)
        if func is aten.sum.dim_IntList:
            return self.sum(*args).to(args[0].dtype)
        return func(*args, **(kwargs or {}))

    def added(self, count, term, start):
        order = torch.randperm(count, generator=self.generator).tolist()
        return functools.reduce(lambda total, k: total + term(k), order, start)

    def product(self, a, b):
        a, b = a.float(), b.float()
        start = a.new_zeros(*a.shape[:-1], b.shape[-1])
        return self.added(a.shape[-1], lambda k: a[..., k, None] * b[..., k, None, :], start)

    def sum(self, t, dims, keepdim=False):
        rows = t.float().movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
        total = self.added(rows.shape[0], lambda k: rows[k], rows.new_zeros(rows.shape[1:]))
        return total.view(t.sum(dims, keepdim).shape)


def gradient_of(out):
    generator = torch.Generator().manual_seed(out.numel())
    return (2 * torch.rand(out.shape, generator=generator, dtype=torch.float64) - 1).to(out)


def elsewhere(case, shape, seed=0):
    """What `compare` gives, with the reference on another processor in place of the kernels."""
    inputs = case.inputs(*shape, torch.float32, seed=seed)
    dy = None if case.forward_only else gradient_of(case.run_reference(inputs))
    known = yardsticks(case.run_reference, inputs, dy)
    with Sequential(seed):
        ours = evaluate(case.run_reference, inputs, dy)
    # Gradients of float16 scales are float16 on their way too, which nothing here simulates.
    return {k: (t, *known[k]) for k, t in ours.items() if t.dtype == torch.float32}


@each_case
def test_any_order_of_summation_passes(case):
    for seed, shape in enumerate(SIZES):
        results = elsewhere(case, shape, seed)
        assert [name for name, numbers in results.items() if not passes(*numbers)] == [], shape


def test_eager_alone_would_not_do():
    """Without the simulation of rounding, honest results fail beside the luckiest eager."""
    results = [elsewhere(CASES["gated_mlp"], shape, seed) for seed, shape in enumerate(SIZES)]
    assert not all(passes(*numbers[:3]) for each in results for numbers in each.values())


@pytest.mark.parametrize("shape", ((1, 1, 1), (5, 9, 1)), ids=str)
@each_case
def test_kernels_pass_beside_the_luckiest_eager(case, shape, device, on_triton):
    results = compare(case, case.inputs(*shape, torch.float32, device))
    assert [name for name, numbers in results.items() if not passes(*numbers)] == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("gated_mlp-bias", "masked_gated_linear-4", "moe_mlp"))
def test_simulated_errors_are_as_large_as_eagers(name, dtype, device):
    """Where there are elements enough that eager's error is no matter of luck."""
    inputs = CASES[name].inputs(64, 48, 96, dtype, device)
    dy = gradient_of(CASES[name].run_reference(inputs))
    for key, (exact, eager, rounding) in yardsticks(CASES[name].run_reference, inputs, dy).items():
        eagers = error_of(eager, exact, eager).rms
        assert 0.5 < rounding()[1] / eagers < 4, key


def test_rounding_is_simulated_only_where_eager_does_not_suffice():
    exact, asked = torch.linspace(-1, 1, 200).double(), []
    eager = exact.float() + 1e-6
    rounding = lambda: asked.append(1) or (1e-3, 1e-3)  # noqa: E731
    assert error_of(eager, exact, eager, rounding).passed and not asked
    error = error_of(eager + 1e-3, exact, eager, rounding)
    assert error.passed and asked and error.rounding_max == error.rounding_rms == 1e-3
    assert not error_of(eager + 3e-3, exact, eager, rounding).passed


@pytest.mark.parametrize("wanted, grads", ((None, ("dx", "dw")), (("w",), ("dw",)), ((), ())))
def test_results_have_no_graph_and_arguments_no_part_in_one(wanted, grads):
    case = CASES["linear_act"]
    inputs = case.inputs(3, 4, 5, torch.float32)
    results = evaluate(case.run, inputs, torch.ones(3, 5), wanted)
    assert (*results,) == ("out", *grads)
    assert not any(t.requires_grad for t in (*results.values(), *inputs.values()))


def test_to_judge_is_to_compare():
    """With all that it is given; by default with every gradient, of numbers of its own."""
    case = CASES["gated_mlp"]
    inputs = case.inputs(3, 8, 5, torch.float32)
    given = {"wanted": ("w_up",), "dy": torch.ones(3, 8), "activation": "relu"}
    for options in ({}, given, {"backward": False}):
        errors = judge(case, inputs, **options)
        assert errors == {k: error_of(*t) for k, t in compare(case, inputs, **options).items()}
        names = {"wanted": ("out", "dw_up"), "backward": ("out",)}.get(next(iter(options), ""))
        assert (*errors,) == (names or ("out", *(f"d{name}" for name in inputs)))


def test_simulations_repeat():
    case = CASES["gated_mlp"]
    inputs = case.inputs(5, 8, 12, torch.float32)
    first, second = (yardsticks(case.run_reference, inputs)["out"][2]() for _ in range(2))
    assert first == second and min(first) > 0


def test_a_tie_is_no_excuse():
    """At a kink no size of rounding is the right one: there eager alone counts."""
    case, w, dy = CASES["linear_act"], torch.ones(1, 2), torch.ones(1, 1)
    for x, smooth in (([2.0, 1.0], True), ([1.0, -1.0], False)):
        inputs = {"x": torch.tensor([x]), "w": w}
        known = yardsticks(lambda t: case.run_reference(t, activation="relu"), inputs, dy)
        assert [max(known[name][2]()) > 0 for name in ("out", "dw")] == [smooth] * 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("columns", (1, 200))
def test_a_percent_of_terms_that_cancel_fails(columns, dtype):
    """x w' is 0 exactly, and so is eager's error: rounding errors pass, a missing percent fails."""
    x, w = (gradient_of(torch.empty(n, 32, dtype=dtype)) for n in (1, columns))
    inputs = {"x": x.repeat(1, 2), "w": torch.cat([w, -w], 1)}
    known = yardsticks(lambda t: t["x"] @ t["w"].t(), inputs)["out"]
    with Sequential(0):
        honest = inputs["x"] @ inputs["w"].t()
    assert known[0].abs().max() < 1e-12 and passes(honest, *known)
    terms = inputs["x"].abs() @ inputs["w"].abs().t()
    assert not passes(honest + 0.01 * terms, *known)


@pytest.mark.parametrize("dtype, part", ((torch.float32, 0.01), (torch.bfloat16, 0.1)), ids=str)
def test_a_gradient_of_zero_with_a_part_missing_fails(dtype, part, device, on_triton, monkeypatch):
    """Every token comes twice, with gradients that cancel in those of the weights."""
    case = CASES["gated_mlp-bias"]
    inputs = case.inputs(16, 24, 40, dtype, device)
    inputs["x"] = inputs["x"].repeat(2, 1)
    dy = gradient_of(torch.empty(16, 24, dtype=dtype, device=device))
    dy = torch.cat([dy, -dy])
    honest = compare(case, inputs, dy=dy)
    assert all(honest[name][1].abs().max() < 1e-12 for name in ("dw_gate", "dw_up", "db_gate"))
    assert all(passes(*numbers) for numbers in honest.values())
    bwd = gated_linear.bwd

    def less(*args):
        dgu, h, db = bwd(*args)
        dgu[:, :16] *= 1 - part
        return dgu, h, db

    monkeypatch.setattr(gated_linear, "bwd", less)
    wrong = {name for name, numbers in compare(case, inputs, dy=dy).items() if not passes(*numbers)}
    assert wrong >= {"dw_gate", "dw_up"}


# What each sum is called with, from two matrices of 32 x 32 and their rows.
A_SUM = {
    "mm": lambda a, b: a @ b,
    "bmm": lambda a, b: torch.bmm(a[None], b[None]),
    "addmm": lambda a, b: torch.addmm(a, a, b),
    "baddbmm": lambda a, b: torch.baddbmm(a[None], a[None], b[None]),
    "mv": lambda a, b: torch.cat([a @ row for row in b]),
    "dot": lambda a, b: torch.stack([torch.dot(s, t) for s, t in zip(a, b, strict=True)]),
    "sum": lambda a, b: a.sum(0),
    "mean": lambda a, b: b.mean(1),
    "scatter_add": lambda a, b: torch.scatter_add(a, 0, torch.zeros(32, 32, dtype=int), b),
    "index_add": lambda a, b: torch.index_add(a, 0, torch.zeros(32, dtype=int), b),
    "index_put": lambda a, b: torch.index_put(a, (torch.zeros(32, dtype=int),), b, accumulate=True),
}
NO_SUM = {"a product of numbers": lambda a, b: a * b, "its root": lambda a, b: (a * a).sqrt()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", (*A_SUM, *NO_SUM))
def test_a_result_moves_by_what_the_module_says(name, dtype):
    """0.6 (u |t| + p (S - |t|)) in RMS; what is written in place, or a view, does not move."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, 32, generator=generator, dtype=torch.float64)
    run = {**A_SUM, **NO_SUM}[name]
    t, terms = run(a, b), run(a.abs(), b.abs())
    u = torch.finfo(dtype).eps / 2
    size = u * t.abs() + (min(u, 2**-24) * (terms - t.abs()) if name in A_SUM else 0)
    largest, rms = rounding_errors(lambda: {"t": run(a, b)}, {"t": t}, dtype)["t"]
    expected = 0.6 * size.square().mean().sqrt().item()
    assert expected < rms < (2 if name in ("mv", "dot") else 1.3) * expected  # cat moves too
    assert 2 * expected < largest < 0.6 * 5 * size.max().item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_terms_that_cancel_move_by_what_float32_does_to_their_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, 32, generator=generator, dtype=torch.float64)
    left, right = torch.cat([a, -a], 1), torch.cat([b, b])
    _, rms = rounding_errors(lambda: {"t": left @ right}, {"t": left @ right}, dtype)["t"]
    expected = 0.6 * 2**-24 * (left.abs() @ right.abs()).square().mean().sqrt()
    assert expected < rms < 1.3 * expected


# Elements, so that each of the eight draws is the largest once, and a ninth would be.
@pytest.mark.parametrize("n", (2, 3, 10, 13, 17, 19, 35, 44, 46))
def test_a_move_is_the_largest_of_eight_draws(n):
    """On the device that the results are on; tensors of another, or without elements, stay."""
    x = torch.ones(n, dtype=torch.float64)

    def run():
        with torch.device("meta"):
            assert torch.ones(5, dtype=torch.float64).is_meta
            return {"t": x * 1, "none": x[:0] * 1, "bad": x * torch.inf}

    draws = [
        torch.randn(n, generator=torch.Generator().manual_seed(0x5EED + seed), dtype=torch.float64)
        for seed in range(8)
    ]
    moved = rounding_errors(run, {"t": x, "none": x[:0], "bad": x * torch.inf}, torch.bfloat16)
    largest = max(draw.abs().max().item() for draw in draws)
    rms = max(draw.square().mean().sqrt().item() for draw in draws)
    expected = 0.6 * 2**-8 * largest, 0.6 * 2**-8 * rms
    assert moved == {"t": pytest.approx(expected, rel=1e-4), "none": (0, 0), "bad": (0, 0)}


@pytest.mark.parametrize("bend, smooth", ((0.6, True), (1.2, False)))
def test_what_does_not_move_in_proportion_is_at_a_kink(bend, smooth):
    """Its slopes on both sides differ by 2 bend / 256 of the larger."""
    x = torch.ones(2000, dtype=torch.float64)
    bent = lambda: (lambda y: {"t": y + bend / 256 * (y - x).abs()})(x * 1)  # noqa: E731
    moved = rounding_errors(bent, {"t": x}, torch.float32)["t"]
    assert (min(moved) > 0) is smooth


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan))
def test_a_move_without_end_counts_as_nothing(value):
    """Else it would be a bound that everything keeps."""
    exact = torch.tensor([1.0, 2.0]).double()
    moved = torch.tensor([value, 2.0]).double()
    errors = rounding_errors(lambda: {"t": moved}, {"t": exact}, torch.bfloat16)
    assert errors == {"t": (0, 0)}
