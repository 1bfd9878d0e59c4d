"""The least time of warps that run one way: their instructions in order, pipes as queues.

All warps of a role run alike, `warps` of them on each scheduler. Two clocks advance with every
instruction: the scheduler's, by a slot for each warp, and the warp's own, by the stall that its
control code asks for. Each pipe has a clock of its own. They meet where warps meet or wait: at a
barrier, at a wait for products, at a scoreboard. wgmma and tcgen05 run on beside them until a wait.
What a wait takes is the least latency of machine.py, so the sum is a lower bound of the time: bank
conflicts, L2 misses, TMA behind its stages, and clocks that a scheduler loses are left out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .machine import SHARED_BYTES, Machine
from .sass import Control, Instruction

AT_ONCE = 4  # instructions between a load and its wait that hide nothing
_LOADS = {
    "LDG": "l1",
    "LD": "l1",
    "LDS": "shared",
    "LDSM": "shared",
    "LDL": "l1",
    "ATOMS": "shared",
}


def width(i: Instruction) -> int:
    """Bytes that each lane moves."""
    if i.stem in ("LDSM", "STSM"):
        count = next((int(p) for p in reversed(i.parts) if p in ("1", "2", "4")), 1)
        return 4 * count
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[p] for p in i.parts if p in sizes), 4)


@dataclass
class Totals:
    """What the way of one warp asked of what all warps share: clocks of a scheduler's tensor core,
    bytes. once: of the whole block, as one thread asks TMA for them."""

    tensor: float = 0
    shared: float = 0
    l2: float = 0
    once: float = 0


@dataclass
class Timeline:
    """One role's time so far. warps: of the role, on each scheduler."""

    machine: Machine
    warps: float
    totals: Totals = field(default_factory=Totals)
    slots: float = 0
    warp: float = 0
    tensor: float = 0
    port: float = 0
    pipes: dict[str, float] = field(default_factory=dict)
    boards: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, -99)] * 6)
    groups: deque[float] = field(default_factory=deque)
    copies: deque[float] = field(default_factory=deque)
    barriers: dict[int, list[float]] = field(default_factory=dict)
    waited: Counter[int] = field(default_factory=Counter)
    drains: int = 0
    exposed: int = 0
    count: int = 0

    @property
    def now(self) -> float:
        return max(self.warp, self.slots)

    @property
    def end(self) -> float:
        return max(self.now, self.tensor, *self.pipes.values(), 0.0)

    def meet(self, at: float = 0.0) -> None:
        """All clocks but that of asynchronous products go on from the latest."""
        latest = max(self.now, at, *self.pipes.values(), 0.0)
        self.slots = self.warp = latest
        self.pipes = dict.fromkeys(self.pipes, latest)

    def use(self, pipe: str, clocks: float) -> None:
        self.pipes[pipe] = self.pipes.get(pipe, 0.0) + clocks

    def issue(self, control: Control, pipes: Sequence[tuple[str, int]]) -> None:
        """Waits for its scoreboards, then a slot and a stall."""
        self.count += 1
        if control.waits:
            for k in range(6):
                if control.waits >> k & 1:
                    ready, at = self.boards[k]
                    if ready > self.warp:
                        self.exposed += self.count - at <= AT_ONCE
                        self.warp = ready
        self.slots += self.warps
        self.warp += max(control.stall, 1)
        for pipe, clocks in pipes:
            self.use(pipe, self.warps * clocks)

    def load(self, i: Instruction, lanes: int) -> None:
        """Bytes through a port, and when they are there."""
        size = width(i) * lanes
        if i.stem in ("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"):
            self.totals.shared += size
            # All four schedulers share the port.
            self.use("shared", 4 * self.warps * size / SHARED_BYTES)
        elif i.stem in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            self.totals.l2 += size
            if i.stem == "LDGSTS":
                self.totals.shared += size
                self.use("shared", 4 * self.warps * size / SHARED_BYTES)
        if i.stem in _LOADS and i.control.writes < 6:
            latency = getattr(self.machine.latency, _LOADS[i.stem])
            self.boards[i.control.writes] = self.now + latency, self.count

    def product(self, clocks: float, asynchronous: bool, shared: float = 0.0) -> None:
        """clocks: of one scheduler's tensor core for one warp's part; shared: bytes that the part
        reads of shared memory."""
        self.totals.tensor += clocks
        self.totals.shared += shared
        if not asynchronous:
            self.use("tensor", self.warps * clocks)
            return
        # The port feeds all warps' products, four warps to a part each, between TMA's writes.
        self.port = max(self.port, self.now) + 4 * self.warps * shared / SHARED_BYTES
        self.tensor = max(max(self.tensor, self.now) + self.warps * clocks, self.port)

    def commit(self) -> None:
        self.groups.append(self.tensor)

    def wait_products(self, left: int) -> None:
        """Until no more than `left` groups of products are under way."""
        done = 0.0
        while len(self.groups) > left:
            done = self.groups.popleft()
        if done > self.now:
            self.drains += not self.groups
            self.meet(done)

    def arrive(self, barrier: int, at: float | None = None) -> None:
        """A phase of a barrier begins; `at`: when it ends, if that is known already."""
        self.barriers.setdefault(barrier, []).append(at or 0.0)

    def bring(self, size: float) -> None:
        """TMA writes so many bytes."""
        self.totals.once += size
        self.port = max(self.port, self.now) + size / SHARED_BYTES

    def fill(self, barrier: int) -> None:
        """TMA has been asked to fill the phase that has begun."""
        phases = self.barriers.setdefault(barrier, [0.0])
        phases[-1] = max(phases[-1], self.now + self.machine.latency.l2)

    def wait_barrier(self, barrier: int) -> None:
        """The phase behind the one that was waited for last."""
        phases, k = self.barriers.get(barrier, []), self.waited[barrier]
        self.waited[barrier] += 1
        if k < len(phases) and phases[k] > self.now:
            self.exposed += 1
            self.meet(phases[k])

    def wait_copies(self, left: int) -> None:
        done = 0.0
        while len(self.copies) > left:
            done = self.copies.popleft()
        if done > self.now:
            self.exposed += 1
            self.meet(done)


def left_of(i: Instruction) -> int:
    """How many groups a WARPGROUP.DEPBAR or a DEPBAR leaves under way."""
    return int(i.operands[1], 0) if len(i.operands) > 1 else 0
