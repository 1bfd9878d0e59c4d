"""Adapters in gated_mlp and mlp: values, gradients, memory, FLOPs and errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp import Adapter, Lora, backend, gated_mlp, mlp, reference
from fusedmlp.packing import ORDERS
from fusedmlp.testing.memory import kept_bytes

M, D, H = 33, 16, 40
RANKS = {"gate": 3, "up": 5, "down": 40}
SUBSETS = [("gate", "up", "down"), ("gate",), ("up",), ("down",), ("up", "down")]


def drawn(names, dtype, device, seed=0, scales=None):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype)  # noqa: E731
    sizes = {"gate": (H, D), "up": (H, D), "down": (D, H)}
    made = {}
    for i, name in enumerate(names):
        out, width = sizes[name]
        scale = (scales or {}).get(name, 0.5 + i)
        made[name] = Adapter(draw(RANKS[name], width), draw(out, RANKS[name]), scale)
    return Lora(**made)


def block(plain, packed=None, bias=True, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype)  # noqa: E731
    x = draw(M, D) * D**0.5
    if plain:
        return (x, draw(H, D), draw(D, H), *((draw(H), draw(D)) if bias else (None, None)))
    n = 2 * H if packed else H
    up = None if packed else draw(H, D)
    b = (draw(n), None if packed else draw(H), draw(D)) if bias else (None,) * 3
    return (x, draw(n, D), up, draw(D, H), *b)


def run(fn, tensors, lora, frozen, dtype=None, **options):
    """y, and the gradients of x, of the adapters and, if not frozen, of the block."""
    cast = lambda t: t.detach().to(dtype or t.dtype)  # noqa: E731
    leaves = [t if t is None else cast(t).requires_grad_(i == 0 or not frozen)
              for i, t in enumerate(tensors)]  # fmt: skip
    own = Lora(*(p and Adapter(*(cast(t).requires_grad_() for t in p[:2]), p.scale) for p in lora))
    y = fn(*leaves, lora=own, **options)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    wanted += [t for p in own if p for t in p[:2]]
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def compare(fn, tensors, lora, frozen, tol, **options):
    ours = run(fn, tensors, lora, frozen, **options)
    options.pop("recompute", None)
    with backend("reference"):
        exact = run(fn, tensors, lora, frozen, torch.float64, **options)
    for got, want in zip(ours, exact, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < tol, float(error)


@pytest.mark.parametrize("plain", [False, True])
def test_the_formula_is_that_of_merged_weights(plain):
    tensors = block(plain, dtype=torch.float64)
    lora = drawn(("up", "down") if plain else RANKS, torch.float64, "cpu")
    merged = lambda w, p: w if p is None else w + p.scale * p.b @ p.a  # noqa: E731
    if plain:
        x, w_in, w_out, *b = tensors
        y = reference.mlp(x, merged(w_in, lora.up), merged(w_out, lora.down), *b)
        torch.testing.assert_close(mlp(*tensors, lora=lora), y)
        return
    x, w_gate, w_up, w_down, *b = tensors
    weights = (merged(w, p) for w, p in zip((w_gate, w_up, w_down), lora, strict=True))
    torch.testing.assert_close(gated_mlp(*tensors, lora=lora), reference.gated_mlp(x, *weights, *b))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gated_kernels(names, frozen, device, on_triton):
    compare(
        gated_mlp, block(False, device=device), drawn(names, torch.float32, device), frozen, 2e-6
    )


@pytest.mark.parametrize("names", [("up", "down"), ("up",), ("down",)], ids="+".join)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_plain_kernels(names, frozen, device, on_triton):
    compare(mlp, block(True, device=device), drawn(names, torch.float32, device), frozen, 2e-6)


@pytest.mark.parametrize("packed", ORDERS)
def test_packed_weights_take_adapters_of_either_half(packed, device, on_triton):
    for names in (("gate", "up", "down"), ("up",)):
        lora = drawn(names, torch.float32, device, scales={"gate": 2, "up": 2})
        compare(gated_mlp, block(False, packed, device=device), lora, False, 2e-6, packed=packed)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype, tol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_sixteen_bits_recompute_and_few_rows(plain, dtype, tol, device, on_triton):
    fn = mlp if plain else gated_mlp
    lora = drawn(("up", "down") if plain else RANKS, dtype, device)
    tensors = block(plain, bias=False, dtype=dtype, device=device)
    compare(fn, tensors, lora, True, tol, recompute=True)
    compare(fn, (tensors[0][:3], *tensors[1:]), lora, True, tol)


@pytest.mark.parametrize("plain", [False, True])
def test_frozen_weights_save_two_activations_less_than_the_block_unfused(plain, device, on_triton):
    fn = mlp if plain else gated_mlp
    lora = drawn(("up", "down") if plain else RANKS, torch.float32, device)
    tensors = block(plain, device=device)
    leaves = [tensors[0].requires_grad_(), *(t for p in lora if p for t in p[:2])]
    for t in leaves:
        t.requires_grad_()
    own = [t for t in (*tensors, *leaves) if t is not None]
    fused = kept_bytes(lambda: fn(*tensors, lora=lora), own)
    least = kept_bytes(lambda: fn(*tensors, lora=lora, recompute=True), own)
    ranks = sum(p.a.shape[0] for p in lora if p)
    assert fused == 4 * M * ((1 if plain else 2) * H + ranks)
    assert least == 4 * M * ranks
    with backend("reference"):
        unfused = kept_bytes(lambda: fn(*tensors, lora=lora), own)
    assert fused <= unfused - 4 * (1 if plain else 2) * M * H


def test_frozen_weights_cost_no_weight_gradient(device, on_triton):
    tensors, lora = block(False, bias=False, device=device), drawn(RANKS, torch.float32, device)

    def flops():
        with FlopCounterMode(display=False) as counter:
            run(gated_mlp, tensors, lora, True)
        return counter.get_total_flops()

    low = sum(2 * M * t.numel() for p in lora for t in p[:2])
    assert flops() == 2 * (3 * 2 * M * D * H) + 3 * low
    with backend("reference"):
        assert flops() == 2 * (3 * 2 * M * D * H) + 3 * low


def test_second_derivatives(device, on_triton):
    tensors, lora = block(False, device=device), drawn(("gate", "down"), torch.float32, device)
    x = tensors[0].requires_grad_()

    def penalty():
        y = gated_mlp(x, *tensors[1:], lora=lora)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    ours = penalty()
    with backend("reference"):
        torch.testing.assert_close(ours, penalty(), rtol=1e-4, atol=1e-4)


def test_autocast_casts_adapters_too():
    tensors, lora = block(False), drawn(RANKS, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_mlp(*tensors, lora=lora).dtype == torch.bfloat16


@pytest.mark.parametrize("plain", [False, True])
def test_compiled_code_is_whole(plain, device, on_triton):
    fn = mlp if plain else gated_mlp
    lora = drawn(("up", "down"), torch.float32, device)
    compiled = torch.compile(
        lambda *t, lora: fn(*t, lora=lora), backend="aot_eager", fullgraph=True
    )
    ours = run(compiled, block(plain, device=device), lora, True)
    for got, want in zip(ours, run(fn, block(plain, device=device), lora, True), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_code_takes_a_rank_that_it_does_not_know():
    """The second rank makes it a symbol."""
    fn = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    tensors = block(True)
    for rank in (3, 4, 5, 1):
        lora = Lora(up=Adapter(torch.randn(rank, D), torch.randn(H, rank)))
        torch.testing.assert_close(fn(*tensors, lora=lora), mlp(*tensors, lora=lora))
    with pytest.raises(Exception, match="with r from 1 to 256"):
        fn(*tensors, lora=Lora(up=Adapter(torch.randn(257, D), torch.randn(H, 257))))


A, B = torch.zeros(4, D), torch.zeros(H, 4)
BAD = {
    "rank 0": (Adapter(A[:0], B[:, :0]), ValueError, "lora.up.a must be .r, 16. with r from 1"),
    "rank 257": (Adapter(torch.zeros(257, D), B), ValueError, "lora.up.a .* 1 to 256, got shape"),
    "a's width": (Adapter(A[:, 1:], B), ValueError, r"lora.up.a must .* got shape \(4, 15\)"),
    "b's shape": (Adapter(A, B[1:]), ValueError, r"lora.up.b must be \(40, 4\)"),
    "dtype": (Adapter(A.double(), B), TypeError, "lora.up.a must have x's dtype torch.float32"),
    "device": (Adapter(A, B.to("meta")), ValueError, "lora.up.b must be on x's device cpu"),
    "no tensor": (Adapter(None, B), TypeError, "lora.up.a must be a Tensor, got NoneType"),
    "scale": (Adapter(A, B, A), TypeError, "lora.up.scale must be a number, got Tensor"),
    "no adapter": ((A, B), TypeError, "lora.up must be None or a fusedmlp.Adapter, got tuple"),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_errors_name_the_adapter(plain, bad):
    adapter, kind, text = BAD[bad]
    fn = mlp if plain else gated_mlp
    with pytest.raises(kind, match=f"^{fn.__name__}: {text}.*; "):
        fn(*block(plain), lora=Lora(up=adapter))


def test_a_plain_block_has_no_gate_and_lora_is_a_lora():
    with pytest.raises(ValueError, match="mlp: lora.gate must be None"):
        mlp(*block(True), lora=Lora(gate=Adapter(A, B)))
    with pytest.raises(
        TypeError, match="gated_mlp: lora must be None or a fusedmlp.Lora, got dict"
    ):
        gated_mlp(*block(False), lora={"up": Adapter(A, B)})


def test_the_cuda_kernels_say_that_they_have_no_adapters():
    from fusedmlp.backends.cuda import gated_linear as cuda, loader
    from fusedmlp.backends.cutlass import dense as cutlass

    x, w = A, torch.zeros(H, D)
    refused = {"match": "_fwd: .* no adapter .lora., got one"}
    for launchers, first in ((cuda, (None,)), (cutlass, ())):
        with pytest.raises(loader.Unfit, **refused):
            gated = (x, w, w, None, None, "silu", True, True, A, None, B, None)
            launchers.gated_linear_fwd(*first, *gated)
        with pytest.raises(loader.Unfit, **refused):
            launchers.linear_act_fwd(*first, x, w, None, "silu", True, True, A, B)


def test_the_table_of_bytes_and_flops(device, on_triton):
    """docs/dense.md: unfused, partly fused and fused, of a gated block with frozen weights."""
    x, *weights = block(False, bias=False, device=device)[:4]
    lora = drawn(RANKS, torch.float32, device)
    own = [x.requires_grad_(), *weights, *(t.requires_grad_() for p in lora for t in p[:2])]

    def called(act):
        def linear(t, w, p):
            return t @ w.t() + p.scale * (t @ p.a.t()) @ p.b.t()

        g, u = (linear(x, w, p) for w, p in zip(weights[:2], lora[:2], strict=True))
        return linear(act(g, u), weights[2], lora.down)

    ways = {
        4: lambda: called(lambda g, u: torch.nn.functional.silu(g) * u),
        3: lambda: called(fusedmlp.gated_act),
        2: lambda: gated_mlp(x, *weights, lora=lora),
    }
    ranks, counted = sum(RANKS.values()), set()
    for activations, call in ways.items():
        assert kept_bytes(call, own) == 4 * M * (activations * H + ranks)
        with FlopCounterMode(display=False) as counter:
            call().sum().backward()
        counted.add(counter.get_total_flops())
    low = sum(2 * M * t.numel() for p in lora for t in p[:2])
    assert counted == {12 * M * D * H + 3 * low}
