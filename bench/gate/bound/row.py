"""What was derived of one kernel and tile, and what follows from it at a size. It needs no Triton:
`predict` reads rows of the committed table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .machine import MACHINES, Machine

Clocks = Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """What is derived of one kernel and tile; all of it is computed.

    products: how many products of block_m x block_n a tile has. tile, step: of one tile beside its
    steps, and of one step of block_k; launch: of a block, once. blocks: that a multiprocessor has
    at once. step_weights: bytes of weights of a tile's step. why: why it could not be derived.
    """

    arch: str
    kernel: str
    source: str
    tile: str
    variant: str
    block: tuple[int, int, int] = (1, 1, 1)
    products: int = 0
    blocks: int = 1
    warps: int = 0
    persistent: bool = False
    skinny: bool = False
    launch: Clocks = field(default_factory=dict)
    each: Clocks = field(default_factory=dict)
    step: Clocks = field(default_factory=dict)
    counts: Clocks = field(default_factory=dict)
    step_counts: Clocks = field(default_factory=dict)
    step_weights: float = 0
    why: str = ""

    @property
    def key(self) -> str:
        return f"{self.arch} {self.source} {self.kernel}, {self.tile}, {self.variant}"

    @property
    def machine(self) -> Machine:
        return MACHINES[self.arch]

    def steps(self, K: int) -> int:
        return math.ceil(K / self.block[2])

    def clocks(self, K: int) -> Clocks:
        """A tile of depth K, unit by unit; the block's own order is shared by all blocks that
        a multiprocessor holds, for they run side by side."""
        n = self.steps(K)
        found = {u: v + n * self.step[u] for u, v in self.each.items()}
        return {**found, "order": found["order"] / self.blocks}

    def ideal(self, K: int) -> float:
        """Clocks of one tile at the peak: of the tensor cores, or of the device's memory."""
        if self.skinny:
            return self.steps(K) * self.step_weights / self.machine.device_bytes_a_clock
        m, n, _ = self.block
        return 2.0 * self.products * m * n * K / self.machine.tensor

    def share(self, K: int) -> float:
        """The most of the peak that tiles of depth K can reach, without waves."""
        return min(1.0, self.ideal(K) / max(self.clocks(K).values()))

    def limit(self, K: int) -> str:
        """The unit that takes longest."""
        clocks = self.clocks(K)
        if self.skinny and self.ideal(K) >= max(clocks.values()):
            return "device memory"
        unit = max(clocks, key=clocks.__getitem__)
        if unit != "order":
            return unit
        steps = self.steps(K) * (self.step["order"] - self.step["tensor"]) / self.blocks
        if self.each["order"] / self.blocks > steps:
            return "epilogue"
        rest = {u: v for u, v in self.step.items() if u not in ("order", "L2")}
        busiest = max(rest, key=rest.__getitem__)
        within = rest[busiest] / (self.step["order"] / self.blocks)
        return f"loop: {busiest}" if within > 0.9 and busiest != "tensor" else "loop: waits"

    def milliseconds(self, M: int, N: int, K: int) -> float:
        """A whole launch over an (M, N) result: whole waves of tiles, each block's own start."""
        m, n, _ = self.block
        tiles = math.ceil(M / m) * math.ceil(N / n)
        slots = self.machine.multiprocessors
        each = math.ceil(tiles / slots)
        clocks = max(self.clocks(K).values()) * each + self.launch.get("order", 0.0)
        if self.persistent:
            clocks = max(clocks, (self.each["order"] + self.steps(K) * self.step["order"]) * each)
        return clocks / (self.machine.clock_ghz * 1e6)

    def share_of(self, M: int, N: int, K: int) -> float:
        """The most of the peak that a launch over an (M, N) result can reach."""
        m, n, _ = self.block
        ideal = self.ideal(K) * (M * N) / (m * n) / self.machine.multiprocessors
        at = self.milliseconds(M, N, K) * self.machine.clock_ghz * 1e6
        return min(1.0, ideal / at)
