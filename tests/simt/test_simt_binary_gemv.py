"""The CUDA kernel of one-bit weights for few rows, on the host SIMT runner."""

import pytest
import torch
from op_checks import unlike
from simt_build import FUNCTORS, SEEDS, chosen, empty, faulty, guarded, load

from fusedmlp import quantize_binary, reference
from fusedmlp.reference.activations import ACTIVATIONS
from fusedmlp.testing import assert_close_to, yardsticks

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # as csrc/gated_linear.h numbers them


def draw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(x, weights, biases, *, splits=1, activation="silu", seed=0, kernels=None):
    """weights: one BinaryWeight, or gate and up; biases: as many, or none."""
    kernels = kernels or load("csrc/binary_gemv.cu")
    (M, D), H, count = x.shape, weights[0].shape[0], len(weights)
    h = empty(M, H, dtype=x.dtype)
    parts = empty(splits if splits > 1 else 0, count, M, H, dtype=torch.float32)
    planes = [guarded(t) for w in weights for t in (w.qweight, w.scales)]
    added = [guarded(b) for b in biases]
    kernels.run_binary_gemv(
        guarded(x), *planes, *[None] * (4 - len(planes)), *added, *[None] * (2 - len(added)),
        h, parts, M, H, D, x.stride(0), splits, *chosen(activation),
        DTYPES[x.dtype], seed=seed,
    )  # fmt: skip
    return h.tensor


def check(M, H, D, dtype, *, gated=True, bias=False, **options):
    x, count = draw(M, D, dtype=dtype), 2 if gated else 1
    weights = [quantize_binary(draw(H, D + 128 * i)[:, :D] / D**0.5) for i in range(count)]
    biases = [draw(H + i, dtype=dtype)[:H] for i in range(count)] if bias else []
    h = run(x, weights, biases, **options)
    activation = options.get("activation", "silu")

    def formula(t):
        products = [
            reference.binary_linear(t["x"], w.qweight, w.scales.to(t["x"].dtype), t.get(f"b{i}"))
            for i, w in enumerate(weights)
        ]
        if gated:
            return reference.gated_act(*products, activation)
        return ACTIVATIONS[activation].reference(products[0])

    inputs = {"x": x, **{f"b{i}": b for i, b in enumerate(biases)}}
    assert_close_to(h, *yardsticks(formula, inputs)["out"], name="h")
    return h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
@pytest.mark.parametrize("M", (1, 7, 9, 16))
def test_matches_reference(M, gated, dtype):
    """H off the 16 rows of a tile, D off the four groups staged at a time."""
    check(M, 37, 640, dtype, gated=gated, bias=M == 7)


def test_more_than_one_block():
    check(2, 150, 128, torch.bfloat16, gated=False)


@pytest.mark.parametrize("splits", (2, 3, 7))
@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
def test_parts_are_summed(gated, splits):
    """Also where a part is empty: 5 groups in 7 parts."""
    check(3, 18, 640, torch.bfloat16, gated=gated, bias=True, splits=splits)


@pytest.mark.parametrize("activation", [*map(unlike, FUNCTORS)])
def test_every_activation(activation):
    check(1, 20, 128, torch.float16, activation=activation)


def test_every_order_of_threads_gives_the_same_bits():
    """Each part takes two rounds of four groups."""
    results = [check(3, 70, 2048, torch.bfloat16, splits=2, seed=seed) for seed in SEEDS]
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("rounds", (2, 3))
def test_a_missing_barrier_at_the_end_of_a_round_is_found(rounds, tmp_path):
    """One warp has staged the next round's x before another has multiplied with this one's."""
    right = "    __syncthreads();\n  }\n  const int lane"
    kernels = faulty("csrc/binary_gemv.cu", right, "  }\n  const int lane", tmp_path)
    x = draw(3, 512 * rounds, dtype=torch.bfloat16)
    weights = [quantize_binary(draw(70, 512 * rounds + 128 * i)[:, : 512 * rounds]) for i in (0, 1)]
    expected = run(x, weights, [])
    found = [run(x, weights, [], seed=seed, kernels=kernels) for seed in SEEDS]
    assert not all(torch.equal(expected, h) for h in found)


def test_rows_apart():
    wide, w = draw(3, 264, dtype=torch.float16), [quantize_binary(draw(10, 256))]
    x = wide[:, :256]
    assert torch.equal(run(x, w, []), run(x.contiguous(), w, []))


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_bad_rows_stay_in_their_rows(bad):
    x, w = draw(3, 256, dtype=torch.float16), [quantize_binary(draw(10, 256)) for _ in range(2)]
    clean = run(x, w, [])
    x[1, 5] = bad
    dirty = run(x, w, [])
    assert not dirty[1].isfinite().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def test_one_bit_at_a_time():
    """Each x alone meets the signs of its own column."""
    signs = torch.where(draw(20, 128) >= 0, 1.0, -1.0)
    for rows in torch.eye(128, dtype=torch.float16).split(16):
        h = run(rows, [quantize_binary(signs)], [], activation="identity")
        assert torch.equal(h, (rows.float() @ signs.t().float()).half())
