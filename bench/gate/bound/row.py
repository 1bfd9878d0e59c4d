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

    triangle: the depth is a sequence, of which a tile of block_m rows sees what lies before it: in
    the mean half, and its own step whole. segment: so many steps of a tile are one piece of work
    (0: all are); further: what a piece behind a tile's first takes beside its steps. moved: bytes
    of device memory of a tile that makes no products; its share is that of the bandwidth.
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
    triangle: bool = False
    segment: int = 0
    further: Clocks = field(default_factory=dict)
    moved: float = 0
    why: str = ""

    @property
    def key(self) -> str:
        return f"{self.arch} {self.source} {self.kernel}, {self.tile}, {self.variant}"

    @property
    def machine(self) -> Machine:
        return MACHINES[self.arch]

    def steps(self, K: int) -> float:
        """In a triangle, of a tile in the mean."""
        n = math.ceil(K / self.block[2])
        return (n + 1) / 2 if self.triangle else n

    def pieces(self, K: int) -> float:
        """Pieces of work of a tile, in the mean."""
        if not self.segment:
            return 1
        n = math.ceil(K / self.block[2])
        return sum(math.ceil(k / self.segment) for k in range(1, n + 1)) / n

    def piece(self, steps: float, later: float = 0) -> Clocks:
        """A piece of work, which of a triangle takes nothing where it has no step; later: how many
        of its pieces come behind a tile's first."""
        if self.triangle and not steps:
            return dict.fromkeys(self.each, 0.0)
        return {
            u: v + steps * self.step[u] + later * self.further.get(u, 0.0)
            for u, v in self.each.items()
        }

    def clocks(self, K: int) -> Clocks:
        """A tile of depth K, unit by unit; the block's own order is shared by all blocks that
        a multiprocessor holds, for they run side by side."""
        found = dict(self.piece(self.steps(K), self.pieces(K) - 1))
        return {**found, "order": found["order"] / self.blocks}

    @property
    def of_bandwidth(self) -> bool:
        """Is its share that of the memory's bandwidth?"""
        return self.skinny or not self.products

    def ideal(self, K: int) -> float:
        """Clocks of one tile at the peak: of the tensor cores, or of the device's memory."""
        if self.of_bandwidth:
            moved = self.moved + self.steps(K) * self.step_weights
            return moved / self.machine.device_bytes_a_clock
        m, n, _ = self.block
        seen = (K + 1) / 2 if self.triangle else K
        return 2.0 * self.products * m * n * seen / self.machine.tensor

    def share(self, K: int) -> float:
        """The most of the peak that tiles of depth K can reach, without waves."""
        return min(1.0, self.ideal(K) / max(self.clocks(K).values()))

    def limit(self, K: int) -> str:
        """The unit that takes longest."""
        clocks = self.clocks(K)
        if self.of_bandwidth and self.ideal(K) >= max(clocks.values()):
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
            turns = math.ceil(each / self.blocks)
            clocks = max(clocks, (self.each["order"] + self.steps(K) * self.step["order"]) * turns)
        return clocks / (self.machine.clock_ghz * 1e6)

    def share_of(self, M: int, N: int, K: int) -> float:
        """The most of the peak that a launch over an (M, N) result can reach."""
        m, n, _ = self.block
        ideal = self.ideal(K) * (M * N) / (m * n) / self.machine.multiprocessors
        at = self.milliseconds(M, N, K) * self.machine.clock_ghz * 1e6
        return min(1.0, ideal / at)
