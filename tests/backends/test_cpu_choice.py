"""Which way `auto` goes on CPU tensors: at the boundary of each rule, told by who is called."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp import reference
from fusedmlp.backends.cpu import (
    binary,
    eager,
    experts,
    grouped,
    hyper,
    remade,
    routing,
    traced,
    trees,
)
from fusedmlp.ops.tree_path import tree_path
from fusedmlp.testing import CASES


def spied(monkeypatch, module, name):
    """The calls of module.name from now on."""
    calls, own = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(a) or own(*a, **k))
    return calls


def draw(*shape, grad=False):
    return torch.randn(shape, requires_grad=grad)


def route(rows, k):
    return fusedmlp.route_to(torch.zeros(rows, k, dtype=torch.int64), torch.ones(rows, k), 2)


def of_case(name, rows, grad=False):
    """A call of a case; with `grad`, of its first argument."""
    case = CASES[name]
    inputs = case.inputs(rows, 24, 16, torch.float32)
    first = next(iter(inputs))
    inputs = {k: t.detach().requires_grad_(grad and k == first) for k, t in inputs.items()}
    return case.run(inputs)


BITS = fusedmlp.quantize_binary(torch.randn(4, 128))
# What is asked, and whether the function of backends/cpu is called, which the last two name.
WAYS = [
    (lambda: fusedmlp.top1_route(draw(1, 3)), True, routing, "top1_route_one"),
    (lambda: fusedmlp.top1_route(draw(2, 3)), False, routing, "top1_route_one"),
    (lambda: route(32, 1), True, routing, "route_few"),
    (lambda: route(16, 2), True, routing, "route_few"),
    (lambda: route(33, 1), False, routing, "route_few"),
    (lambda: tree_path(draw(1, 7), depth=2), True, trees, "path_of_one"),
    (lambda: tree_path(draw(2, 7), depth=2), False, trees, "path_of_one"),
    (lambda: of_case("hyper_attention_step", 3), True, hyper, "step"),
    (lambda: of_case("hyper_attention_step", 3, True), False, hyper, "step"),
    (lambda: of_case("moe_mlp", 3), True, experts, "moe_mlp"),
    (lambda: of_case("moe_mlp", 3), False, traced, "moe_mlp"),
    (lambda: of_case("moe_linear", 3), True, traced, "moe_linear"),
    *((lambda rows=rows, grad=grad: fusedmlp.binary_linear(draw(rows, 128, grad=grad), BITS),
       rows <= 16 and not grad, binary, "_few_rows")
      for rows in (1, 16, 17) for grad in (False, True)),
    *((lambda rows=rows, grad=grad, name=name: of_case(name, rows, grad), rows >= 16 and grad,
       remade, "_block")
      for name in ("gated_mlp", "mlp", "masked_gated_mlp-1", "masked_gated_linear-1")
      for rows in (15, 16) for grad in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_who_is_called(way, monkeypatch):
    """By `auto`, and never by a reference that was asked for."""
    call, expected, module, name = WAYS[way]
    calls = spied(monkeypatch, module, name)
    call()
    assert bool(calls) == expected
    calls.clear()
    with fusedmlp.backend("reference"):
        call()
    assert not calls


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def test_whose_values_may_be_read():
    plain = torch.ones(2)
    assert eager.readable(plain) and not eager.readable(plain.to("meta"))
    assert not eager.readable(plain.as_subclass(Own))
    assert not eager.readable(torch.nn.Parameter(plain))
    with Nothing():
        assert not eager.readable(plain)


def test_what_needs_a_gradient():
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    cases = [((), False), ((None,), False), ((plain, None), False), ((None, leaf), True),
             ((plain, leaf), True), ((leaf, plain), True)]  # fmt: skip
    for tensors, expected in cases:
        assert eager.needs_grad(*tensors) == expected
        with torch.no_grad():
            assert not eager.needs_grad(*tensors)


@pytest.mark.parametrize(
    "T, N, D, expected",
    [(1, 128, 4096, True), (1, 127, 4128, False), (1, 3, 1 << 18, True), (2, 127, 16514, True),
     (2, 127, 16512, False), (2, 126, 1 << 20, False), (1024, 128, 32, True)],
)  # fmt: skip
def test_which_trees_are_worth_a_walk(T, N, D, expected):
    x, w = (torch.ones(1).expand(rows, D) for rows in (T, N))
    assert trees.worth_a_walk(x, w) == expected
    assert not trees.worth_a_walk(x.to("meta"), w)
    with torch.autocast("cpu", torch.bfloat16):
        assert not trees.worth_a_walk(x, w)


# Sizes and strides of float32 matrices, and whether PyTorch's grouped product takes them.
STRIDES = [
    ((2, 5, 8), (40, 8, 1), True), ((2, 8, 5), (40, 1, 8), True), ((2, 5, 6), (30, 6, 1), False),
    ((2, 5, 6), (40, 8, 1), True), ((2, 5, 8), (40, 4, 1), False), ((2, 5, 4), (40, 8, 2), False),
    ((2, 5, 8), (0, 8, 1), True), ((5, 8), (8, 1), True), ((8, 5), (1, 8), True),
    ((8, 5), (1, 7), False), ((8, 5), (1, 4), False), ((1, 8), (1, 1), False),
]  # fmt: skip


@pytest.mark.parametrize("size, strides, expected", STRIDES)
def test_which_strides_the_grouped_product_takes(size, strides, expected):
    t = torch.zeros(math.prod(size) * 4).as_strided(size, strides)
    assert grouped._fits(t) == expected


@pytest.mark.parametrize(
    "dtype, rows, columns, expected",
    [(torch.float32, 6, 8, True), (torch.float32, 5, 8, False), (torch.float32, 6, 6, False),
     (torch.bfloat16, 6, 8, True), (torch.float16, 6, 8, True), (torch.bfloat16, 6, 4, False),
     (torch.float64, 6, 8, False)],
)  # fmt: skip
def test_which_products_are_grouped(dtype, rows, columns, expected):
    """With three experts: from two rows each on, in a dtype and rows of 16 bytes that it takes."""
    a, w = torch.zeros(rows, 8, dtype=dtype), torch.zeros(3, 8, columns, dtype=dtype)
    assert grouped._by_groups(3, rows, a, w) == expected


@pytest.mark.parametrize("capacity", (None, 1, 2, 3))
@pytest.mark.parametrize("k", (1, 2))
def test_a_few_choices_of_experts_that_are_and_are_not(k, capacity):
    """Each index from two before the first to two past the last, once and three times."""
    for times in (1, 3):
        expert = torch.arange(-2, 6).repeat(times).roll(3).view(-1, k)
        made = fusedmlp.route_to(expert, torch.ones(expert.shape), 4, capacity=capacity)
        exact = reference.route_to(expert, torch.ones(expert.shape), 4, capacity)
        for name, t in exact._asdict().items():
            assert getattr(made, name) is t or torch.equal(getattr(made, name), t), name
