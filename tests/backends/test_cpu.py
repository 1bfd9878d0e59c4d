"""What `auto` runs on CPU tensors, beside the formulas in whose place it stands."""

import itertools
import math
import os
from unittest import mock

import pytest
import torch
from op_checks import check
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp import layers, reference
from fusedmlp.backends.cpu import (
    binary as cpu_binary,
    grouped,
    hyper as cpu_hyper,
    masked as cpu_masked,
    memory,
    remade,
    routing as cpu_routing,
    trees,
)
from fusedmlp.backends.op import OPS
from fusedmlp.hyperglu import HyperGLU, HyperGLUConfig
from fusedmlp.packing import ORDERS
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.reference.masked import products as masked_formula
from fusedmlp.testing import CASES, floating
from fusedmlp.testing.memory import kept_bytes

SIZES = ((1, 40, 24), (19, 40, 24), (150, 136, 32))


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def both(call):
    """call() by `auto`, and by the formula."""
    made = []
    for name in ("auto", "reference"):
        with fusedmlp.backend(name):
            made.append(call())
    return made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_keeps_the_rule(name, size):
    """Results and first gradients of every op's every case, by the rule of the kernels."""
    check(CASES[name], CASES[name].inputs(*size, torch.float32))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.forward_only])
def test_second_derivatives(name):
    case = CASES[name]
    inputs = case.inputs(17, 24, 16, torch.float64)
    leaves = [t.requires_grad_() for n, t in inputs.items() if n not in case.draws]

    def call():
        first = torch.autograd.grad(case.run(inputs).square().sum(), leaves, create_graph=True)
        of = sum(g.square().sum() for g in first)
        return first + torch.autograd.grad(of, leaves, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(*both(call))


# What `auto` runs by functions of its own, each of which may be asked for one gradient alone.
OWN = ("gated_mlp", "mlp", "masked_gated_mlp", "masked_gated_linear", "moe_mlp", "moe_linear")
MADE = [name for name, case in CASES.items() if case.op in OWN and "recompute" not in name]


@pytest.mark.parametrize("name", MADE)
def test_each_gradient_alone(name):
    case = CASES[name]
    inputs = {k: t.detach() for k, t in case.inputs(17, 8, 16, torch.float64).items()}
    for alone in [k for k, t in inputs.items() if t.is_floating_point() and k not in case.draws]:
        leaf = inputs[alone].clone().requires_grad_()

        def call(alone=alone, leaf=leaf):
            out = case.run({**inputs, alone: leaf})
            return torch.autograd.grad(out.square().sum(), leaf, allow_unused=True)

        torch.testing.assert_close(*both(call), msg=lambda m, n=alone: f"d{n}: {m}")


BLOCKS = [name for name in MADE if not name.startswith("moe")]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_less_whatever_wants_a_gradient(name, monkeypatch):
    case, made = CASES[name], []
    act_down = remade.ActDownFunction.apply
    noted = lambda *arguments: made.append(1) or act_down(*arguments)  # noqa: E731
    monkeypatch.setattr(remade.ActDownFunction, "apply", noted)
    inputs = case.inputs(17, 8, 16, torch.float32)
    for of in (None, *floating(inputs)):
        case.run({k: t.detach().requires_grad_(k == of) for k, t in inputs.items()})
        assert len(made) == (of is not None), of
        made.clear()


@pytest.mark.parametrize("op, products", [("linear", 1), ("gated_linear", 2), ("gated_mlp", 3)])
def test_every_product_of_one_bit_goes_by_bytes(op, products, monkeypatch):
    case, made = CASES[f"binary_{op}"], []
    few = cpu_binary._few_rows
    noted = lambda *arguments: made.append(1) or few(*arguments)  # noqa: E731
    monkeypatch.setattr(cpu_binary, "_few_rows", noted)
    case.run(case.inputs(3, 128, 128, torch.float32))
    assert len(made) == products


def test_products_of_experts_lie_as_their_fake_says():
    """Rows of 24 bytes, which PyTorch's grouped product would pad."""
    ends = torch.tensor((0, 20, 40, 40), dtype=torch.int32)
    a, w = torch.randn(40, 8), torch.randn(2, 6, 8)
    y = grouped.product_op(a, w, ends)
    assert y.stride() == (6, 1)
    torch.testing.assert_close(y, torch.cat((a[:20] @ w[0].t(), a[20:] @ w[1].t())))
    assert grouped.outer_op(y, a, ends).stride() == (48, 8, 1)


@pytest.mark.parametrize("op", (grouped.product_op, grouped.outer_op), ids=("product", "outer"))
def test_products_of_experts_give_each_gradient_alone(op):
    ends = torch.tensor((0, 3, 5, 5), dtype=torch.int32)
    a, b = draw(5, 4), draw(2, 6, 4) if op is grouped.product_op else draw(5, 6)
    y = op(a, b, ends)
    dy = torch.randn_like(y)
    both = torch.autograd.grad(y, (a, b), dy)
    for i in range(2):
        alone = [t if k == i else t.detach() for k, t in enumerate((a, b))]
        made = torch.autograd.grad(op(*alone, ends), alone[i], dy)
        torch.testing.assert_close(made[0], both[i])


@pytest.mark.parametrize("packed", (False, True))
def test_masked_products_of_experts_give_each_gradient_alone(packed):
    """Three experts, one idle, and rows that none takes, whose results are 0."""
    E, n_m, H, D, ends = 3, 2, 5, 8, (0, 2, 2, 6, 7)
    a, w, logits = draw(7, D), draw(E, H, D), draw(E, n_m, H, D)
    bits = [fusedmlp.pack_masks(own.detach()) for own in logits]
    masks = torch.stack([own.planes for own in bits]) if packed else logits
    leaves = [a, w] if packed else [a, w, logits]

    def formula(a, w, masks):
        masks = [own.unpack() for own in bits] if packed else masks
        each = zip(a.split((2, 0, 4, 1)), w, masks, strict=False)
        made = [torch.stack(masked_formula(*of)) for of in each]
        return torch.cat((*made, w.new_zeros(1 + n_m, 1, H)), 1)

    offsets, dy = torch.tensor(ends, dtype=torch.int32), torch.randn(1 + n_m, 7, H).double()
    with FlopCounterMode(display=False) as counter:
        cpu_masked.masked_products(a, w, masks, offsets)
    assert counter.get_total_flops() == 2 * (1 + n_m) * 7 * H * D
    for wanted in (*([t] for t in leaves), leaves):
        own = [t if any(t is leaf for leaf in wanted) else t.detach() for t in (a, w, masks)]
        made = (cpu_masked.masked_products(*own, offsets), formula(*own))
        torch.testing.assert_close(*((y, *torch.autograd.grad(y, wanted, dy)) for y in made))


def forget():
    cpu_binary._signs.cache_clear()
    cpu_routing._place_of_one.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_a_default_device_changes_nothing(name):
    """Neither inside torch.device(...) nor, by what is kept, after it."""
    case = CASES[name]
    for rows in (1, 19):
        inputs = case.inputs(rows, 24, 16, torch.float32)
        with torch.no_grad():
            expected = case.run(inputs)
            forget()
            with torch.device("meta"):
                inside = case.run(inputs)
            torch.testing.assert_close((inside, case.run(inputs)), (expected, expected))


@pytest.mark.parametrize("gone", ("", "1", "2", "12"))
def test_a_step_of_hyper_attention_without_mixings(gone):
    case = CASES["hyper_attention_step"]
    inputs = case.inputs(1, 24, 16, torch.float64)
    kept = {k: t for k, t in inputs.items() if k[-1] not in gone or k in ("k", "v")}
    torch.testing.assert_close(*both(lambda: case.run(kept)))


def test_a_step_lies_as_its_fake_says():
    case = CASES["hyper_attention_step"]
    inputs = case.inputs(2, 24, 16, torch.float32)
    for name in ("k", "v"):
        inputs[name] = inputs[name].mT.contiguous().mT
    call, made = cpu_hyper.step, []

    def step(*arguments):
        torch.library.opcheck(call, arguments, test_utils="test_faketensor")
        made.append(call(*arguments))
        return made[-1]

    with mock.patch.object(cpu_hyper, "step", step):
        case.run(inputs)
    assert len(made) == 1


def test_a_walk_under_a_default_device():
    x, w = draw(3, 8, grad=False), draw(7, 8, grad=False)
    for rows in (1, 3):
        expected = trees.walk(x[:rows], w, None, 3)
        with torch.device("meta"):
            assert torch.equal(trees.walk(x[:rows], w, None, 3), expected)


def test_probabilities_wider_than_the_rows():
    case = CASES["moe_mlp-bias"]
    inputs = case.inputs(17, 24, 16, torch.bfloat16)
    inputs["prob"] = inputs["prob"].float()
    leaves = [inputs[name].requires_grad_() for name in ("x", "prob", "w_down")]

    def call():
        out = case.run(inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    for ours, formula in zip(*both(call), strict=True):
        assert (ours - formula).norm() < 2e-2 * formula.norm()


def test_trees_under_a_default_device():
    made = (layers.PathWeightedFFF(8, 8, 3), layers.FastFeedForward(8, 9))
    for layer in (m.eval() for m in made):
        for rows in (1, 40):
            x = draw(rows, 8, dtype=torch.float32, grad=False)
            with torch.no_grad():
                expected = layer(x)
                forget()
                with torch.device("meta"):
                    inside = layer(x)
                torch.testing.assert_close((inside, layer(x)), (expected, expected))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_program_routes_tokens_that_it_has_not_seen():
    seen, other = torch.tensor([[0.0, 5, 0, 0]]), torch.tensor([[9.0, 5, 0, 0]])
    packed = fusedmlp.quantize_binary(torch.randn(8, 128))
    x, y = torch.randn(2, 1, 128)
    for call, first, second in (
        (lambda t: fusedmlp.top1_route(t).offsets, seen, other),
        (lambda t: fusedmlp.route_to(t, torch.ones(1), 4).counts, *torch.tensor([[1], [0]])),
        (lambda t: fusedmlp.binary_linear(t, packed), x, y),
    ):
        traced = torch.jit.trace(call, (first,), check_trace=False)
        torch.testing.assert_close(traced(second), call(second))


def experts(E, D=8, H=12, dtype=torch.float64):
    return [draw(E, *s, dtype=dtype) for s in ((H, D), (H, D), (D, H))]


@pytest.mark.parametrize("capacity", (None, 1, 5))
@pytest.mark.parametrize("T, E, k", ((0, 3, 1), (1, 1, 1), (1, 7, 3), (9, 40, 1), (60, 4, 2)))
def test_experts_of_every_kind_of_routing(T, E, k, capacity):
    """Without tokens, of one expert, mostly idle, grouped; with indices that no expert has."""
    torch.manual_seed(T)
    x, prob, stacks = draw(T, 8), draw(T, k), experts(E)
    expert = torch.randint(-1, E + 1, (T, k))
    leaves = [x, prob, *stacks]

    def call():
        routing = fusedmlp.route_to(expert, prob, E, capacity=capacity)
        y = fusedmlp.moe_mlp(x, routing, *stacks)
        with torch.no_grad():
            again = fusedmlp.moe_mlp(x, routing, *stacks)
        return y, again, routing[:6], torch.autograd.grad(y.square().sum(), leaves)

    torch.testing.assert_close(*both(call))


@pytest.mark.parametrize("T", (1, 5))
def test_gradients_of_experts_alone_and_twice(T):
    """One tensor wants its gradient, and all want those of gradients; first choices are dropped."""
    x, prob, stacks = draw(T, 8), draw(T, 2), experts(4)
    biases = [draw(4, n) for n in (12, 12, 8)]
    expert = torch.randint(4, (T, 2)).index_fill(1, torch.tensor(0), 9)
    leaves = [x, prob, *stacks, *biases]

    def run(wanted):
        own = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
        routing = fusedmlp.route_to(expert, own[1], 4)
        return fusedmlp.moe_mlp(own[0], routing, *own[2:])

    def alone(i):
        return torch.autograd.grad(run({i}).square().sum(), leaves[i])

    def twice():
        y = run(range(len(leaves)))
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for i in range(len(leaves)):
        torch.testing.assert_close(*both(lambda i=i: alone(i)))
    torch.testing.assert_close(*both(twice))


def test_a_gradient_of_mostly_idle_experts_is_zeros_of_the_system():
    stacks = [w.float().detach().requires_grad_() for w in experts(512, 64, 128)]
    x, z = draw(3, 64, dtype=torch.float32), torch.randn(3, 512)

    def call():
        y = fusedmlp.moe_mlp(x, fusedmlp.top1_route(z), *stacks)
        return torch.autograd.grad(y.square().sum(), stacks)

    ours, theirs = both(call)
    torch.testing.assert_close(ours, theirs)
    idle = torch.ones(512, dtype=torch.bool).index_fill(0, z.argmax(-1), False)
    assert not any(g[idle].any() for g in ours)
    stacks[0].grad = ours[0]  # memory like any other's
    torch.optim.SGD(stacks[:1], lr=0.1).step()
    assert ours[0].nbytes < memory.MOST
    assert not ours[0].untyped_storage().resizable() and theirs[0].untyped_storage().resizable()


def test_compiled_experts_do_the_work_of_those_in_use():
    """The same products as eager, and no graph for each expert."""
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        calls.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    switch = layers.SwitchFFN(16, 32, ff_kwargs={"mult": 1, "glu_variant": "swiglu"}).eval()
    x = torch.randn(5, 16)
    with torch.no_grad():
        compiled = torch.compile(switch, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(compiled, switch(x))
    assert sum("experts_product" in call for call in calls) == 2  # gate and up are one
    assert sum("linear" in call for call in calls) == 1  # of the router


APART = {
    "logits": {"glu_variant": "mswiglu", "mask_mode": "element", "num_masks": 2, "bias": False},
    "bits": {"glu_variant": "mswiglu", "mask_mode": "element", "num_masks": 2, "bias": False},
    "channels": {"glu_variant": "mgeglu"},
    "gated dropout": {"glu_variant": "swiglu", "dropout": 1.0},
    "plain dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("kind", APART)
def test_experts_with_something_between_their_projections(kind):
    """Masked, and with dropout at work: results and derivatives are those of each expert by itself,
    and compiled code opens no expert."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    switch = layers.SwitchFFN(8, 6, ff_kwargs={"mult": 2, **APART[kind]}).double()
    if kind == "bits":
        fusedmlp.freeze_masks(switch)
    x = draw(7, 8)
    leaves = [x, *(p for p in switch.parameters())]
    outcome = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731

    def call(run=switch, twice=True):
        torch.manual_seed(1)
        y = outcome(run(x))
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=twice)
        if not twice:
            return y, first
        of = sum(g.square().sum() for g in first)
        again = torch.autograd.grad(of, leaves, allow_unused=True, materialize_grads=True)
        return y, first, again

    if kind != "plain dropout":  # whose draws are in another order
        torch.testing.assert_close(*both(call))
    calls = []

    def backend(graph, inputs):
        calls.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(switch, backend=backend, fullgraph=True)(x)
    assert sum("experts" in name for name in calls) == 2
    compiled = torch.compile(lambda t: outcome(switch(t)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(compiled, twice=False), call(twice=False)[:2])


def test_masked_experts_of_no_tokens_and_on_meta():
    switch = layers.SwitchFFN(8, 3, ff_kwargs=APART["logits"])
    y = switch(draw(0, 8, dtype=torch.float32))
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    assert not any(p.grad.any() for p in switch.experts.parameters())
    y = switch.to("meta")(torch.empty(5, 8, device="meta"))
    assert (y[0] if isinstance(y, tuple) else y).shape == (5, 8)


def test_gradients_may_be_batched():
    x, stacks, routing = draw(4, 8), experts(3), fusedmlp.top1_route(torch.randn(4, 3).double())
    y = fusedmlp.moe_mlp(x, routing, *stacks)
    ways = torch.randn(2, *y.shape, dtype=y.dtype)
    each = [torch.autograd.grad(y, stacks, way, retain_graph=True) for way in ways]
    together = torch.autograd.grad(y, stacks, ways, is_grads_batched=True)
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*each, strict=True))))


def test_flops_are_those_of_the_rows():
    x, stacks = draw(6, 8), experts(5)
    with FlopCounterMode(display=False) as counter:
        routing = fusedmlp.top1_route(torch.randn(6, 5))
        fusedmlp.moe_mlp(x, routing._replace(prob=routing.prob.double()), *stacks)
    assert counter.get_total_flops() == 2 * 6 * 3 * 8 * 12


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("row", ([1.0, 3, 3, 2], [0.0, float("nan"), 1, 2], [1, float("inf")],
                                 [float("-inf")] * 3, [5.0]))  # fmt: skip
def test_a_routing_of_one_token(row, dtype):
    z = torch.tensor([row], dtype=dtype, requires_grad=True)

    def call():
        routing = fusedmlp.top1_route(z)
        total = routing.prob.sum() + routing.mean_prob.square().sum() + routing.log_sum_exp.sum()
        with torch.no_grad():
            plain = fusedmlp.top1_route(z)
        return tuple(routing), tuple(plain), torch.autograd.grad(total, z)

    torch.testing.assert_close(*both(call), equal_nan=True)
    assert fusedmlp.top1_route(z).counts.is_contiguous()


@pytest.mark.parametrize("T", (1, 7))
def test_a_walk_finds_the_path(T):
    tree = layers.FastFeedForward(16, 5).eval()
    x = torch.randn(T, 16)
    own = tree.routers
    path = trees.walk(x, own.weight, own.bias, tree.depth)
    assert torch.equal(path, reference.tree_path(own(x), tree.depth))
    assert not trees.worth_a_walk(x, own.weight)
    assert trees.worth_a_walk(torch.empty(T, 4096), torch.empty(255, 4096)) or T > 1
    assert trees.worth_a_walk(torch.empty(256, 256), torch.empty(511, 256))


def test_a_large_tree_walks():
    tree = layers.FastFeedForward(1056, 9, mult=1 / 132).eval()
    assert trees.worth_a_walk(torch.empty(1, 1056), tree.routers.weight)
    for T in (1, 40):
        x = torch.randn(T, 1056)
        torch.testing.assert_close(*both(lambda x=x: tree(x)))


@pytest.mark.parametrize("biases", (True, False))
@pytest.mark.parametrize("T", (1, 6))
def test_a_path_of_weighted_nodes(T, biases):
    tree, x = layers.PathWeightedFFF(16, 3, 8).double(), draw(T, 16)
    if not biases:
        tree.b1s = tree.b2s = None
    leaves = [x, *tree.parameters()]

    def call():
        with torch.no_grad():
            plain = tree(x)
        y = tree(x)
        return plain, y, torch.autograd.grad(y.square().sum(), leaves)

    torch.testing.assert_close(*both(call))


@pytest.mark.parametrize("kind", ("glu", "relu"))
def test_a_step_reads_what_its_position_sees(kind):
    """What lies past it may be anything."""
    layer = HyperGLU(HyperGLUConfig(n_embd=16, n_head=2, block_size=24, attn_kind=kind)).eval()
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    _, cache = layer.prefill(x[:, :8])
    cache.k[:, :, 8:] = float("nan")
    cache.v[:, :, 8:] = float("nan")
    y, _ = layer.step(x[:, 8], cache)
    torch.testing.assert_close(y, expected[:, 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("D", (256, 200))
@pytest.mark.parametrize("rows", (0, 1, 2, 16, 17))
def test_one_bit_weights_by_bytes(rows, D, dtype):
    w = fusedmlp.quantize_binary(torch.randn(24, D), pad=D % 128 != 0)
    x, b = draw(rows, D, dtype=dtype, grad=False), draw(24, dtype=dtype, grad=False)
    torch.testing.assert_close(*both(lambda: fusedmlp.binary_linear(x, w, b)), atol=0.02, rtol=0.02)
    wide, exact = x.double(), w.dequantize(torch.float64)
    y = fusedmlp.binary_linear(wide, w)
    torch.testing.assert_close(y, wide @ exact.T)


def test_what_blocks_keep():
    """In units of M H: g and u; z; t and g_i. Compiled code keeps what its compiler chooses."""
    M, D, H = 64, 16, 32
    x, first, last, masks = draw(M, D), draw(H, D), draw(D, H), draw(4, H, D)
    unit = M * H * x.element_size()
    kept = lambda f, *t: kept_bytes(lambda: f(*t), t) / unit  # noqa: E731
    assert kept(fusedmlp.gated_mlp, x, first, draw(H, D), last) == 2
    assert kept(fusedmlp.mlp, x, first, last) == 1
    assert kept(fusedmlp.masked_gated_mlp, x, first, masks, last) == 5
    assert kept(fusedmlp.masked_gated_linear, x, first, masks) == 5
    with fusedmlp.backend("reference"):
        assert kept(fusedmlp.gated_mlp, x, first, draw(H, D), last) == 4
    routing = fusedmlp.top1_route(torch.randn(M, 3))  # every row has one expert
    routing = routing._replace(prob=draw(M))
    block = lambda *t: fusedmlp.moe_mlp(t[0], routing._replace(prob=t[1]), *t[2:])  # noqa: E731
    assert kept(block, x, routing.prob, *experts(3, D, H)) == 2


@pytest.mark.parametrize("name", CASES)
def test_flops_of_every_case_are_those_of_its_op(name):
    """Widths of which no two are alike."""
    case, size = CASES[name], (3, 40, 24)
    inputs = case.inputs(*size, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.run(inputs)
    assert counter.get_total_flops() == OPS[case.op].products(case.shapes(*size))


# Experts in use of 8, and the sizes of a gradient in float32: from 64 MiB on, or where those in use
# touch fewer than half of its pages of 2 MiB.
FROM_SYSTEM = [(1, 512, 512, True), (2, 512, 512, False), (1, 513, 256, True), (1, 512, 256, False),
               (8, 1024, 2048, True), (8, 1023, 2048, False)]  # fmt: skip


@pytest.mark.parametrize("used, K, N, expected", FROM_SYSTEM)
def test_which_gradients_are_zeros_of_the_system(used, K, N, expected, monkeypatch):
    fresh, calls = memory.zeros, []
    monkeypatch.setattr(memory, "zeros", lambda *a: calls.append(a) or fresh(*a))
    a, b = torch.randn(used, K), torch.randn(used, N)
    offsets = torch.arange(10, dtype=torch.int32).clamp(max=used)
    made = grouped.outer_of(a, b, offsets, grouped.busy(offsets.tolist()))
    assert bool(calls) == expected
    torch.testing.assert_close(made[:used], a.unsqueeze(2) * b.unsqueeze(1))
    assert made.shape == (8, K, N) and not made[used:].any()


def backward_of_large_stacks():
    """Gradients of 8 experts, one of them idle, of 2 MiB each."""
    torch.manual_seed(0)
    stacks = experts(8, 256, 256, torch.float32)
    x, routing = torch.randn(21, 256), fusedmlp.top1_route(torch.eye(8)[:7].repeat(3, 1))
    y = fusedmlp.moe_mlp(x, routing, *stacks)
    return lambda: list(torch.autograd.grad(y, stacks, torch.ones_like(y), retain_graph=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("columns", (511, 512))
def test_outer_products_of_few_rows(columns, dtype):
    """One by one or in one product, they are rounded no more than a product rounds: of bfloat16
    once, for 256 + 1 - 256 would else be 0."""
    rows = (1, 2, 3, 4, 5, *(0,) * 9, 6)  # too few for PyTorch's grouped product
    offsets = torch.tensor([0, *itertools.accumulate((*rows, 0))], dtype=torch.int32)
    a, b = (torch.randn(sum(rows), n).to(dtype) for n in (8, columns))
    a[3:6], b[3:6] = torch.tensor([[256.0], [1.0], [-256.0]]).to(dtype), 1  # of the third expert
    made = grouped.outer_of(a, b, offsets, grouped.busy(offsets.tolist()))
    parts = zip(a.double().split(rows), b.double().split(rows), strict=True)
    exact = torch.stack([own.T @ other for own, other in parts])
    assert torch.equal(made[2], torch.ones_like(made[2]))
    torch.testing.assert_close(made, exact.to(dtype))


def test_memory_of_a_gradient_is_lent_again_once_nobody_has_it():
    make = backward_of_large_stacks()
    grads = make()
    assert not any(g.untyped_storage().resizable() for g in grads)
    assert not any(g[7].any() for g in grads)
    kept, expected = grads[0].view(-1)[5:7].numpy(), [g.clone() for g in grads]
    where = [g.data_ptr() for g in grads]
    grads[0].fill_(3)
    for g in grads[1:]:
        g.fill_(float("nan"))  # as whoever has it may
    del g
    while grads:
        grads.pop()
    again = make()
    torch.testing.assert_close(again, expected)
    assert {g.data_ptr() for g in again} > set(where[1:])
    assert where[0] not in {g.data_ptr() for g in again} and (kept == 3).all()
    del kept
    more = make()  # while `again` lives
    assert where[0] in {g.data_ptr() for g in more}
    torch.testing.assert_close(again + more, 2 * expected)


def test_memory_of_a_gradient_is_not_shared_with_a_fork():
    t = memory.zeros(torch.empty(0), 8)
    if not (child := os.fork()):
        t[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not t.any()


def test_memory_of_gradients_is_kept_up_to_a_bound(monkeypatch):
    free = lambda: sum(len(pages) for own in memory._free.values() for pages in own)  # noqa: E731
    monkeypatch.setattr(memory, "_free", {})
    monkeypatch.setattr(memory, "MOST", 5 << 20)
    like, tensors = torch.empty(0), []
    for size in (2, 2, 3):
        tensors.append(memory.lent(like, size << 18)[0])
    assert not free()
    for expected in (3 << 20, 5 << 20, 2 << 20):  # the last is one too many, and is kept alone
        tensors.pop()
        assert free() == expected
    assert not memory.lent(like, 2 << 18)[1] and memory.lent(like, 1 << 18)[1]
    assert not memory._lent


FIRST = [(name, kind) for name, row in ACTIVATIONS.items()
         for kind in (*ORDERS, "apart", "plain") if kind != "plain" or row.up is None]  # fmt: skip


@pytest.mark.parametrize("name, kind", FIRST)
def test_gradients_of_experts_with_every_activation(name, kind):
    packed = kind if kind in ORDERS else None
    x, prob, (gate, up, down) = draw(5, 8), draw(5, 2), experts(4)
    first = (draw(4, 24, 8), None) if packed else (gate, up if kind == "apart" else None)
    leaves = [t for t in (x, prob, *first, down) if t is not None]

    def call():
        routing = fusedmlp.route_to(torch.arange(10).view(5, 2) % 3, prob, 4)
        y = fusedmlp.moe_mlp(x, routing, *first, down, activation=name, packed=packed)
        return y, torch.autograd.grad(y.square().sum(), leaves)

    torch.testing.assert_close(*both(call))


@pytest.mark.parametrize("turned", (True, False))
def test_a_gradient_of_experts_lies_as_its_weight(turned):
    shape = (3, 4, 6) if turned else (3, 6, 4)
    w = draw(*shape, grad=False)
    w = (w.mT if turned else w).requires_grad_()
    x, offsets = draw(5, 4), torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    y = grouped.product(x, w, offsets)
    expected = torch.cat([x[:2] @ w[0].T, x[2:] @ w[2].T])
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(t.square().sum(), (x, w)) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[1].stride() == w.stride()


@pytest.mark.parametrize("turned", (True, False))
def test_a_token_that_trains_one_stack(turned):
    """One tensor alone wants a gradient: it is laid out as the stack is, and 0 for idle experts."""
    stacks = [w.detach() for w in experts(4)]
    biases = [draw(4, n, grad=False) for n in (12, 12, 8)]
    own = [w.mT.contiguous().mT if turned else w for w in stacks] + biases
    x, expert = draw(1, 8, grad=False), torch.tensor([[2, 0, 2]])
    routing = fusedmlp.route_to(expert, torch.rand(1, 3).double(), 4)
    for i, one in enumerate(own):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(own)]
        made = both(lambda t=leaves: fusedmlp.moe_mlp(x, routing, *t))
        grads = [torch.autograd.grad(y.square().sum(), leaves[i])[0] for y in made]
        torch.testing.assert_close(*grads)
        assert grads[0].stride() == leaves[i].stride() == one.stride()
        assert not grads[0][1].any() and grads[0][2].any()


def test_one_bit_weights_are_read_as_bits_unless_their_scales_have_a_gradient(monkeypatch):
    calls, formula = [], reference.binary_linear
    monkeypatch.setattr(
        cpu_binary.reference, "binary_linear", lambda *a: calls.append(a) or formula(*a)
    )
    w, x = fusedmlp.quantize_binary(torch.randn(24, 128)), draw(2, 128, dtype=torch.float32)
    for wanted in (False, True):
        w.scales.requires_grad_(wanted)
        fusedmlp.binary_linear(x, w)
        assert bool(calls) == wanted


@pytest.mark.parametrize("name", [name for name in CASES if "lora" in name])
def test_what_blocks_with_adapters_keep(name):
    """As without: g and u, or z; and a x of each, (M, r)."""
    case, (M, D, H) = CASES[name], (64, 16, 32)
    inputs = case.inputs(M, D, H, torch.float32)
    for key, t in inputs.items():
        t.requires_grad_(key.endswith(("_a", "_b")) or key == "x")  # frozen weights
    ranks = sum(t.shape[0] for key, t in inputs.items() if key.endswith("_a"))
    recompute = {"recompute": False} if "recompute" in case.options else {}
    kept = lambda: kept_bytes(lambda: case.run(inputs, **recompute), inputs.values()) / (4 * M)  # noqa: E731
    assert kept() == (2 if case.gated else 1) * H + ranks
    # act(g), and h where an adapter reads it: nothing else does while w_down is frozen.
    more = case.gated + ("w_down_a" in inputs)
    with fusedmlp.backend("reference"):
        # A packed half beside a new one keeps both.
        assert kept() >= ((2 if case.gated else 1) + more) * H + ranks


def led(inputs, names, lead):
    return {n: t.view(*lead, *t.shape[1:]) if n in names else t for n, t in inputs.items()}


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.op.startswith("hyper")])
def test_leading_dimensions(name, backend):
    """Rows in a batch of sequences, one row, and a vector."""
    case = CASES[name]
    for lead in ((2, 3), (1, 1, 2, 1), (1,), ()):
        count = math.prod(lead)
        inputs = case.inputs(count, 24, 16, torch.float32)
        names = [n for n in ("x", "g", "u", "logits") if n in inputs]
        with fusedmlp.backend(backend), torch.no_grad():
            flat, made = case.run(inputs), case.run(led(inputs, names, lead))
        assert made.shape == (*(lead if names != ["logits"] else (count,)), *flat.shape[1:]), lead
        torch.testing.assert_close(made.view(flat.shape), flat)
