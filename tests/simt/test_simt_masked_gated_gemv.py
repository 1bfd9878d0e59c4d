"""The CUDA kernel of masked_gated_linear for few rows, on the host SIMT runner."""

import pytest
import torch
from op_checks import unlike
from simt_build import FUNCTORS, SEEDS, chosen, empty, guarded, load

from fusedmlp import reference
from fusedmlp.testing import assert_close_to, yardsticks

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # as csrc/gated_linear.h numbers them


def draw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(x, w, masks, *, splits=1, activation="silu", seed=0):
    (M, D), (n_m, H, _) = x.shape, masks.shape
    h = empty(M, H, dtype=x.dtype)
    parts = empty(splits if splits > 1 else 0, 1 + n_m, M, H, dtype=torch.float32)
    load("csrc/masked_gated_gemv.cu").run_masked_gated_gemv(
        guarded(x), guarded(w), guarded(reference.pack_masks(masks)), h, parts,
        M, H, D, x.stride(0), w.stride(0), n_m, splits,
        *chosen(activation), DTYPES[x.dtype], seed=seed,
    )  # fmt: skip
    return h.tensor


def check(M, H, D, n_m, dtype, **options):
    x, w = draw(M, D, dtype=dtype), (draw(H, D) / D**0.5).to(dtype)
    masks = draw(n_m, H, D)
    activation = options.get("activation", "silu")
    known = yardsticks(
        lambda t: reference.masked_gated_linear(**t, masks=masks > 0, activation=activation),
        {"x": x, "w": w},
    )
    h = run(x, w, masks, **options)
    assert_close_to(h, *known["out"], name="h")
    return h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_m", (1, 2, 4, 8))
@pytest.mark.parametrize("M", (1, 2, 3))
def test_matches_reference(M, n_m, dtype):
    """H off the four rows of a warp and D off its 256 columns."""
    check(M, 21, 328, n_m, dtype)


@pytest.mark.parametrize("M", (5, 16))
def test_more_rows_than_a_warp_holds(M):
    check(M, 17, 264, 2, torch.bfloat16)


@pytest.mark.parametrize("splits", (2, 3, 7))
def test_parts_are_summed(splits):
    """Also where a part is empty: 5 octets in 7 parts."""
    check(2, 18, 40 if splits == 7 else 1032, 4, torch.bfloat16, splits=splits)


@pytest.mark.parametrize("activation", [*map(unlike, FUNCTORS)])
def test_every_activation(activation):
    check(1, 20, 264, 1, torch.float16, activation=activation)


def test_every_order_of_threads_gives_the_same_bits():
    results = [check(3, 9, 520, 2, torch.bfloat16, splits=2, seed=seed) for seed in SEEDS]
    assert all(torch.equal(results[0], result) for result in results)


def test_rows_apart():
    wide_x, wide_w = draw(3, 96, dtype=torch.float16), draw(10, 80, dtype=torch.float16)
    x, w, masks = wide_x[:, :72], wide_w[:, :72], draw(4, 10, 72)
    expected = run(x.contiguous(), w.contiguous(), masks)
    assert torch.equal(run(x, w, masks), expected)


def test_nan_stays_in_its_row():
    x, w, masks = (
        draw(3, 72, dtype=torch.float16),
        draw(10, 72, dtype=torch.float16),
        draw(2, 10, 72),
    )
    clean = run(x, w, masks)
    x[1, 5] = float("nan")
    dirty = run(x, w, masks)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
