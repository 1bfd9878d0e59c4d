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
# Backward's passes share tiles, of the size that scores has. No GPU has timed any.
_FP32: Tiles = {
    (f"hyper_attention_{k}", 4): (_square(16, 32, 4, 64),)
    for k in ("h1", "out", "scores", "dz2", "gate", "dq", "dk", "dv", "dslots")
}
# A step of decoding: the fewest sources of a block, how many values of each it loads at once (more
# sources where rows are short), and the most columns.
_STEP: Tiles = {
    ("hyper_attention_step", size): (Tile(64, 128, 64, 4, 1, loads="element"),) for size in (2, 4)
}
_BACKWARD: Tiles = {
    # As many columns as do not spill at a time: on sm_90 16 take 9% longer.
    ("hyper_attention_gate", 2): (_square(64, 32, 4, 128),),
    **{
        (f"hyper_attention_{k}", 2): (_square(64, 64, 4, 128),)
        for k in ("scores", "dz2", "dslots", "dq", "dk", "dv")
    },
}
MMA: Tiles = {
    **_STEP,
    **_FP32,
    **_BACKWARD,
    # With 32 columns Triton 3.6 spills 24 bytes on sm_120.
    ("hyper_attention_gate", 2): (_square(64, 16, 4, 128),),
    ("hyper_attention_out", 2): (_square(64, 64, 8, 128),),
    ("hyper_attention_h1", 2): (_square(64, 64, 8, 128),),
}
TMA: Tiles = {
    **_STEP,
    **_FP32,
    **_BACKWARD,
    # One warp group for 64 rows, so that it has all columns of a product with the ranks.
    ("hyper_attention_h1", 2): (_square(64, 64, 4, 128),),
    ("hyper_attention_out", 2): (_square(64, 64, 4, 256),),
}
# With 4 warps ptxas spills 16 bytes on sm_110, though not on sm_100.
TCGEN05_110: Tiles = {**TMA, ("hyper_attention_out", 2): (_square(64, 64, 8, 256),)}
INTERPRETED: Tiles = {key: (_square(32, 16, 4, 32),) for key in MMA}
