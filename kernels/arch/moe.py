"""Tiles of the experts' GEMMs."""

from __future__ import annotations

import dataclasses

from .tile import ELEMENT, FP32_ELEMENT, Tile, Tiles

# moe_up holds two accumulators.
FP32: Tiles = {
    ("moe_up", 4): (Tile(64, 64, 16, 8, 3, subtiles=2), Tile(16, 64, 16, 4, 3), FP32_ELEMENT),
    ("moe_down", 4): (Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3), FP32_ELEMENT),
    ("moe_dh", 4): (Tile(64, 64, 32, 8, 3, subtiles=4), Tile(16, 64, 32, 4, 3), FP32_ELEMENT),
    ("moe_wgrad", 4): (Tile(64, 64, 32, 8, 3), FP32_ELEMENT),
}
# The tile is chosen by the rows that an expert has, hence tiles for few rows.
_MOE_FEW = (Tile(32, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4))
MMA: Tiles = {
    ("moe_up", 2): (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4), *_MOE_FEW, ELEMENT),
    ("moe_down", 2): (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), *_MOE_FEW, ELEMENT),
    ("moe_dh", 2): (
        Tile(128, 128, 32, 8, 4, subtiles=4),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        *_MOE_FEW,
        ELEMENT,
    ),
    ("moe_wgrad", 2): (Tile(128, 128, 32, 8, 5), Tile(64, 64, 32, 4, 5), ELEMENT),
}
_MOE_FEW_TMA = tuple(dataclasses.replace(tile, loads="tma") for tile in _MOE_FEW)
# Weights by TMA, and rows in expert order; gathered rows by 16-byte loads.
TMA: Tiles = {
    ("moe_up", 2): (
        # Two subtiles spill under Triton 3.6 with an activation that takes an erf.
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        *_MOE_FEW_TMA,
        ELEMENT,
    ),
    ("moe_down", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        *_MOE_FEW_TMA,
        ELEMENT,
    ),
    ("moe_dh", 2): (
        # Parts of 32 columns spill with gates of two operands.
        Tile(128, 256, 64, 8, 3, subtiles=16, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        *_MOE_FEW_TMA,
        ELEMENT,
    ),
    # Its depth is an expert's rows: TMA would read those of the next into the sum.
    ("moe_wgrad", 2): (
        Tile(128, 256, 64, 8, 3, subtiles=4),
        Tile(64, 128, 64, 4, 4, subtiles=2),
        ELEMENT,
    ),
}
INTERPRETED: Tiles = {
    (kernel, size): (
        Tile(
            32,
            32,
            32,
            4,
            2,
            subtiles=2,
            loads="vector" if kernel == "moe_wgrad" else "tma",
            group_m=2,
        ),
        Tile(16, 32, 32, 8, 2, loads="vector" if kernel == "moe_wgrad" else "tma", group_m=2),
        Tile(32, 32, 32, 4, 2, subtiles=2, loads="element", group_m=2),
    )
    for kernel in ("moe_up", "moe_down", "moe_dh", "moe_wgrad")
    for size in (2, 4)
}
