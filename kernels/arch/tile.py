"""How one launch is cut: a `Tile`, and what the tile tables of several rooms share.

The tables are the files beside this one. Their sizes were chosen from the compiler's own report
(no spill, fits shared memory, tensor-core opcode present); no GPU has timed them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

SKINNY_M = 16  # up to this many rows a GEMM is bound by its weight's bytes
FEW_M = 128  # up to this many, by how many multiprocessors read it
FULL_WARPS = 8  # with 255 registers a thread each they have all of a multiprocessor's


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). triton.cdiv on the host costs 9 us a call."""
    return -(-a // b)


class Fit(IntEnum):
    """What the operands of a launch allow by their addresses, strides and sizes, from the least."""

    ELEMENT = 0
    VECTOR = 1
    TMA = 2


@dataclass(frozen=True)
class Tile:
    """How one GEMM launch is cut.

    subtiles: the epilogue handles the tile in that many column parts, so that fewer registers are
    live. loads: "tma" moves tiles by TMA descriptors under a persistent grid; "vector" by pointers,
    16 bytes a thread; "element" makes no demand on strides or sizes. group_m: rows of tiles visited
    together, for L2. box: columns of g and u that a backward's epilogue reads by TMA at once and
    waits for once, several parts, in registers until their turn; None is one part; of weight_left
    rows. few: for FEW_M rows at most: narrow, so that every multiprocessor reads a part of the
    weight. weight_left: the weight is the left operand, and the result is made transposed, in parts
    of rows. wgmma takes its left operand from registers, so that nothing waits for a weight that
    masks or signs make; and a thread has most of a column of such a result, whose sum a backward
    wants.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    subtiles: int = 1
    loads: Literal["tma", "vector", "element"] = "vector"
    group_m: int = 8
    box: int | None = None
    few: bool = False
    weight_left: bool = False

    @property
    def tma(self) -> bool:
        return self.loads == "tma"

    @property
    def box_shape(self) -> tuple[int, int]:
        """Rows and columns of g and u that are read at once: whole parts."""
        rows, columns = self.part
        if self.weight_left:
            return min(self.block_m, max(self.box or 0, rows)), columns
        return rows, min(self.block_n, max(self.box or 0, columns))

    @property
    def needs(self) -> Fit:
        return Fit[self.loads.upper()]

    @property
    def blocks(self) -> int:
        """Blocks of a persistent grid that a multiprocessor is given: of 4 warps two, so that the
        tensor cores go on while one of them stores."""
        return max(1, FULL_WARPS // self.num_warps)

    @property
    def skinny(self) -> bool:
        return self.block_m <= SKINNY_M

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of the result in a part of what is made, which is cut by its columns."""
        if self.weight_left:
            return self.block_m // self.subtiles, self.block_n
        return self.block_m, self.block_n // self.subtiles

    def __str__(self) -> str:
        side = ", weight left" if self.weight_left else ""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, "
            f"{self.num_stages} stages, {self.loads} loads{side}"
        )


@functools.lru_cache(1024)
def finer(tile: Tile) -> Tile:
    """`tile` with twice as many column parts: for an epilogue that holds gate and up at once."""
    return replace(tile, subtiles=2 * tile.subtiles)


@functools.lru_cache(1024)
def unboxed(tile: Tile) -> Tile:
    """`tile` whose epilogue reads g and u part by part, a transposed result's parts being halved:
    for an activation of u too, which needs the registers."""
    return replace(tile, box=None, subtiles=tile.subtiles * (2 if tile.weight_left else 1))


@functools.lru_cache(1024)
def narrower(tile: Tile) -> Tile:
    """`tile` with half the columns of what it makes, 16 at least, in parts as wide as before if it
    has several."""
    side = "block_m" if tile.weight_left else "block_n"
    half = max(16, getattr(tile, side) // 2)
    return replace(tile, **{side: half}, subtiles=max(1, tile.subtiles // 2))


# (kernel, bytes of an element) -> tiles, the preferred first. A kernel is a launcher's name:
# gated_linear_fwd and so on.
Tiles = Mapping[tuple[str, int], tuple[Tile, ...]]

# Calls with adapters read rows of their own, which are named so.
ADAPTED = "_adapted"

# Any strides, any size: per-element addresses cost registers, so the K step is short.
ELEMENT = Tile(64, 32, 16, 4, 2, subtiles=2, loads="element")
SKINNY = (Tile(16, 32, 128, 4, 4), Tile(16, 32, 32, 4, 2, loads="element"))
# For FEW_M rows: as many bytes of the weight on their way as shared memory holds.
FEW = (
    Tile(128, 64, 64, 8, 6, loads="tma", few=True),
    Tile(64, 64, 64, 4, 6, loads="tma", few=True),
    Tile(64, 32, 64, 4, 8, loads="tma", few=True),
)
FEW_MMA = Tile(64, 32, 64, 4, 4, few=True)
FP32_ELEMENT = Tile(32, 32, 16, 4, 2, loads="element")
FP32_SKINNY = (Tile(16, 32, 32, 4, 3), Tile(16, 32, 16, 4, 2, loads="element"))
# Small, so that small inputs cross several tiles, K steps and ragged edges.
INTERPRETED_SKINNY = (Tile(16, 32, 16, 4, 2), Tile(16, 32, 16, 4, 2, loads="element"))
