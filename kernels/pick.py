"""The choice of a tile for a launch, from the row of its GPU; and what was chosen last."""

from __future__ import annotations

import functools
from typing import Any

from .arch import Arch
from .arch.tile import SKINNY_M, Tile, cdiv
from .device import arch_of, multiprocessors

# kernel -> what it was last launched with, for explain().
LAST: dict[str, Tile] = {}


def pick_tile(kernel: str, x: Any, M: int, N: int, aligned: bool) -> Tile:
    """The tile for an (M, N) result from rows like `x`: skinny up to SKINNY_M rows, else the first
    that gives every multiprocessor a tile, else the smallest. `aligned`: what tiles.aligned says of
    the operands; without it only element loads serve."""
    arch = arch_of(x.device)
    return _pick(arch, kernel, x.element_size(), M, N, aligned, multiprocessors(x.device))


@functools.lru_cache(4096)
def _pick(
    arch: Arch, kernel: str, size: int, M: int, N: int, aligned: bool, multiprocessors: int
) -> Tile:
    usable = [t for t in arch.tiles[kernel, size] if (t.loads != "element") == aligned]
    fitting = [t for t in usable if t.skinny] if M <= SKINNY_M else []
    fitting = fitting or [t for t in usable if not t.skinny]
    return next(
        (t for t in fitting if cdiv(M, t.block_m) * cdiv(N, t.block_n) >= multiprocessors),
        fitting[-1],
    )


def pick_grouped_tile(kernel: str, x: Any, T: int, groups: int, aligned: bool) -> Tile:
    """The tile for T rows in groups of their own: the smallest that holds a group's rows if all
    have as many, else the largest. A larger one multiplies rows that are not there."""
    rows = cdiv(T, max(groups, 1))
    return _pick_grouped(arch_of(x.device), kernel, x.element_size(), rows, aligned)


@functools.lru_cache(4096)
def _pick_grouped(arch: Arch, kernel: str, size: int, rows: int, aligned: bool) -> Tile:
    usable = [t for t in arch.tiles[kernel, size] if (t.loads != "element") == aligned]
    usable.sort(key=lambda t: t.block_m)
    return next((t for t in usable if t.block_m >= rows), usable[-1])


def pick_splits(tile: Tile, x: Any, N: int, K: int) -> int:
    """Into how many parts K is cut for a skinny GEMM: four blocks a multiprocessor, four K steps a
    part."""
    blocks = cdiv(N, tile.block_n)
    wanted = cdiv(4 * multiprocessors(x.device), blocks)
    return max(1, min(wanted, K // (4 * tile.block_k)))


def hyper_tile(kernel: str, x: Any) -> Tile:
    """The tile of one of hyper_attention's passes, or of its step."""
    return arch_of(x.device).hyper[kernel, x.element_size()][0]
