"""Calls of many kernels: what hyper_attention launches at a size, and how long all of it takes at
least, from the rows of its kernels.

A kernel's pieces of work differ: a row of tiles is as long as what it sees. So a launch is not so
many equal tiles, but its pieces in the order in which the kernel hands them out, taken by blocks,
and blocks by multiprocessors, as one is free.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....backends.flops import hyper_scores
from ....kernels.arch import ARCHES, Arch
from ....kernels.arch.tile import Tile
from ....kernels.hyper.chunks import SEGMENT, Chunk, chunks_of
from ....kernels.launches.hyper import BATCH, D, of_layer
from ...least import LATENCY_S
from .machine import MACHINES, Machine
from .row import Bound

# Tiles of the rows that a piece visits, and whether it is behind the first of its row tile.
Piece = tuple[int, bool]
ALIKE: Piece = (0, False)  # every piece of a kernel without visits
OP = "hyper_attention"
# A variant of the gate's launches -> its heads, with which the table has rows.
VARIANTS = {f"glu, H {heads}": heads for heads in (2, 16)}
HALVES = ("forward", "backward")


def _rows(low: int, high: int) -> list[Piece]:
    """The longest first."""
    return [(j + 1, False) for j in reversed(range(low, high))]


def _segments(low: int, high: int) -> list[Piece]:
    size = SEGMENT.value
    starts = range(0, high, size)
    return [
        (max(0, min(size, j + 1 - start)), start > 0)
        for j in reversed(range(low, high))
        for start in starts
    ]


def _columns(low: int, high: int) -> list[Piece]:
    """Lags, or tiles of sources: of each, the rows that see it."""
    return [(high - max(k, low), False) for k in range(high)]


def _alike(low: int, high: int) -> list[Piece]:
    return [ALIKE] * (high - low)


@dataclass(frozen=True)
class Part:
    """One kernel of a call. name: in the table, behind the op's; kernel: its function's;
    tile: whose row of tiles it has; pieces: of a head with row tiles from `low` to `high`; by_sub:
    once for each sub-head; columns: of what tensor one block takes a part; stay: blocks of a
    multiprocessor that the launcher begins at most, each of which takes pieces in turn (None: as
    many as there are pieces); turned: every second turn of theirs from its end, as band.py says."""

    name: str
    kernel: str
    tile: str
    pieces: Callable[[int, int], list[Piece]]
    by_sub: bool = False
    columns: str = ""
    stay: int | None = 4
    turned: bool = False

    @property
    def row(self) -> str:
        return f"{OP}_{self.name}"

    @property
    def segment(self) -> int:
        return SEGMENT.value if self.pieces is _segments else 0

    @property
    def looped(self) -> bool:
        return self.pieces is not _alike


PARTS: Mapping[str, tuple[Part, ...]] = {
    "forward": (
        Part("h1", "_h1_kernel", "h1", _rows, by_sub=True),
        Part("out", "_out_kernel", "out", _rows, stay=2, turned=True),
    ),
    "backward": (
        Part("coefficient", "coefficient_kernel", "scores", _alike, stay=None),
        Part("dz2", "dz2_kernel", "dz2", _segments),
        Part("dz2_sum", "sum_kernel", "dz2", _alike, stay=None),
        Part("scores", "scores_kernel", "scores", _segments, by_sub=True),
        Part("gate", "gate_kernel", "gate", _segments),
        Part("dz1_sum", "sum_kernel", "gate", _alike, by_sub=True, stay=None),
        Part("dslots1", "slots_kernel", "dslots", _columns, by_sub=True),
        Part("dslots2", "slots_kernel", "dslots", _columns),
        Part("dq", "dq_kernel", "dq", _rows, by_sub=True, columns="q"),
        Part("dk", "columns_kernel", "dk", _columns, by_sub=True, columns="q"),
        Part("dv", "columns_kernel", "dv", _columns, columns="v"),
    ),
}  # fmt: skip


def tile_of(arch: Arch, part: Part) -> Tile:
    (tile,) = arch.hyper[f"{OP}_{part.tile}", 2]
    return tile


@dataclass(frozen=True)
class Size:
    """One call: tokens of all sequences, and heads, of a layer of the width D."""

    arch: Arch
    tokens: int
    heads: int

    @property
    def machine(self) -> Machine:
        return MACHINES[self.arch.name]

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return of_layer(BATCH, False)(self.tokens, D, self.heads)

    def flops(self, half: str) -> float:
        """Useful ones: scores once, of what is seen."""
        return hyper_scores(self.shapes, visible=True) * (1 + HALVES.index(half))

    def copies(self, part: Part, heads: int) -> int:
        """How often each of a head's pieces is there, side by side."""
        of, tile = self.shapes, tile_of(self.arch, part)
        subs = of["q"][1] // of["v"][1] if part.by_sub else 1
        step = {"q": tile.block_k, "v": tile.block_n}
        return heads * subs * (
            math.ceil(of[part.columns][-1] / step[part.columns]) if part.columns else 1
        )  # fmt: skip

    def launches(self, half: str) -> Iterator[tuple[Part, Chunk]]:
        """As the launchers make them."""
        heads = BATCH * self.heads
        tiles = math.ceil(self.shapes["v"][2] / tile_of(self.arch, PARTS[half][0]).block_m)
        whole = Chunk(0, heads, 0, tiles)
        if half == "forward":
            yield from ((part, whole) for part in PARTS[half])
            return
        first, *rest = PARTS[half]
        yield first, whole
        for chunk in chunks_of(heads, tiles, self.machine.multiprocessors):
            yield from ((part, chunk) for part in rest)

    def pieces(self, part: Part, chunk: Chunk) -> list[Piece]:
        """A launch has these, as its kernel counts them."""
        each = self.copies(part, chunk.heads)
        return [p for p in part.pieces(chunk.low, chunk.high) for _ in range(each)]

    def work(self, part: Part, chunk: Chunk) -> tuple[list[Piece], int]:
        """The pieces of a launch as blocks take them in turn, and how many blocks."""
        pieces = self.pieces(part, chunk)
        most = self.machine.multiprocessors * part.stay if part.stay else len(pieces)
        blocks = min(len(pieces), most)
        turns = (pieces[k : k + blocks] for k in range(0, len(pieces), blocks))
        taken = (t[::-1] if part.turned and k % 2 else t for k, t in enumerate(turns))
        return [piece for turn in taken for piece in turn], blocks


@dataclass(frozen=True)
class Time:
    """Seconds of a launch: in whole waves, and if it filled the GPU to its end."""

    waves: float
    full: float


def time_of(row: Bound, pieces: Sequence[Piece], programs: int) -> Time:
    """The longest of each unit's work, of memory's, and of the blocks' own order."""
    machine, count = row.machine, Counter(pieces)
    known = {piece: row.piece(*piece) for piece in count}
    busy = {
        u: sum(n * known[piece][u] for piece, n in count.items()) / machine.multiprocessors
        for u in row.each
    }
    order = [known[piece]["order"] for piece in pieces]
    free = [0.0] * (machine.multiprocessors * row.blocks)
    for block in range(programs):
        heapq.heapreplace(free, free[0] + sum(order[block::programs]))
    clock, moved = machine.clock_ghz * 1e9, len(pieces) * row.moved / machine.device_bytes
    waves = max({**busy, "order": max(free) + row.launch.get("order", 0.0)}.values()) / clock
    full = max({**busy, "order": busy["order"] / row.blocks}.values()) / clock
    return Time(max(waves, moved, LATENCY_S), max(full, moved))


@dataclass(frozen=True, eq=False)
class Call:
    """Half of a call: its kernels' rows, by name."""

    arch: str
    half: str
    variant: str
    rows: Mapping[str, Bound]

    @property
    def kernel(self) -> str:
        return f"{OP}'s {self.half}"

    @property
    def key(self) -> str:
        return f"{self.arch} {self.kernel}, {self.variant}"

    @property
    def why(self) -> str:
        lost = [f"{b.kernel} is not" for b in self.rows.values() if b.why]
        return ", ".join(lost)

    def size(self, tokens: int) -> Size:
        return Size(ARCHES[self.arch], tokens, VARIANTS[self.variant])

    def times(self, tokens: int) -> Mapping[str, list[Time]]:
        """All launches of each kernel."""
        return _times(self, tokens)

    def count(self, tokens: int) -> int:
        return sum(map(len, self.times(tokens).values()))

    def seconds(self, tokens: int) -> float:
        return sum(t.waves for times in self.times(tokens).values() for t in times)

    def _share(self, T: int, seconds: float) -> float:
        machine = MACHINES[self.arch]
        peak = machine.tensor * machine.multiprocessors * machine.clock_ghz * 1e9
        return self.size(BATCH * T).flops(self.half) / peak / seconds

    def share(self, T: int) -> float:
        """The most of the peak that sequences of T tokens can reach, in useful products."""
        return self._share(T, self.seconds(BATCH * T))

    def full_share(self, T: int) -> float:
        """The same, if each launch filled the GPU to its end and took no time to begin."""
        times = self.times(BATCH * T).values()
        return self._share(T, sum(t.full for each in times for t in each))

    def limit(self, T: int) -> str:
        """The kernel that takes longest."""
        times = self.times(BATCH * T)
        return max(times, key=lambda name: sum(t.waves for t in times[name]))


@functools.lru_cache(64)
def _times(call: Call, tokens: int) -> Mapping[str, list[Time]]:
    size = call.size(tokens)
    found: dict[str, list[Time]] = {name: [] for name in call.rows}
    known: dict[tuple[str, int, int, int], Time] = {}
    for part, chunk in size.launches(call.half):
        key = (part.row, *chunk[1:])
        if key not in known:
            known[key] = time_of(call.rows[part.row], *size.work(part, chunk))
        found[part.row].append(known[key])
    return found


def calls(bounds: Iterable[Bound]) -> list[Call]:
    """The calls all of whose kernels are among these rows."""
    by = {(b.arch, b.variant, b.kernel): b for b in bounds if b.variant in VARIANTS}
    found = []
    for arch, variant in dict.fromkeys((a, v) for a, v, _ in by):
        for half, parts in PARTS.items():
            rows = {part.row: by.get((arch, variant, part.row)) for part in parts}
            known = {name: b for name, b in rows.items() if b is not None}
            if len(known) == len(rows):
                found.append(Call(arch, half, variant, known))
    return found


def least_seconds(
    bounds: Iterable[Bound], arch: str, half: str, size: tuple[int, int, int]
) -> float | None:
    """What half of a call of (tokens, width, heads) takes at least; None where no rows say it."""
    tokens, width, heads = size
    of = (arch, half, next((v for v, n in VARIANTS.items() if n == heads), None))
    found = (c for c in calls(bounds) if (c.arch, c.half, c.variant) == of and not c.why)
    call = next(found, None) if width == D else None
    return call.seconds(tokens) if call else None
