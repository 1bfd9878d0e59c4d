"""The choice of a tile for a launch, from the row of its GPU; and what was chosen last."""

from __future__ import annotations

import functools
from typing import Any

from ..invariance import invariant
from .arch import Arch
from .arch.tile import ADAPTED, FEW_M, SKINNY_M, Fit, Tile, cdiv
from .device import arch_of, multiprocessors
from .plans import recording


class _Last(dict[str, Tile]):
    """kernel -> the tile of its last launch."""

    def __setitem__(self, kernel: str, tile: Tile) -> None:
        super().__setitem__(kernel, tile)
        if recorder := recording():
            recorder.chosen.append((self, {kernel: tile}))


# Inside batch_invariant() a launch is cut as for so many rows, however many it has.
ROWS = 1024
# Weights that a column of the result takes, where it is more than one.
WEIGHTS = {"gated_linear_fwd": 2, f"gated_linear_fwd{ADAPTED}": 2}
# What comes through L2 beside what comes from memory: to all multiprocessors together, 28 bytes a
# clock each (Chips and Cheese, on an H100) beside the 21 of an H200's memory; to one of them 64
# (bench/gate/bound/machine.py) beside the 29 of a B200's.
L2_RATE, PORT_RATE = 1.35, 2.2
# For explain().
LAST = _Last()


def _usable(arch: Arch, kernel: str, size: int, fit: Fit, M: int) -> list[Tile]:
    """The tiles that load as fast as the operands allow, of the kind for M rows; where there are
    none, those that load elements."""
    tiles = arch.tiles[kernel, size]
    fast = [t for t in tiles if Fit.ELEMENT < t.needs <= fit]
    for usable in (fast, [t for t in tiles if t.needs == Fit.ELEMENT]):
        skinny = [t for t in usable if t.skinny and M <= SKINNY_M]
        wide = [t for t in usable if not t.skinny]
        fitting = skinny or [t for t in wide if not t.few or M <= FEW_M] or wide
        if fitting:
            return fitting
    raise AssertionError(f"{arch.name} has no tile of {kernel} that loads elements")


def pick_tile(kernel: str, x: Any, M: int, N: int, fit: Fit) -> Tile:
    """The tile for an (M, N) result from rows like `x`: skinny up to SKINNY_M rows; up to FEW_M the
    one that reads the weight fastest; else the first that gives every multiprocessor a tile, else
    the smallest. `fit`: what tiles.fit_of says of the operands."""
    arch, M = arch_of(x.device), ROWS if invariant() else M
    return _pick(arch, kernel, x.element_size(), M, N, fit, multiprocessors(x.device))


@functools.lru_cache(4096)
def _pick(
    arch: Arch, kernel: str, size: int, M: int, N: int, fit: Fit, multiprocessors: int
) -> Tile:
    fitting = _usable(arch, kernel, size, fit, M)
    if any(t.few for t in fitting):
        return min(fitting, key=lambda t: reading(t, kernel, M, N, multiprocessors))
    return next(
        (t for t in fitting if cdiv(M, t.block_m) * cdiv(N, t.block_n) >= multiprocessors),
        fitting[-1],
    )


def reading(
    tile: Tile, kernel: str, M: int, N: int, multiprocessors: int
) -> tuple[float, float, int]:
    """How long a launch for few rows reads, beside the time that the weight's bytes alone take, at
    least 1; then, where that is equal, what else is better small: the fullest multiprocessor's part
    of the weight, and rows that are not there."""
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    fullest = cdiv(tiles, multiprocessors) * multiprocessors
    columns = tile.block_n * WEIGHTS.get(kernel, 1)
    read = (columns + min(M, tile.block_m)) / (N * WEIGHTS.get(kernel, 1))
    slowest = max(1.0, tiles * read / L2_RATE, fullest * read / PORT_RATE)
    return slowest, fullest * tile.block_n / cdiv(M, tile.block_m), tile.block_m


def pick_grouped_tile(kernel: str, x: Any, T: int, groups: int, fit: Fit) -> Tile:
    """The tile for T rows in groups of their own: the smallest that holds a group's rows if all
    have as many, else the largest. A larger one multiplies rows that are not there."""
    rows = cdiv(ROWS if invariant() else T, max(groups, 1))
    return _pick_grouped(arch_of(x.device), kernel, x.element_size(), rows, fit)


@functools.lru_cache(4096)
def _pick_grouped(arch: Arch, kernel: str, size: int, rows: int, fit: Fit) -> Tile:
    tiles = arch.tiles[kernel, size]
    usable = [t for t in tiles if Fit.ELEMENT < t.needs <= fit]
    usable = usable or [t for t in tiles if t.needs == Fit.ELEMENT]
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
