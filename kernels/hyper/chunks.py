"""What backward keeps of a chunk of rows: tiles by lag, in planes of one kind each.

A chunk is `heads` heads of the batch from `first` on, counted over both, and their row tiles from
`low` to `high`. Row tile j meets j + 1 tiles of sources; its rows lie side by side as lag.py has
them, with a tile of lags below 0 behind, so they are (j + 2) BLOCK long. Row tiles follow one
another by head, and planes by kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arch.tile import cdiv
from .plan import PassPlan

# Tiles of a row that one block walks over: rows differ in length, and the longest would be waited
# for.
SEGMENT = tl.constexpr(16)
# Planes. The first holds A, then Y made of it in place; the third and fifth hold dP, then dS.
WEIGHTS = tl.constexpr(0)
WEIGHT_GRADS = tl.constexpr(1)
# Scores and their gradients: the first sub-head's, then the second's.
SCORE_GRADS = tl.constexpr(2)
SCORES = tl.constexpr(3)
SECOND_GRADS = tl.constexpr(4)
SECOND_SCORES = tl.constexpr(5)


class Chunk(NamedTuple):
    first: int
    heads: int
    low: int
    high: int

    @property
    def rows(self) -> int:
        """Row tiles of a head."""
        return self.high - self.low

    @property
    def segments(self) -> int:
        return cdiv(self.high, SEGMENT.value)

    def elements(self, plan: PassPlan, planes: int) -> int:
        """How many values `planes` planes hold."""
        size = sum(j + 2 for j in range(self.low, self.high))
        return planes * self.heads * size * plan.block**2


def chunks_of(heads: int, tiles: int, most: int) -> list[Chunk]:
    """All rows of `heads` heads of `tiles` row tiles in chunks: whole heads of `most` row tiles
    together, or of one head half as many, since its last rows are twice as long as the mean."""
    together = max(1, min(heads, most // tiles))
    step = tiles if tiles <= most else max(1, most // 2)
    return [
        Chunk(first, min(together, heads - first), low, min(low + step, tiles))
        for first in range(0, heads, together)
        for low in range(0, tiles, step)
    ]


@triton.jit
def tiles_below(j):
    """Tiles that the rows before row tile j take, those before row tile 0 being none."""
    return j * (j - 1) // 2 + 2 * j


@triton.jit
def plane_size(heads, low, high, BLOCK: tl.constexpr):
    """Elements of one plane."""
    tiles = tiles_below(high) - tiles_below(low)
    return tl.cast(heads, tl.int64) * tiles * (BLOCK * BLOCK)


@triton.jit
def tile_rows(planes, kind, head, j, heads, low, high, BLOCK: tl.constexpr):
    """Where the rows of row tile j lie, of the chunk's head-th head, and how long they are."""
    size = tiles_below(high) - tiles_below(low)
    before = tl.cast(heads * kind + head, tl.int64) * size + (tiles_below(j) - tiles_below(low))
    return planes + before * (BLOCK * BLOCK), (j + 2) * BLOCK


@triton.jit
def in_batch(head, first, HEADS: tl.constexpr):
    """(b, i) of a chunk's head-th head."""
    return (first + head) // HEADS, (first + head) % HEADS


@triton.jit
def segment_place(index, heads, high, SUBS: tl.constexpr):
    """(sub-head of a head, head, row tile, segment) of the index-th piece of work, the longest rows
    first; a segment may lie past its row's end."""
    segments = tl.cdiv(high, SEGMENT)
    order = index // SUBS // heads
    return index % SUBS, index // SUBS % heads, high - 1 - order // segments, order % segments


@triton.jit
def segment_part(parts, segment, sub, head, j, heads, low, high, SUBS: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Pointers to a segment's part of a row tile's dz."""
    at = ((segment * SUBS + sub) * heads + head) * (high - low) + (j - low)
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    return parts + tl.cast(at, tl.int64) * (BLOCK * BLOCK_R) + offs


def planes_of(plan: PassPlan) -> int:
    return 6 if plan.glu else 4


CHUNK: Any = ("first", "heads", "low", "high")  # arguments that take any value in one kernel
