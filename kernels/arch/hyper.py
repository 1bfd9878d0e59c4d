"""Tiles of hyper_attention's passes and of its step: one each, for any strides and sizes."""

from __future__ import annotations

from .tile import Tile, Tiles


def _square(rows: int, width: int, warps: int, values: int) -> Tile:
    """A square tile of scores: block_k columns of q and k at a time, block_n of v in an
    accumulator."""
    return Tile(rows, values, width, warps, 1, loads="element")


# (kernel, bytes of an element) -> tile of hyper_attention's passes; strides are free everywhere.
# Fewer rows where more would spill under Triton 3.6: 3.9 has room for 64 in dslots on sm_90 and
# sm_100, and for 32 in dq. No GPU has timed them.
_FP32: Tiles = {
    (f"hyper_attention_{k}", 4): (_square(16, 32, 4, 64),)
    for k in ("h1", "h2", "out", "dz2", "dz1", "dq", "dk", "dv", "dslots")
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
    **{
        (f"hyper_attention_{k}", 2): (_square(32, 64, 8, 128),)
        for k in ("h2", "out", "dz1", "dk", "dv")
    },
    **{(f"hyper_attention_{k}", 2): (_square(64, 64, 8, 128),) for k in ("h1", "dz2")},
}
TMA: Tiles = {
    **_STEP,
    **_FP32,
    **{key: (tile,) for key, tile in _SMALL.items()},
    **{(f"hyper_attention_{k}", 2): (_square(64, 64, 8, 128),) for k in ("h1", "h2", "dz2", "dz1")},
    **{(f"hyper_attention_{k}", 2): (_square(32, 64, 8, 128),) for k in ("out", "dk", "dv")},
}
INTERPRETED: Tiles = {key: (_square(32, 16, 4, 16),) for key in MMA}
