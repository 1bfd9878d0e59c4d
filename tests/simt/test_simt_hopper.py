"""The host SIMT runner's Hopper: a GEMM by TMA and wgmma, and the ways to get its choreography
wrong."""

import re

import pytest
import torch
from simt_build import ROOT, SEEDS, SimtError, empty, guarded, load

from fusedmlp.testing import assert_close_to, yardsticks

SOURCE = "tests/simt/examples/hopper_gemm.cu"
FAULTS = re.search(r"enum Fault : int \{(.*?)\}", (ROOT / SOURCE).read_text(), re.S)[1]
FAULTS = re.findall(r"^\s*([A-Z_]+),", FAULTS, re.M)
M, N, K = 130, 136, 200  # two clusters and a part of a tile each way, and stages used twice


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, K, generator=generator).bfloat16() for n in (M, N)]


def run(operands, b_mn_major=False, cluster=1, fault="NONE", seed=0):
    a, b = operands
    c = empty(M, N, dtype=torch.bfloat16)
    b = guarded(b.T.contiguous() if b_mn_major else b)
    load(SOURCE).run_hopper_gemm(
        guarded(a), b, c, M, N, K, b_mn_major, cluster, FAULTS.index(fault), seed=seed
    )
    return c.tensor


def check(c, operands):
    a, b = operands
    assert_close_to(c, *yardsticks(lambda t: t["a"] @ t["b"].T, {"a": a, "b": b})["out"])


@pytest.mark.parametrize("seed", (*SEEDS, 5, 6))
@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("b_mn_major", (False, True), ids=("k-major", "mn-major"))
def test_gemm(operands, b_mn_major, cluster, seed):
    check(run(operands, b_mn_major, cluster, seed=seed), operands)


# What the runner says in every order.
ALWAYS = {
    "NO_WGMMA_FENCE": "wgmma before the first wgmma_fence",
    "WRONG_PARITY": r"deadlock\n.*barrier_wait \(parity 0; . of . arrivals and 0 bytes",
    "NO_INIT_FENCE": "no barrier_init_fence since the mbarrier's initialisation",
    "DOUBLE_INIT": r"hopper_gemm.cu:\d+: the mbarrier is initialised already",
    "OVERWRITTEN_BARRIER": "the mbarrier has been overwritten",
    "UNALIGNED_DESCRIPTOR": "its first row is not at a multiple of 1024 bytes",
    "NO_STORE_FENCE": "with no fence_async_shared since",
    "PHASE_AHEAD": "passed before its first phase had completed|deadlock",
    "SHORT_EXPECT": r"deadlock\n.*barrier_wait \(",
}
# What it says in seed 0's order, where asynchronous operations are late.
LATE = {
    "NO_EMPTY_WAIT": "more than the 1 arrivals of an mbarrier's phase",
    "EARLY_STAGING": "shared memory was overwritten before the store had read it",
    "NO_STORE_WAIT": "was still in flight when its block had finished",
    "NO_CLUSTER_END": "block 1 of the cluster has finished",
}
# What shows in the numbers.
WRONG = {"NO_FULL_WAIT", "EARLY_RELEASE", "NO_WGMMA_WAIT", "WRONG_DESCRIPTOR"}


def test_every_fault_is_tested():
    assert {"NONE", *ALWAYS, *LATE, *WRONG} == set(FAULTS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", ALWAYS)
def test_fault_is_found_in_every_order(operands, fault, seed):
    with pytest.raises(SimtError, match=ALWAYS[fault]):
        run(operands, cluster=2, fault=fault, seed=seed)


@pytest.mark.parametrize("fault", LATE)
def test_fault_is_found_where_operations_are_late(operands, fault):
    with pytest.raises(SimtError, match=LATE[fault]):
        run(operands, cluster=2 if fault == "NO_CLUSTER_END" else 1, fault=fault)


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("fault", sorted(WRONG))
def test_fault_is_found_by_the_numbers(operands, fault, cluster):
    with pytest.raises((SimtError, AssertionError)):
        check(run(operands, cluster=cluster, fault=fault), operands)
