"""The tiles next to a tile, without those that arithmetic alone can rule out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...kernels.arch import TENSOR_MEMORY_LANES, Arch
from ...kernels.arch.tile import ADAPTED, SKINNY_M, Tile

# field -> (smallest, largest); each field moves by factors of two, num_stages by one.
_RANGES = {
    "block_m": (32, 256),
    "block_n": (16, 256),
    "block_k": (16, 256),
    "num_warps": (4, 8),
    "num_stages": (1, 8),
    "subtiles": (1, 8),
    "group_m": (1, 32),
}
MIN_PART = 16  # columns of one epilogue part: under it a TMA store is narrower than 32 bytes
REGISTERS = 255


def _halves(kernel: str) -> int:
    """Accumulators, and weight tiles, per x tile."""
    both = "gated_linear_fwd", "moe_up", "binary_gated_linear_fwd"
    return 2 if kernel.removesuffix(ADAPTED) in both else 1


def _in_one_group(tile: Tile, kernel: str) -> bool:
    """Tiles of one-bit weights hold whole words, and none of the next group of 128."""
    if not kernel.startswith("binary"):
        return True
    if kernel.endswith("_fwd"):
        return 32 <= tile.block_k <= 128
    part = tile.block_n // tile.subtiles if kernel.endswith("_ds") else tile.block_n
    return part >= 32 and tile.block_n <= 128 and (tile.block_n == 128 or "_ds" not in kernel)


def shared_bytes(tile: Tile, kernel: str, size: int) -> int:
    """What the operands of the pipeline need at the very least.

    Without wgmma a stage in flight needs no buffer of its own, so one stage fewer is counted: no
    tile must be ruled out that the compiler might fit.
    """
    rows = tile.block_m + _halves(kernel) * tile.block_n
    return max(1, tile.num_stages - (0 if tile.tma else 1)) * rows * tile.block_k * size


def fits(tile: Tile, arch: Arch, kernel: str, size: int) -> bool:
    """False for what cannot work by arithmetic; the compiler has the last word on the rest."""
    if not _in_one_group(tile, kernel):
        return False
    if shared_bytes(tile, kernel, size) > arch.shared_memory:
        return False
    cut, part = (tile.block_m, tile.part[0]) if tile.weight_left else (tile.block_n, tile.part[1])
    if cut % tile.subtiles or part < min(MIN_PART, cut):
        return False
    accumulators = _halves(kernel) * tile.block_m * tile.block_n
    # With tensor memory they lie outside the registers; else a thread holds its share.
    if arch.tensor_memory:
        return accumulators <= arch.tensor_memory * TENSOR_MEMORY_LANES
    return accumulators // (32 * tile.num_warps) <= REGISTERS


def _moves(tile: Tile) -> Iterator[Tile]:
    for field, (low, high) in _RANGES.items():
        # A skinny tile's rows are what makes it skinny; its grid has no rows to group.
        if tile.skinny and field in ("block_m", "group_m"):
            continue
        now = getattr(tile, field)
        steps = (now - 1, now + 1) if field == "num_stages" else (now // 2, now * 2)
        for value in steps:
            if low <= value <= high:
                yield dataclasses.replace(tile, **{field: value})


def _paid_for(tile: Tile, arch: Arch, kernel: str, size: int) -> Iterator[Tile]:
    """`tile`, and what a larger tile usually must give for its size: stages, or more warps."""
    yield tile
    yield dataclasses.replace(tile, num_warps=min(2 * tile.num_warps, _RANGES["num_warps"][1]))
    while tile.num_stages > 2 and not fits(tile, arch, kernel, size):
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    yield tile


# The same of hyper_attention's kernels, where block_m is the side of a tile of scores (of a step,
# the fewest sources of a block). What fits them only the compiler knows.
_HYPER_RANGES = {"block_m": (16, 128), "block_k": (16, 128), "num_warps": (4, 8)}
_HYPER_COLUMNS = (
    "hyper_attention_out", "hyper_attention_dz2", "hyper_attention_dv", "hyper_attention_step",
)  # fmt: skip
# Backward's kernels share tiles, of the side that hyper_attention_scores has.
_HYPER_SHARED = tuple(f"hyper_attention_{k}" for k in ("dz2", "gate", "dslots", "dq", "dk", "dv"))


def _hyper_moves(tile: Tile, kernel: str) -> Iterator[Tile]:
    ranges = _HYPER_RANGES | ({"block_n": (16, 256)} if kernel in _HYPER_COLUMNS else {})
    if kernel in _HYPER_SHARED:
        ranges.pop("block_m")
    for name, (low, high) in ranges.items():
        now = getattr(tile, name)
        for value in (now // 2, now * 2):
            if low <= value <= high:
                yield dataclasses.replace(tile, **{name: value})


def neighbours(tile: Tile, arch: Arch, kernel: str, size: int) -> list[Tile]:
    """Tiles one move away that may fit, of the same class: skinny or not, with the same loads."""
    if (kernel, size) in arch.hyper:
        return list(_hyper_moves(tile, kernel))
    found = [
        paid
        for moved in _moves(tile)
        for paid in (
            _paid_for(moved, arch, kernel, size)
            if moved.block_m * moved.block_n * moved.block_k
            > tile.block_m * tile.block_n * tile.block_k
            else (moved,)
        )
    ]
    same = [t for t in dict.fromkeys(found) if (t.block_m <= SKINNY_M) == tile.skinny and t != tile]
    return [t for t in same if fits(t, arch, kernel, size)]
