"""Stacked adapters in moe_mlp: values, gradients, routings, memory, FLOPs, errors, and PEFT's."""

import dataclasses

import pytest
import torch
from invariance import differing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusedmlp import (
    Adapter,
    Lora,
    backend,
    moe_mlp,
    reference,
    route_to,
    top1_route,
    topk_route,
)
from fusedmlp.packing import ORDERS, halves
from fusedmlp.testing import assert_close_to, compare as compare_by_rule
from fusedmlp.testing.memory import kept_bytes
from fusedmlp.testing.moe import experts_case

T, D, H, E = 21, 16, 24, 4
SIZES = {"gate": (H, D), "up": (H, D), "down": (D, H)}
RANKS = {"gate": 3, "up": 5, "down": 40}
ALL = tuple(SIZES)
SUBSETS = [ALL, ("gate",), ("up",), ("down",), ("up", "down")]
FLOAT32 = 3e-6  # of a tensor's norm; 16 bits below


def drawer(dtype, device, seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *s: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype)


def adapters(names=ALL, dtype=torch.float32, device="cpu", ranks=RANKS):
    draw = drawer(dtype, device, 0)
    return Lora(**{
        name: Adapter(draw(E, ranks[name], SIZES[name][1]), draw(E, SIZES[name][0], ranks[name]),
                      0.5 + i)
        for i, name in enumerate(names)
    })  # fmt: skip


def experts(dtype=torch.float32, device="cpu", packed=None, gated=True, bias=True, tokens=T):
    """x and the six tensors of the experts."""
    draw = drawer(dtype, device, 1)
    n = 2 * H if packed else H
    apart = gated and not packed
    weights = (draw(E, n, D), draw(E, H, D) if apart else None, draw(E, D, H))
    biases = (draw(E, n), draw(E, H) if apart else None, draw(E, D)) if bias else (None,) * 3
    return (draw(tokens, D) * D**0.5, *weights, *biases)


def expert_of(k, tokens=T, drop=False):
    """Expert 1 idle; with `drop` some choices of none."""
    g = torch.Generator().manual_seed(2)
    chosen = torch.tensor([0, 2, 3])[torch.rand(tokens, 3, generator=g).argsort(1)][:, :k]
    if drop:
        chosen[::3, 0] = -1
    return chosen


def leaf(t, dtype, grad):
    return t if t is None else t.detach().to(dtype or t.dtype).requires_grad_(grad)


def run(tensors, lora, expert, frozen=True, dtype=None, capacity=None, **options):
    """y, and gradients of x, prob, the adapters and, if not frozen, of the experts."""
    x, *weights = (leaf(t, dtype, i == 0 or not frozen) for i, t in enumerate(tensors))
    own = Lora(*(p and Adapter(*(leaf(t, dtype, True) for t in p[:2]), p.scale) for p in lora))
    prob = torch.linspace(0.2, 1, expert.numel(), device=x.device, dtype=x.dtype)
    prob = prob.view(expert.shape).requires_grad_()
    routing = route_to(expert.to(x.device), prob, E, capacity=capacity)
    y = moe_mlp(x, routing, *weights, lora=own, **options)
    wanted = [x, prob, *(t for p in own if p for t in p[:2])]
    wanted += [t for t in weights if t is not None and not frozen]
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def compare(tensors, lora, expert, tol=FLOAT32, **options):
    ours = run(tensors, lora, expert, **options)
    options.pop("recompute", None)
    with backend("reference"):
        exact = run(tensors, lora, expert, dtype=torch.float64, **options)
    for i, (got, want) in enumerate(zip(ours, exact, strict=True)):
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= tol * want.norm(), i


def merged(w, p):
    return w if p is None else w + p.scale * p.b @ p.a


@pytest.mark.parametrize("where", ["auto", "reference"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_formula_is_that_of_merged_weights(k, where):
    x, w_gate, w_up, w_down, *biases = experts(torch.float64)
    lora = adapters(dtype=torch.float64)
    routing = route_to(expert_of(k, drop=True), torch.rand(T, k).double(), E, capacity=9)
    weights = (merged(w, p) for w, p in zip((w_gate, w_up, w_down), lora, strict=True))
    expected = reference.moe_mlp(x, routing, *weights, *biases)
    with backend(where):
        y = moe_mlp(x, routing, w_gate, w_up, w_down, *biases, lora=lora)
        torch.testing.assert_close(y, expected)
        one = route_to(routing.expert[1:2], routing.prob[1:2], E)
        alone = moe_mlp(x[1:2], one, w_gate, w_up, w_down, *biases, lora=lora)
    if routing.kept[1].all():
        torch.testing.assert_close(alone, expected[1:2])


def test_reference_passes_gradcheck():
    x, *weights = experts(torch.float64, tokens=5)
    lora = adapters(dtype=torch.float64, ranks={"gate": 1, "up": 2, "down": 3})
    pairs = [t.requires_grad_() for p in lora for t in p[:2]]
    routing = route_to(expert_of(2, 5), torch.rand(5, 2).double(), E)

    def call(x, *pairs):
        own = (Adapter(a, b, 0.5) for a, b in zip(pairs[::2], pairs[1::2], strict=True))
        return reference.moe_mlp(x, routing, *weights, lora=Lora(*own))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *pairs))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("k, frozen", [(1, True), (1, False), (3, True)])
def test_kernels(names, k, frozen, device, on_triton):
    compare(experts(device=device), adapters(names, device=device), expert_of(k), frozen=frozen)


@pytest.mark.parametrize("names", [("gate", "down"), ("gate",), ("down",)], ids="+".join)
def test_plain_experts(names, device, on_triton):
    tensors = experts(device=device, gated=False)
    compare(tensors, adapters(names, device=device), expert_of(2), frozen=False, activation="gelu")


@pytest.mark.parametrize("packed", ORDERS)
def test_packed_weights_take_adapters_of_either_half(packed, device, on_triton):
    tensors = experts(device=device, packed=packed)
    for names in (ALL, ("up",)):
        compare(tensors, adapters(names, device=device), expert_of(2), frozen=False, packed=packed)


@pytest.mark.parametrize("k, capacity", [(1, None), (1, 4), (3, 5)])
def test_dropped_choices_and_idle_experts(k, capacity, device, on_triton):
    expert = expert_of(k, drop=True)
    compare(experts(device=device), adapters(device=device), expert, capacity=capacity)


@pytest.mark.parametrize("k", [1, 2])
def test_no_tokens_and_no_kept_choice(k, device, each_backend):
    for tokens in (0, 3):
        expert = torch.full((tokens, k), E)
        y, dx, _, *grads = run(experts(device=device, tokens=tokens), adapters(device=device),
                               expert)  # fmt: skip
        assert y.shape == dx.shape == (tokens, D) and not y.any() and not dx.any()
        assert len(grads) == 6 and not any(t.any() for t in grads)


@pytest.mark.parametrize("dtype, tol", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_sixteen_bits_and_recompute(dtype, tol, device, on_triton):
    tensors = experts(dtype, device, bias=False)
    compare(tensors, adapters(dtype=dtype, device=device), expert_of(2), tol, recompute=True)


def test_equal_ranks_take_one_pass_over_x(device, on_triton, launched):
    tensors = experts(device=device)
    for ranks, passes in (({"gate": 4, "up": 4}, 2), ({"gate": 4, "up": 5}, 3)):
        lora = adapters(("gate", "up"), device=device, ranks=ranks)
        compare(tensors, lora, expert_of(2))
        launched.clear()
        with torch.no_grad():
            moe_mlp(tensors[0], top1_route(tensors[0][:, :E]), *tensors[1:], lora=lora)
        assert launched.count("_up_kernel") == passes


def arguments_of(tensors, lora, k):
    """Leaves, a routing, and all memory that a call is given."""
    leaves = [tensors[0], *(t for p in lora if p for t in p[:2])]
    for t in leaves:
        t.requires_grad_()
    routing = topk_route(tensors[0].detach()[:, :E].contiguous(), k)
    given = [t for t in (*tensors, *leaves, *routing) if t is not None]
    return routing, given


@pytest.mark.parametrize("k", [1, 3])
def test_saved_bytes(k, device, on_triton):
    """g and u of k T rows and r values a rank; of the operations apart 2 H more a row."""
    tensors, lora = experts(device=device), adapters(device=device)
    routing, given = arguments_of(tensors, lora, k)
    call = lambda **how: moe_mlp(tensors[0], routing, *tensors[1:], lora=lora, **how)  # noqa: E731
    ranks = sum(RANKS.values())
    assert kept_bytes(call, given) == 4 * T * k * (2 * H + ranks)
    assert kept_bytes(lambda: call(recompute=True), given) == 4 * T * k * ranks
    with backend("reference"):
        assert kept_bytes(call, given) >= 4 * T * k * (4 * H + ranks)


@pytest.mark.parametrize("k", [1, 3])
def test_flops_have_no_gradient_of_a_frozen_weight(k, device, on_triton):
    tensors, lora = experts(bias=False, device=device), adapters(device=device)
    with FlopCounterMode(display=False) as counter:
        run(tensors, lora, expert_of(k))
    low = sum(2 * T * k * t[0].numel() for p in lora for t in p[:2])
    assert counter.get_total_flops() == 2 * (3 * 2 * T * k * D * H) + 3 * low


@pytest.mark.parametrize("wanted", range(6))
def test_each_adapter_tensor_alone(wanted, device, on_triton):
    tensors, lora, expert = experts(device=device), adapters(device=device), expert_of(2)
    every = run(tensors, lora, expert)[3:]
    pairs = [t.detach().requires_grad_(i == wanted) for i, t in
             enumerate(t for p in lora for t in p[:2])]  # fmt: skip
    own = Lora(*(Adapter(*pairs[2 * i : 2 * i + 2], p.scale) for i, p in enumerate(lora)))
    prob = torch.linspace(0.2, 1, expert.numel(), device=device).view(expert.shape)
    y = moe_mlp(tensors[0], route_to(expert.to(device), prob, E), *tensors[1:], lora=own)
    y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape))
    torch.testing.assert_close(pairs[wanted].grad, every[wanted])


@pytest.mark.parametrize("packed", (None, "gate_up"))
def test_each_tensor_of_the_experts_alone(packed, device, on_triton):
    tensors, expert = experts(device=device, packed=packed), expert_of(2)
    lora = adapters(device=device)
    every = run(tensors, lora, expert, frozen=False, packed=packed)[9:]
    prob = torch.linspace(0.2, 1, expert.numel(), device=device).view(expert.shape)
    routing = route_to(expert.to(device), prob, E)
    given = [i for i, t in enumerate(tensors) if i and t is not None]
    for wanted, expected in zip(given, every, strict=True):
        x, *own = (leaf(t, None, i == wanted) for i, t in enumerate(tensors))
        y = moe_mlp(x, routing, *own, lora=lora, packed=packed)
        dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
        (grad,) = torch.autograd.grad(y, own[wanted - 1], dy)
        torch.testing.assert_close(grad, expected)


def test_second_derivatives(device, on_triton):
    tensors, lora = experts(device=device), adapters(("gate", "down"), device=device)
    routing, _ = arguments_of(tensors, lora, 2)

    def penalty():
        y = moe_mlp(tensors[0], routing, *tensors[1:], lora=lora)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [tensors[0], lora.down.a])

    ours = penalty()
    with backend("reference"):
        for got, want in zip(ours, penalty(), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_autocast_casts_adapters_too(device, each_backend):
    tensors, lora = experts(device=device), adapters(device=device)
    with torch.autocast(device, torch.bfloat16):
        y, *grads = run(tensors, lora, expert_of(2))
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in grads)


@pytest.mark.parametrize("k", [1, 2])
def test_compiled_code_is_whole(k, device, each_backend):
    tensors, lora = experts(device=device), adapters(device=device)
    routing, _ = arguments_of(tensors, lora, k)
    wanted = [tensors[0], *(t for p in lora for t in p[:2])]

    def grads(fn):
        y = fn(tensors[0], routing, *tensors[1:], lora=lora)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    compiled = torch.compile(moe_mlp, backend="aot_eager", fullgraph=True)
    for got, want in zip(grads(compiled), grads(moe_mlp), strict=True):
        assert (got - want).norm() <= FLOAT32 * want.norm()


def test_two_runs_give_the_same_bits(device, on_triton):
    tensors, lora = experts(torch.bfloat16, device), adapters(dtype=torch.bfloat16, device=device)
    for a, b in zip(*(run(tensors, lora, expert_of(3)) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def with_adapters(case):
    """A case of moe_mlp whose inputs have adapters too."""

    def shapes(M, D, H):
        sizes = {"gate": (H, D), "up": (H, D), "down": (D, H)}
        low = {f"{n}_{part}": (E, RANKS[n], size[1]) if part == "a" else (E, size[0], RANKS[n])
               for n, size in sizes.items() for part in "ab"}  # fmt: skip
        return {**case.shapes(M, D, H), **low}

    def adapt(given, functions):
        lora = Lora(*(Adapter(given.pop(f"{n}_a"), given.pop(f"{n}_b"), 0.5) for n in SIZES))
        return {**case.adapt(given, functions), "lora": lora}

    return dataclasses.replace(case, shapes=shapes, adapt=adapt)


@pytest.mark.parametrize("k", [1, 2])
def test_rows_have_the_same_bits_in_any_batch(k, device, each_backend):
    case = with_adapters(experts_case("adapted", E, "skewed", k, bias=True))
    where = {"device": device, "wanted": ("x", "prob", "down_a")}
    assert differing(case, 40, 48, torch.float32, (2, 33), **where) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_are_of_eager_size(dtype, device, on_triton):
    """By the rule of every Case; rows off every block."""
    case = with_adapters(experts_case("adapted", E, "sparse", 2, bias=True, packed="up_gate"))
    for name, numbers in compare_by_rule(case, case.inputs(13, 19, 35, dtype, device)).items():
        assert_close_to(*numbers, name=name)


A, B = torch.zeros(E, 4, D), torch.zeros(E, H, 4)
BAD = {
    "rank 0": (Adapter(A[:, :0], B[..., :0]), ValueError, r"lora.up.a must be \(4, r, 16\) with r"),
    "not stacked": (Adapter(A[0], B[0]), ValueError, r"up.a must be \(4, r, 16\) .* got .*\(4, 16"),
    "experts": (Adapter(A[:3], B), ValueError, r"lora.up.a must .* got shape \(3, 4, 16\)"),
    "b's experts": (Adapter(A, B[:3]), ValueError, r"lora.up.b must be \(4, 24, 4\), .* \(3, 24"),
    "b's shape": (Adapter(A, B[:, 1:]), ValueError, r"up.b must be \(4, 24, 4\), \(4, out, r\) by"),
    "dtype": (Adapter(A.double(), B), TypeError, "lora.up.a must have x's dtype torch.float32"),
    "device": (Adapter(A, B.to("meta")), ValueError, "lora.up.b must be on x's device cpu"),
    "scale": (Adapter(A, B, A), TypeError, "lora.up.scale must be a number, got Tensor"),
    "no adapter": ((A, B), TypeError, "lora.up must be None or a fusedmlp.Adapter, got tuple"),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_name_the_adapter(bad):
    adapter, kind, text = BAD[bad]
    x, *weights = experts()
    with pytest.raises(kind, match=f"^moe_mlp: .*{text}.*; "):
        moe_mlp(x, top1_route(x[:, :E]), *weights, lora=Lora(up=adapter))


def test_plain_experts_have_no_up_and_lora_is_a_lora():
    x, *weights = experts(gated=False)
    with pytest.raises(ValueError, match="moe_mlp: lora.up must be None, for this block has no up"):
        moe_mlp(x, top1_route(x[:, :E]), *weights, lora=Lora(up=Adapter(A, B)))
    with pytest.raises(TypeError, match="moe_mlp: lora must be None or a fusedmlp.Lora, got dict"):
        moe_mlp(x, top1_route(x[:, :E]), *weights, lora={"up": Adapter(A, B)})


# ---- PEFT's target_parameters


class Experts(nn.Module):
    """As transformers has them: gate and up in one parameter, (E, out, in)."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * H, D, generator=g) / D**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, H, generator=g) / H**0.5)

    def forward(self, x, routing):
        return reference.moe_mlp(
            x, routing, self.gate_up_proj, None, self.down_proj, packed="gate_up"
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x, routing):
        return self.experts(x, routing)


def of_peft(layer, name="default"):
    """PEFT's adapter of stacked experts as a and b, views of its parameters."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return a.view(E, -1, a.shape[1]), b.view(len(b), -1, E).permute(2, 0, 1), layer.scaling[name]


@pytest.mark.parametrize("k", [1, 2])
def test_values_and_gradients_are_those_of_peft(k, device, each_backend):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_parameters=names, init_lora_weights=False,
                        target_modules=[])  # fmt: skip
    model = get_peft_model(Model().to(device), config)
    layers = {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name")}
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(T, D, device=device)
    routing = topk_route(torch.randn(T, E, device=device), k)

    a, b, scale = of_peft(layers["gate_up_proj"])
    gate, up = (Adapter(a, half, scale) for half in halves(b, "gate_up", 1))
    lora = Lora(gate, up, Adapter(*of_peft(layers["down_proj"])))
    base = layers["down_proj"].get_base_layer()
    y = moe_mlp(x, routing, base.gate_up_proj, None, base.down_proj, packed="gate_up", lora=lora)
    ours = [y, *torch.autograd.grad(y.square().sum(), trained)]
    theirs = model(x, routing)
    assert len(trained) == 4
    for got, want in zip(ours, [theirs, *torch.autograd.grad(theirs.square().sum(), trained)],
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
