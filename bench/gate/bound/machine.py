"""What a multiprocessor can do in a clock: one row a generation, each figure with its source.

Rates are the hardware's best, so that a time made of them is never too long:

* Issue: one instruction a clock for each of four schedulers (NVIDIA's whitepapers on A100, H100).
* FP32, integer, special functions: "Throughput of Native Arithmetic Instructions" in the CUDA C++
  Programming Guide, results a clock and multiprocessor, over 32 lanes and four schedulers: 64
  integer results are 2 clocks an instruction, 16 of special functions 8. sm_100's are ASSUMED to be
  those of 9.0.
* Tensor: dense 16-bit FLOP of the datasheet a clock: 312 TFLOP/s of A100 (108 at 1.41 GHz), 989.4
  of H100 (132 at 1.83 GHz), 2250 of B200 (148 at 1.85 GHz). mma.sync is given the same peak, though
  Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (2024), reached less
  than two thirds of it on an H100.
* Shared memory: 32 banks of 4 bytes (Programming Guide). That TMA's writes and the tensor core's
  reads share them is ASSUMED, and decides wherever the limit is "shared".
* L2 to a multiprocessor: 64 bytes a clock (Jia et al. on Volta, 2018; no newer figure is known).
* Latencies: the least that Luo et al. measured, rounded down: shared memory 29 clocks, L1 38, L2
  260. TMA passes L2 at least. B200's are ASSUMED to be H100's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCHEDULERS = 4
SHARED_BYTES = 128  # a clock
L2_BYTES = 64  # a clock, for one multiprocessor


@dataclass(frozen=True)
class Latency:
    """Clocks from issue to use, at least."""

    shared: int = 29
    l1: int = 38
    l2: int = 260


@dataclass(frozen=True)
class Machine:
    """One generation. tensor: 16-bit FLOP a clock of a multiprocessor; fp32: clocks a warp's
    instruction takes of its scheduler's lanes; clock_ghz: at which the datasheet's peak holds;
    device_bytes: a second."""

    name: str
    multiprocessors: int
    tensor: int
    fp32: int
    clock_ghz: float
    device_bytes: float
    integer: int = 2
    special: int = 8
    latency: Latency = Latency()

    @property
    def device_bytes_a_clock(self) -> float:
        """The share of one multiprocessor."""
        return self.device_bytes / (self.clock_ghz * 1e9) / self.multiprocessors


MACHINES: Mapping[str, Machine] = {
    "sm_80": Machine("A100", 108, 2048, 2, 1.41, 2.039e12),
    "sm_90": Machine("H100", 132, 4096, 1, 1.83, 3.35e12),
    "sm_100": Machine("B200", 148, 8192, 1, 1.85, 8.0e12),
}

# Pipe by an instruction's stem. What is in none costs an issue slot alone: uniform instructions,
# jumps, barriers.
INTEGER = frozenset({
    "LOP3", "IADD3", "IADD", "VIADD", "SHF", "LEA", "ISETP", "SEL", "PRMT", "MOV", "FSETP", "FSEL",
    "FMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "IMNMX", "IABS", "SGXT", "BMSK", "PLOP3", "F2FP",
    "P2R", "R2P", "I2FP", "VOTE", "F2F", "I2F", "F2I", "POPC", "FLO", "BREV", "HSETP2", "HMNMX2",
})  # fmt: skip
FP32 = frozenset({
    "FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "FHADD", "HFMA2", "HADD2", "HMUL2", "IMAD",
})  # fmt: skip
MULTIPLY = frozenset({"IMAD"})  # 64 results a clock: half of the lanes that FP32 has
SPECIAL = frozenset({"MUFU"})
PRODUCTS = frozenset({"HMMA", "HGMMA", "UTCHMMA"})


def pipes_of(stem: str, machine: Machine) -> tuple[tuple[str, int], ...]:
    """(pipe, clocks of it) that one warp's instruction takes."""
    if stem in INTEGER:
        return (("integer", machine.integer),)
    if stem in MULTIPLY:
        return ("fp32", machine.fp32), ("multiply", machine.integer)
    if stem in FP32:
        return (("fp32", machine.fp32),)
    return (("special", machine.special),) if stem in SPECIAL else ()
