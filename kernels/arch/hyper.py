"""Tiles of hyper_attention's passes and of its step: one each, for any strides and sizes."""

from __future__ import annotations

from .tile import Tile, Tiles


def least_columns(mma: str, tile: Tile) -> int:
    """The fewest columns of a product that a tensor core takes. Warp groups of wgmma that have the
    same 64 rows have a part of the columns each, and 8 columns of an operand that is contiguous
    along them are half a row of its swizzle: CUTLASS has no such layout, and Triton has got narrow
    ones wrong before (triton-lang/triton#7830, #10629)."""
    if mma != "wgmma" or tile.block_m < 64:
        return 16
    return max(16, 16 * (tile.num_warps // 4) // (tile.block_m // 64))


def _square(rows: int, width: int, warps: int, values: int) -> Tile:
    """A square tile of scores: block_k columns of q and k at a time, block_n of v in an
    accumulator."""
    return Tile(rows, values, width, warps, 1, loads="element")


# (kernel, bytes of an element) -> tile of hyper_attention's passes; strides are free everywhere.
# Fewer rows where more would spill under Triton 3.6: 3.9 has room for 64 in dslots on sm_90 and
# sm_100, for 64 in dz1 on sm_90, and for 32 in dq. No GPU has timed them.
_FP32: Tiles = {
    (f"hyper_attention_{k}", 4): (_square(16, 32, 4, 64),)
    for k in ("h1", "out", "dz2", "dz1", "dq", "dk", "dv", "dslots")
}
# A step of decoding: the fewest sources of a block, how many values of each it loads at once (more
# sources where rows are short), and the most columns.
_STEP: Tiles = {
    ("hyper_attention_step", size): (Tile(64, 128, 64, 4, 1, loads="element"),) for size in (2, 4)
}
_SMALL = {
    ("hyper_attention_dq", 2): _square(16, 64, 4, 128),
    ("hyper_attention_dslots", 2): _square(16, 64, 8, 128),
}
MMA: Tiles = {
    **_STEP,
    **_FP32,
    **{key: (tile,) for key, tile in _SMALL.items()},
    **{(f"hyper_attention_{k}", 2): (_square(32, 64, 8, 128),) for k in ("dz1", "dk", "dv")},
    ("hyper_attention_out", 2): (_square(64, 64, 8, 128),),
    **{(f"hyper_attention_{k}", 2): (_square(64, 64, 8, 128),) for k in ("h1", "dz2")},
}
TMA: Tiles = {
    **_STEP,
    **_FP32,
    **{key: (tile,) for key, tile in _SMALL.items()},
    # One warp group for 64 rows, so that it has all columns of a product with the ranks.
    **{(f"hyper_attention_{k}", 2): (_square(64, 64, 4, 128),) for k in ("h1", "dz2")},
    ("hyper_attention_dz1", 2): (_square(64, 64, 8, 128),),
    **{(f"hyper_attention_{k}", 2): (_square(32, 64, 8, 128),) for k in ("dk", "dv")},
    ("hyper_attention_out", 2): (_square(64, 64, 4, 256),),
}
# With the 32 columns that `least_columns` asks of 8 warps, dz1 would spill 40 bytes at 64 rows.
WGMMA: Tiles = {**TMA, ("hyper_attention_dz1", 2): (_square(32, 64, 8, 128),)}
# With 4 warps ptxas spills 16 bytes on sm_110, though not on sm_100.
TCGEN05_110: Tiles = {**TMA, ("hyper_attention_out", 2): (_square(64, 64, 8, 256),)}
INTERPRETED: Tiles = {key: (_square(32, 16, 4, 16),) for key in MMA}
