"""Tiles of the masked gated linear; several masks have a row of their own, `_group`."""

from __future__ import annotations

from .tile import (
    ELEMENT,
    FEW,
    FP32_ELEMENT,
    FP32_SKINNY,
    INTERPRETED_SKINNY,
    SKINNY,
    Tile,
    Tiles,
)

_MASKED_SKINNY = (Tile(16, 32, 32, 4, 5), Tile(16, 32, 32, 4, 2, loads="element"))
_MASKED_ELEMENT = Tile(64, 16, 16, 4, 2, loads="element")
FP32: Tiles = {
    ("masked_gated_linear_fwd", 4): (Tile(64, 64, 16, 8, 3), FP32_ELEMENT, *FP32_SKINNY),
    ("masked_gated_linear_fwd_group", 4): (
        Tile(32, 64, 16, 8, 3),
        Tile(32, 32, 16, 8, 2, loads="element"),
        Tile(16, 32, 16, 4, 3),
        Tile(16, 16, 16, 4, 2, loads="element"),
    ),
    ("masked_gated_linear_dx", 4): (Tile(64, 64, 16, 8, 3), FP32_ELEMENT),
    ("masked_gated_linear_dw", 4): (Tile(64, 32, 16, 8, 3), FP32_ELEMENT),
}
MMA: Tiles = {
    ("masked_gated_linear_fwd", 2): (
        Tile(128, 64, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        ELEMENT,
        *SKINNY,
    ),
    ("masked_gated_linear_fwd_group", 2): (
        Tile(128, 32, 32, 8, 4),
        _MASKED_ELEMENT,
        *_MASKED_SKINNY,
    ),
    ("masked_gated_linear_dx", 2): (
        Tile(128, 128, 32, 8, 4, weight_left=True),
        Tile(64, 64, 32, 4, 4, weight_left=True),
        ELEMENT,
    ),
    ("masked_gated_linear_dw", 2): (
        Tile(128, 64, 32, 8, 4, subtiles=2),
        Tile(64, 64, 32, 4, 4, subtiles=2),
        ELEMENT,
    ),
}
TMA: Tiles = {
    ("masked_gated_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        Tile(64, 128, 64, 4, 4, subtiles=4, loads="tma"),
        *FEW[1:],
        ELEMENT,
        *SKINNY,
    ),
    ("masked_gated_linear_fwd_group", 2): (
        Tile(128, 32, 64, 8, 4, loads="tma"),
        _MASKED_ELEMENT,
        *_MASKED_SKINNY,
    ),
    ("masked_gated_linear_dx", 2): (
        Tile(128, 128, 64, 8, 4, loads="tma"),
        Tile(64, 128, 64, 4, 4, loads="tma"),
        ELEMENT,
    ),
    ("masked_gated_linear_dw", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma"),
        ELEMENT,
    ),
}
# For wgmma by an assembler that keeps registers (assembler.py): masked weights are multiplied where
# they are made. tcgen05 takes no operand from registers, so that it gains nothing.
WGMMA: Tiles = {
    ("masked_gated_linear_fwd", 2): (
        Tile(128, 128, 64, 8, 4, subtiles=4, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 4, subtiles=4, loads="tma", weight_left=True),
        *FEW[1:],
        ELEMENT,
        *SKINNY,
    ),
    ("masked_gated_linear_fwd_group", 2): (
        Tile(64, 128, 64, 8, 4, subtiles=2, loads="tma", weight_left=True),
        _MASKED_ELEMENT,
        *_MASKED_SKINNY,
    ),
    ("masked_gated_linear_dx", 2): (
        # 3 stages are what fits. Two products of a step read as many bytes as one of 128 x 128.
        Tile(256, 128, 64, 8, 3, loads="tma", weight_left=True),
        Tile(128, 128, 64, 8, 4, loads="tma", weight_left=True),
        Tile(128, 64, 64, 4, 4, loads="tma", weight_left=True),
        ELEMENT,
    ),
}
INTERPRETED: Tiles = {
    (kernel, size): (
        Tile(32, 64, 32, 8, 2, subtiles=2, loads="tma", group_m=2, weight_left=True),
        Tile(32, 64, 32, 4, 2, subtiles=2, loads="element", group_m=2),
        *(INTERPRETED_SKINNY if "_fwd" in kernel else ()),
    )
    for kernel in (
        "masked_gated_linear_fwd",
        "masked_gated_linear_fwd_group",
        "masked_gated_linear_dx",
        "masked_gated_linear_dw",
    )
    for size in (2, 4)
}
