"""Tiles of the dense family's GEMMs."""

from __future__ import annotations

from .tile import (
    ADAPTED,
    ELEMENT,
    FEW,
    FEW_MMA,
    FP32_ELEMENT,
    FP32_SKINNY,
    INTERPRETED_SKINNY,
    SKINNY,
    Tile,
    Tiles,
    finer,
)

# CUDA cores, unless the caller allows TF32: one set of tiles for every architecture.
FP32: Tiles = {
    ("gated_linear_fwd", 4): (Tile(64, 64, 16, 8, 3, subtiles=2), FP32_ELEMENT, *FP32_SKINNY),
    ("linear_act_fwd", 4): (Tile(64, 64, 16, 8, 3), FP32_ELEMENT, *FP32_SKINNY),
    ("gated_linear_bwd", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), FP32_ELEMENT),
    ("linear_act_bwd", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), FP32_ELEMENT),
}
# mma.sync in 100 KB of shared memory.
MMA: Tiles = {
    ("gated_linear_fwd", 2): (
        Tile(128, 64, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        FEW_MMA,
        ELEMENT,
        *SKINNY,
    ),
    ("linear_act_fwd", 2): (
        Tile(128, 128, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        FEW_MMA,
        ELEMENT,
        *SKINNY,
    ),
    ("gated_linear_bwd", 2): (
        Tile(128, 128, 32, 8, 4, subtiles=4),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        ELEMENT,
    ),
    ("linear_act_bwd", 2): (
        Tile(128, 128, 32, 8, 4, subtiles=4),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        ELEMENT,
    ),
}
_UPRIGHT = Tile(64, 128, 64, 4, 3, subtiles=4, loads="tma", box=64)
# wgmma or tcgen05.
TMA: Tiles = {
    ("gated_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        *FEW,
        ELEMENT,
        *SKINNY,
    ),
    ("linear_act_fwd", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4, loads="tma"),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        *FEW,
        ELEMENT,
        *SKINNY,
    ),
    # The weight on the left: a column of the result is then mostly one thread's, and its sum cheap.
    ("gated_linear_bwd", 2): (
        Tile(256, 128, 64, 8, 3, subtiles=8, loads="tma", weight_left=True),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 3, subtiles=4, loads="tma", weight_left=True),
        ELEMENT,
    ),
    ("linear_act_bwd", 2): (
        Tile(256, 128, 64, 8, 3, subtiles=8, loads="tma", box=64, weight_left=True),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 3, subtiles=2, loads="tma", weight_left=True),
        ELEMENT,
    ),
    # t b' is made upright, and beside little else its way to a transposed result is long. With g
    # and u 256 x 128 spills 32 bytes with mish, and a box of 64 columns 8 at rank 1 (sm_90, Triton
    # 3.9, 2026-12).
    (f"gated_linear_bwd{ADAPTED}", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        _UPRIGHT,
        ELEMENT,
    ),
    (f"linear_act_bwd{ADAPTED}", 2): (
        Tile(256, 128, 64, 8, 3, subtiles=8, loads="tma", weight_left=True),
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma", box=64),
        _UPRIGHT,
        ELEMENT,
    ),
}
INTERPRETED: Tiles = {
    (kernel, size): (
        Tile(32, 32, 32, 8, 2, subtiles, "tma", 2, box, weight_left=left),
        Tile(32, 32, 32, 4, 2, subtiles=subtiles, loads="element", group_m=2),
        *(INTERPRETED_SKINNY if kernel.endswith("_fwd") else ()),
    )
    for kernel, subtiles, box, left in (
        ("gated_linear_fwd", 2, None, False),
        ("linear_act_fwd", 1, None, False),
        ("gated_linear_bwd", 4, 16, True),
        ("linear_act_bwd", 2, 32, True),
    )
    for size in (2, 4)
}


def with_adapters(tiles: Tiles) -> Tiles:
    """Beside each row that has none of its own for calls with adapters, one: forward the product
    t b' has an accumulator of its own for a column part, of which there are twice as many."""
    rows = {
        (f"{kernel}{ADAPTED}", size): _fwd(row) if kernel.endswith("_fwd") else row
        for (kernel, size), row in tiles.items()
        if not kernel.endswith(ADAPTED)
    }
    return {**rows, **tiles}


def _fwd(row: tuple[Tile, ...]) -> tuple[Tile, ...]:
    return tuple(finer(tile) if tile.tma else tile for tile in row)
