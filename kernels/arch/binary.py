"""Tiles of one-bit weights.

block_k (in dx and dh: block_n) lies in one group of 128 weights; a ds tile's columns are a group.
"""

from __future__ import annotations

from .tile import Tile, Tiles

_FWD = ("binary_linear_fwd", "binary_gated_linear_fwd")
_BWD = ("binary_linear_dx", "binary_gated_mlp_bwd")
_FEW = (Tile(16, 64, 128, 4, 3), Tile(16, 32, 32, 4, 2, loads="element"))
_FP32_FEW = (Tile(16, 32, 32, 4, 3), Tile(16, 32, 32, 4, 2, loads="element"))
FP32: Tiles = {
    ("binary_linear_fwd", 4): (
        Tile(32, 32, 32, 8, 3),
        Tile(32, 32, 32, 8, 2, loads="element"),
        *_FP32_FEW,
    ),
    ("binary_gated_linear_fwd", 4): (
        Tile(32, 32, 32, 8, 3),
        Tile(32, 16, 32, 8, 2, loads="element"),
        *_FP32_FEW,
    ),
    **{
        (kernel, 4): (
            Tile(64, 64, 32, 8, 3, subtiles=2),
            Tile(32, 32, 32, 8, 2, loads="element"),
        )
        for kernel in _BWD
    },
    ("binary_linear_ds", 4): (
        Tile(32, 128, 16, 4, 3, subtiles=2),
        Tile(32, 128, 16, 8, 2, subtiles=2, loads="element"),
    ),
}
_ANY = Tile(64, 32, 32, 4, 2, loads="element")
_DH_ANY = Tile(64, 32, 32, 8, 2, loads="element")
_DS_ANY = Tile(32, 128, 16, 4, 2, subtiles=2, loads="element")
MMA: Tiles = {
    ("binary_linear_fwd", 2): (Tile(128, 128, 64, 8, 3), _ANY, *_FEW),
    ("binary_gated_linear_fwd", 2): (Tile(128, 64, 64, 8, 3), _ANY, *_FEW),
    ("binary_linear_dx", 2): (Tile(128, 128, 64, 8, 3), _ANY),
    ("binary_gated_mlp_bwd", 2): (Tile(128, 128, 64, 8, 3, subtiles=4), _DH_ANY),
    ("binary_linear_ds", 2): (Tile(64, 128, 32, 8, 4, subtiles=2), _DS_ANY),
}
TMA: Tiles = {
    ("binary_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        _ANY,
        *_FEW,
    ),
    ("binary_gated_linear_fwd", 2): (
        # A K step is a group of weights, whose scales, gathered by 2 bytes, are loaded once.
        Tile(128, 64, 128, 8, 3, loads="tma"),
        _ANY,
        *_FEW,
    ),
    ("binary_linear_dx", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma"),
        _ANY,
    ),
    ("binary_gated_mlp_bwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        _DH_ANY,
    ),
    ("binary_linear_ds", 2): (
        Tile(64, 128, 64, 4, 4, subtiles=2, loads="tma"),
        _DS_ANY,
    ),
}
# For wgmma by an assembler that keeps registers (assembler.py): signs are multiplied where they are
# made.
WGMMA: Tiles = {
    ("binary_linear_fwd", 2): (
        Tile(256, 128, 64, 8, 4, subtiles=4, loads="tma", weight_left=True),
        Tile(128, 128, 64, 8, 4, subtiles=2, loads="tma", weight_left=True),
        Tile(64, 64, 64, 4, 4, loads="tma", weight_left=True),
        _ANY,
        *_FEW,
    ),
    ("binary_gated_linear_fwd", 2): (
        Tile(128, 64, 64, 4, 4, subtiles=4, loads="tma", weight_left=True),
        Tile(64, 64, 64, 4, 4, subtiles=2, loads="tma", weight_left=True),
        _ANY,
        *_FEW,
    ),
    ("binary_linear_dx", 2): (
        Tile(256, 128, 64, 8, 4, subtiles=4, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 4, subtiles=2, loads="tma", weight_left=True),
        _ANY,
    ),
    ("binary_gated_mlp_bwd", 2): (
        Tile(256, 128, 64, 8, 4, subtiles=8, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 4, subtiles=4, loads="tma", weight_left=True),
        _DH_ANY,
    ),
}
INTERPRETED: Tiles = {
    (kernel, size): (
        Tile(32, 128, 128, 8, 2, subtiles=2, loads="tma", group_m=2, weight_left=True),
        Tile(32, 64, 64, 4, 2, subtiles=2, loads="element", group_m=2),
        *(
            (Tile(16, 64, 64, 4, 2), Tile(16, 64, 64, 4, 2, loads="element"))
            if kernel in _FWD
            else ()
        ),
    )
    for kernel in (*_FWD, *_BWD)
    for size in (2, 4)
} | {
    ("binary_linear_ds", size): tuple(
        Tile(64, 128, 32, 8, 2, subtiles=2, loads=loads, group_m=2) for loads in ("tma", "element")
    )
    for size in (2, 4)
}
