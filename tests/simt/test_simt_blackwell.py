"""The host SIMT runner's Blackwell: a GEMM by TMA and tcgen05, and the ways to get its choreography
wrong."""

import re

import pytest
import torch
from simt_build import ROOT, SEEDS, SimtError, empty, guarded, load

from fusedmlp.testing import assert_close_to, yardsticks

SOURCE = "tests/simt/examples/blackwell_gemm.cu"
FAULTS = re.search(r"enum Fault : int \{(.*?)\}", (ROOT / SOURCE).read_text(), re.S)[1]
FAULTS = re.findall(r"^\s*([A-Z_]+),", FAULTS, re.M)
M, N, K = 258, 136, 200  # two clusters and a part of a tile each way, and stages used twice


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, K, generator=generator).bfloat16() for n in (M, N)]


def run(operands, b_mn_major=False, cluster=1, fault="NONE", seed=0):
    a, b = operands
    c = empty(M, N, dtype=torch.float32)
    b = guarded(b.T.contiguous() if b_mn_major else b)
    load(SOURCE).run_blackwell_gemm(
        guarded(a), b, c, M, N, K, b_mn_major, cluster, FAULTS.index(fault), seed=seed
    )
    return c.tensor


def check(c, operands):
    a, b = (t.float() for t in operands)
    assert_close_to(c, *yardsticks(lambda t: t["a"] @ t["b"].T, {"a": a, "b": b})["out"])


@pytest.mark.parametrize("seed", (*SEEDS, 5, 6))
@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("b_mn_major", (False, True), ids=("k-major", "mn-major"))
def test_gemm(operands, b_mn_major, cluster, seed):
    check(run(operands, b_mn_major, cluster, seed=seed), operands)


# What the runner says in every order.
ALWAYS = {
    "NO_FENCE_AFTER": "tmem_load with no tcgen05_fence_after the barrier",
    "WRONG_LANES": "tmem_load of lane 0: warp 5 reaches those from 32 on|warp [67] reaches",
    "WRONG_SHAPE": "tcgen05_mma to columns that are not allocated",
    "WRONG_DESCRIPTOR": r"a matrix descriptor (without the 128-byte swizzle|that is not)",
    "NO_FREE": "the block has finished without tmem_free",
    "WRONG_FREE": "tmem_free of 64 columns at .*, which tmem_alloc has not given",
    "ALLOC_AFTER_PERMIT": "tmem_alloc after tmem_give_up_permit",
}
# What shows in the numbers where asynchronous operations are late.
WRONG = {"NO_FULL_WAIT", "EARLY_RELEASE", "NO_READY_WAIT", "NO_LOAD_WAIT"}


def test_every_fault_is_tested():
    assert {"NONE", *ALWAYS, *WRONG} == set(FAULTS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", ALWAYS)
def test_fault_is_found_in_every_order(operands, fault, seed):
    with pytest.raises(SimtError, match=ALWAYS[fault]):
        run(operands, cluster=2, fault=fault, seed=seed)


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("fault", sorted(WRONG))
def test_fault_is_found_by_the_numbers(operands, fault, cluster):
    with pytest.raises((SimtError, AssertionError)):
        check(run(operands, cluster=cluster, fault=fault), operands)
