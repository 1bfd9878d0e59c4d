"""Adapters of blocks whose weights are bits: one-bit weights, and masks over a frozen weight."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fusedmlp import (
    Adapter,
    Lora,
    backend,
    batch_invariant,
    binary_gated_mlp,
    gated_mlp,
    masked_gated_mlp,
    pack_masks,
    quantize_binary,
    reference,
)
from fusedmlp.testing.memory import kept_bytes

M, D, H = 19, 128, 72
SIZES = {"gate": (H, D), "up": (H, D), "down": (D, H)}
RANKS = {"gate": 3, "up": 5, "down": 8}
ALL = tuple(SIZES)
SUBSETS = [ALL, ("gate",), ("up",), ("down",)]
FLOAT32 = 3e-6


def drawer(dtype, device, seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *s: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype)


def adapters(names=ALL, dtype=torch.float32, device="cpu"):
    draw = drawer(dtype, device, 0)
    return Lora(**{
        name: Adapter(draw(RANKS[name], SIZES[name][1]), draw(SIZES[name][0], RANKS[name]), 0.5 + i)
        for i, name in enumerate(names)
    })  # fmt: skip


def one_bit(device="cpu"):
    draw = drawer(torch.float32, "cpu", 1)
    return [quantize_binary(draw(*size), pad=True).to(device) for size in SIZES.values()]


def binary(lora, x, biases, frozen=True, **how):
    return binary_gated_mlp(x, *one_bit(x.device), *biases, lora=lora, **how)


def masks(n_m):
    return torch.randn(n_m, H, D, generator=torch.Generator().manual_seed(4))


def masked(n_m):
    """By packed masks; w and w_down in x's dtype, and frozen."""

    def call(lora, x, biases, **how):
        draw = drawer(torch.float32, "cpu", 1)
        w, w_down = (t.to(x.device, x.dtype) for t in (draw(H, D), draw(D, H)))
        packed = pack_masks(masks(n_m).to(x.device))
        return masked_gated_mlp(x, w, packed, w_down, biases[2], lora=lora, **how)

    return call


BLOCKS = {"one-bit": binary, "1 mask": masked(1), "3 masks": masked(3)}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def leaves_of(dtype, device):
    draw = drawer(torch.float32, "cpu", 2)
    x, *biases = draw(M, D) * D**0.5, draw(H), draw(H), draw(D)
    return [t.to(device, dtype).requires_grad_() for t in (x, *biases)]


def run(block, lora, dtype=torch.float32, device="cpu", wide=None, **how):
    """y and the gradients of x, of b_down and of the adapters, of values rounded to `dtype`."""
    x, *biases = (t.detach().to(wide or dtype).requires_grad_() for t in leaves_of(dtype, device))
    pairs = [t.to(device, dtype).to(wide or dtype).requires_grad_() for p in lora if p
             for t in p[:2]]  # fmt: skip
    left = iter(pairs)
    own = Lora(*(p and Adapter(next(left), next(left), p.scale) for p in lora))
    y = block(own, x, biases, **how)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, biases[2], *pairs], dy)]


def compare(block, lora, tol=FLOAT32, **how):
    ours = run(block, lora, **how)
    how.pop("recompute", None)
    with backend("reference"):
        exact = run(block, lora, wide=torch.float64, **how)
    for i, (got, want) in enumerate(zip(ours, exact, strict=True)):
        assert (got.double() - want).norm() <= tol * want.norm(), i


def merged(w, adapter):
    return w if adapter is None else w + adapter.scale * adapter.b @ adapter.a


@pytest.mark.parametrize("where", ["auto", "reference"])
def test_one_bit_is_the_dequantised_weight_and_the_adapter(where):
    lora = adapters(dtype=torch.float64)
    x, *biases = leaves_of(torch.float64, "cpu")
    weights = [merged(w.dequantize(torch.float64), p)
               for w, p in zip(one_bit(), lora, strict=True)]  # fmt: skip
    with backend(where):
        torch.testing.assert_close(
            binary(lora, x, biases), reference.gated_mlp(x, *weights, *biases)
        )


@pytest.mark.parametrize("where", ["auto", "reference"])
def test_masked_adapters_add_to_both_factors_of_every_mask(where):
    lora = adapters(dtype=torch.float64)
    x, *biases = leaves_of(torch.float64, "cpu")
    w, w_down = (drawer(torch.float64, "cpu", s)(*SIZES[n]) for s, n in ((1, "up"), (2, "down")))
    gate, up, down = (p.scale * p.b @ p.a for p in lora)
    h = sum(F.silu(x @ (m * w + gate).T) * (x @ (~m * w + up).T) for m in masks(3) > 0)
    with backend(where):
        y = masked_gated_mlp(x, w, pack_masks(masks(3)), w_down, biases[2], lora=lora)
    torch.testing.assert_close(y, h @ (w_down + down).T + biases[2])


@every_block
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_kernels(block, names, device, on_triton):
    compare(block, adapters(names), device=device)


@every_block
@pytest.mark.parametrize("dtype, tol", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_sixteen_bits_and_recompute(block, dtype, tol, device, on_triton):
    compare(block, adapters(), tol, dtype=dtype, device=device, recompute=True)


def test_weights_beside_adapters_train_too(device, on_triton):
    """Scales of one bit, a masked weight and its logits, where they ask for a gradient."""
    lora, dy = adapters(device=device), torch.linspace(-1, 1, M * D, device=device).view(M, D)
    x, *biases = leaves_of(torch.float32, device)
    bits = one_bit(device)
    scales = [w.scales.requires_grad_() for w in bits]
    w, w_down = (drawer(torch.float32, device, s)(*SIZES[n]).requires_grad_()
                 for s, n in ((1, "up"), (2, "down")))  # fmt: skip
    logits = masks(2).to(device).requires_grad_()
    calls = (
        (lambda: binary_gated_mlp(x, *bits, *biases, lora=lora), [*scales, *biases]),
        (lambda: masked_gated_mlp(x, w, logits, w_down, lora=lora), [w, logits, w_down]),
    )
    for call, wanted in calls:
        ours = torch.autograd.grad(call(), wanted, dy)
        with backend("reference"):
            theirs = torch.autograd.grad(call(), wanted, dy)
        for got, want in zip(ours, theirs, strict=True):
            tol = 2e-3 if got.dtype == torch.float16 else FLOAT32
            assert (got - want).float().norm() <= tol * want.float().norm()


@every_block
def test_saved_bytes(block, device, on_triton):
    """g and u of each mask, h for the adapter of down, and r values a rank."""
    lora = adapters(device=device)
    x, *biases = leaves_of(torch.float32, device)
    pairs = [t.requires_grad_() for p in lora for t in p[:2]]
    given = [x, *biases, *pairs]
    bits = sum(t.nbytes for w in one_bit() for t in (w.qweight, w.scales))
    n_m = {"1 mask": 1, "3 masks": 3}.get(next(n for n, b in BLOCKS.items() if b is block), 1)
    own = bits if block is binary else 4 * 2 * H * D + pack_masks(masks(n_m)).planes.nbytes
    expected = 4 * M * ((2 * n_m + 1) * H + sum(RANKS.values()))
    assert kept_bytes(lambda: block(lora, x, biases), given) == own + expected
    least = kept_bytes(lambda: block(lora, x, biases, recompute=True), given)
    assert least == (0 if block is binary else own)  # a weight as the call was given it


def test_flops_have_no_gradient_of_bits(device, on_triton):
    lora = adapters()
    with FlopCounterMode(display=False) as counter:
        run(binary, lora, device=device)
    low = sum(2 * M * t.numel() for p in lora for t in p[:2])
    assert counter.get_total_flops() == 2 * (3 * 2 * M * D * H) + 3 * low


@every_block
def test_second_derivatives(block, device, on_triton):
    lora = adapters(("gate", "down"), device=device)
    x, *biases = leaves_of(torch.float32, device)
    lora.gate.a.requires_grad_()

    def penalty():
        (dx,) = torch.autograd.grad(block(lora, x, biases).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, lora.gate.a])

    ours = penalty()
    with backend("reference"):
        for got, want in zip(ours, penalty(), strict=True):
            assert (got - want).norm() <= 2e-5 * want.norm()


@every_block
def test_autocast_casts_adapters_too(block, device, each_backend):
    with torch.autocast(device, torch.bfloat16):
        y, *grads = run(block, adapters(), device=device)
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in grads)


@every_block
def test_compiled_code_is_whole(block, device, on_triton):
    bits, planes = one_bit(device), pack_masks(masks(2).to(device))
    draw = drawer(torch.float32, device, 1)
    w, w_down = draw(H, D), draw(D, H)

    def call(lora, x, biases):
        if block is binary:
            return binary_gated_mlp(x, *bits, *biases, lora=lora)
        return masked_gated_mlp(x, w, planes, w_down, biases[2], lora=lora)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    lora = adapters()
    for got, want in zip(
        run(compiled, lora, device=device), run(call, lora, device=device), strict=True
    ):
        torch.testing.assert_close(got, want)


@every_block
def test_no_rows(block, device, each_backend):
    lora = adapters(device=device)
    pairs = [t.requires_grad_() for p in lora for t in p[:2]]
    x = torch.zeros(0, D, device=device, requires_grad=True)
    y = block(lora, x, [None] * 3)
    grads = torch.autograd.grad(y.sum(), [x, *pairs])
    assert y.shape == (0, D) and not any(t.any() for t in grads)


@every_block
def test_batch_invariance_is_refused_by_the_kernels(block, device, on_triton):
    x, *biases = leaves_of(torch.float32, device)
    lora, name = adapters(device=device), "binary" if block is binary else "masked"
    with batch_invariant():
        with pytest.raises(RuntimeError, match=f"^{name}_gated_mlp: lora must be None inside"):
            block(lora, x, biases)
        with backend("reference"):
            among = block(lora, x, biases)
            assert torch.equal(block(lora, x[3:4], biases)[0], among[3])


A, B = torch.zeros(4, D), torch.zeros(H, 4)
BAD = {
    "rank 0": (Adapter(A[:0], B[:, :0]), ValueError, "lora.up.a must be .r, 128. with r from 1"),
    "b's shape": (Adapter(A, B[1:]), ValueError, r"lora.up.b must be \(72, 4\)"),
    "dtype": (Adapter(A.double(), B), TypeError, "lora.up.a must have x's dtype torch.float32"),
    "one half": (Adapter(A, None), TypeError, "lora.up.b must be a Tensor, got NoneType"),
    "no adapter": ((A, B), TypeError, "lora.up must be None or a fusedmlp.Adapter, got tuple"),
}


@every_block
@pytest.mark.parametrize("bad", BAD)
def test_errors_name_the_adapter(block, bad):
    adapter, kind, text = BAD[bad]
    x, *biases = leaves_of(torch.float32, "cpu")
    name = "binary" if block is binary else "masked"
    with pytest.raises(kind, match=f"^{name}_gated_mlp: {text}.*; "):
        block(Lora(up=adapter), x, biases)


def test_adapters_on_one_bit_learn_as_on_the_dequantised_weight(device, each_backend):
    """Six steps: the same losses, which fall, and bits that stay."""
    weights = one_bit(device)
    before = [w.qweight.clone() for w in weights]
    draw = drawer(torch.float32, device, 5)
    x, target = draw(64, D) * D**0.5, draw(64, D)

    def losses(block):
        lora = adapters(device=device)
        pairs = [t.detach().clone().requires_grad_() for p in lora for t in p[:2]]
        own = Lora(*(Adapter(*pairs[2 * i : 2 * i + 2], 0.5) for i in range(3)))
        optimizer, seen = torch.optim.SGD(pairs, 0.5), []
        for _ in range(6):
            loss = (block(own) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    ours = losses(lambda lora: binary_gated_mlp(x, *weights, lora=lora))
    dense = [w.dequantize(torch.float32) for w in weights]
    theirs = losses(lambda lora: gated_mlp(x, *dense, lora=lora))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(after < 0.999 * first for first, after in zip(ours, ours[1:], strict=False))
    assert all(map(torch.equal, before, (w.qweight for w in weights)))
