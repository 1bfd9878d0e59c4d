"""The table of GPU generations: what each has, and which tiles its kernels may use.

Host code asks a row for what it has and never for its name, so a new generation is one row here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from . import binary, dense, hyper, masked, moe
from .tile import Tile, Tiles


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: choices are cached by Arch
class Arch:
    """capability: 10 * major + minor of the first GPU it serves. shared_memory: bytes a block may
    use. hyper: of hyper_attention's kernels, which have one tile each for any strides and sizes."""

    name: str
    capability: int
    shared_memory: int
    tma: bool
    tiles: Tiles
    hyper: Tiles = field(default_factory=dict)

    def row(self, kernel: str, size: int) -> tuple[Tile, ...]:
        return self.hyper.get((kernel, size)) or self.tiles[kernel, size]

    def with_row(self, kernel: str, size: int, tiles: tuple[Tile, ...]) -> Arch:
        key = kernel, size
        if key in self.hyper:
            return dataclasses.replace(self, hyper={**self.hyper, key: tiles})
        return dataclasses.replace(self, tiles={**self.tiles, key: tiles})


_FP32 = {**dense.FP32, **masked.FP32, **moe.FP32, **binary.FP32}
_MMA = {**_FP32, **dense.MMA, **masked.MMA, **moe.MMA, **binary.MMA}
_TMA = {**_FP32, **dense.TMA, **masked.TMA, **moe.TMA, **binary.TMA}
_INTERPRETED = {
    **dense.INTERPRETED,
    **masked.INTERPRETED,
    **moe.INTERPRETED,
    **binary.INTERPRETED,
}

ARCHES: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 80, 166_912, False, _MMA, hyper.MMA),
        Arch("sm_86", 86, 101_376, False, _MMA, hyper.MMA),
        Arch("sm_90", 90, 232_448, True, _TMA, hyper.TMA),
        Arch("sm_100", 100, 232_448, True, _TMA, hyper.TMA),
        Arch("sm_120", 120, 101_376, False, _MMA, hyper.MMA),
    )
}
# CPU tensors, in Triton's interpreter.
INTERPRETER = Arch("interpreter", 0, 1 << 30, True, _INTERPRETED, hyper.INTERPRETED)
