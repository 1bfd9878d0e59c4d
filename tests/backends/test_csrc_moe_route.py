"""csrc/moe_route.cu on the host SIMT runner, against the reference."""

import pytest
import torch
from simt_build import SEEDS, empty, guarded, in_out, load

from fusedmlp import reference

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Fewer experts than lanes, off 32, and more than threads; one chunk, several, a ragged last one.
SIZES = [(1, 1, 32), (70, 5, 32), (97, 40, 64), (40, 300, 32)]


@pytest.fixture(scope="module")
def kernels():
    return load("tests/simt/route.cu")


def run(kernels, logits, expert, E, chunk, capacity, seed):
    T = (logits if logits is not None else expert).shape[0]
    chunks = -(-T // chunk)
    ints = {n: empty(k, dtype=torch.int32) for n, k in
            (("tokens", T), ("rows", T), ("offsets", E + 2), ("counts", E))}  # fmt: skip
    scratch = [in_out(torch.zeros(T, dtype=torch.int32)), empty(chunks, E, dtype=torch.int32)]
    if logits is None:
        chosen = in_out(expert)
        prob = lse = mean = sums = None
        strides, dtype = (0, 0), 2
    else:
        chosen, prob = empty(T, dtype=torch.int64), empty(T, dtype=logits.dtype)
        lse, mean, sums = (empty(*n, dtype=torch.float32) for n in ((T,), (E,), (chunks, E)))
        strides, dtype = logits.stride(), DTYPES[logits.dtype]
    kernels.run_moe_route(
        None if logits is None else guarded(logits), chosen, prob, lse, mean, *ints.values(),
        *scratch, sums, T, E, *strides, chunk, capacity or T, dtype, seed=seed,
    )  # fmt: skip
    found = {"expert": chosen, **ints, "prob": prob, "mean_prob": mean, "log_sum_exp": lse}
    return {name: buffer.tensor for name, buffer in found.items() if buffer is not None}


def assert_same(found, expected):
    for name, t in found.items():
        other = getattr(expected, name)
        if t.is_floating_point():
            torch.testing.assert_close(t, other, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert t.dtype == other.dtype and torch.equal(t, other), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("capacity", (None, 3))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits(kernels, size, capacity, seed):
    T, E, chunk = size
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(T))
    logits[:, -1] = logits[:, 0]  # ties
    assert_same(run(kernels, logits, None, E, chunk, capacity, seed),
                reference.top1_route(logits, capacity))  # fmt: skip


@pytest.mark.parametrize("capacity", (None, 3))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_given_experts(kernels, size, capacity):
    T, E, chunk = size
    expert = torch.randint(-1, E + 1, (T,), generator=torch.Generator().manual_seed(T))
    expected = reference.route_to(expert, torch.ones(T), E, capacity)
    assert_same(run(kernels, None, expert, E, chunk, capacity, 0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_strides(kernels, dtype):
    logits = torch.randn(45, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = logits.t().contiguous().t()
    assert_same(run(kernels, logits, None, 12, 32, 5, 1), reference.top1_route(logits, 5))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_bad_logits_stay_in_their_token(kernels, bad):
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    logits[7, 3] = logits[9, 5] = bad
    found = run(kernels, logits, None, 6, 32, None, 2)
    expected = reference.top1_route(logits)
    # The kernels make NaN of an infinite logit, where logsumexp makes infinity.
    del found["log_sum_exp"]
    assert_same(found, expected)


@pytest.mark.parametrize(
    "at", ((3, 35), (35, 3), (64, 99), (5, 37, 69), (31, 32), (0, 96)), ids=str
)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 9.0))
def test_the_first_of_equals_wins_within_a_lane_and_across(kernels, value, at):
    """Lane l sees experts l, l + 32, ..: NaNs, infinities and ties at the largest."""
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    logits[1:3, list(at)] = value
    found = run(kernels, logits, None, 100, 32, None, 0)
    assert found["expert"][1:3].tolist() == [min(at)] * 2
    assert torch.equal(found["expert"], reference.top1_route(logits).expert)
