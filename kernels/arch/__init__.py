"""The table of GPU generations: what each has, and which tiles its kernels may use.

Host code asks a row for what it has and never for its name, so a new generation is one row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from . import binary, dense, hyper, masked, moe
from .assembler import ByAssembler
from .roof import B200, H100, H200, Roof
from .tile import Tile, Tiles

# Each of 32 bits; a block may have all of a multiprocessor's.
TENSOR_MEMORY_LANES = 128
TENSOR_MEMORY = 512


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: choices are cached by Arch
class Arch:
    """One generation.

    name: what people and the command line call it; no code asks for it.
    capability: 10 * major + minor of the first GPU it serves.
    mma: the instruction that multiplies 16-bit tiles.
    shared_memory: bytes a block may use.
    threads: how many a multiprocessor holds at once.
    tiles; hyper: of hyper_attention's kernels, which have one tile each for any strides and sizes.
    roofs: GPUs of this generation whose datasheet is known.
    thorough: the gate compiles its kernels in more variants than those of other rows.
    """

    name: str
    capability: int
    mma: Literal["mma.sync", "wgmma", "tcgen05"]
    shared_memory: int
    threads: int
    tiles: Tiles = field(repr=False)
    hyper: Tiles = field(default_factory=dict, repr=False)
    roofs: tuple[Roof, ...] = ()
    thorough: bool = False

    @property
    def tma(self) -> bool:
        """Do its tiles move by TMA? wgmma and tcgen05 read what TMA left in shared memory, while
        mma.sync reads registers; hence sm_120, which has TMA too, does without."""
        return self.mma != "mma.sync"

    @property
    def tensor_memory(self) -> int:
        """Columns of TENSOR_MEMORY_LANES accumulators that a block may have outside registers."""
        return TENSOR_MEMORY if self.mma == "tcgen05" else 0

    def row(self, kernel: str, size: int) -> tuple[Tile, ...]:
        return self.hyper.get((kernel, size)) or self.tiles[kernel, size]

    def with_row(self, kernel: str, size: int, tiles: tuple[Tile, ...]) -> Arch:
        key = kernel, size
        if key in self.hyper:
            return replace(self, hyper={**self.hyper, key: tiles})
        return replace(self, tiles={**self.tiles, key: tiles})

    def resembles(self, other: Arch) -> bool:
        """Would kernels compiled for the one run on the other, but for its shared memory? The same
        tiles, the same instructions, and one of CUDA's families: those of one major version."""
        return (
            self.tiles == other.tiles
            and self.hyper == other.hyper
            and self.mma == other.mma
            and self.capability // 10 == other.capability // 10
        )


_FP32 = {**dense.with_adapters(dense.FP32), **masked.FP32, **moe.FP32, **binary.FP32}
_MMA = {**_FP32, **dense.with_adapters(dense.MMA), **masked.MMA, **moe.MMA, **binary.MMA}
_TMA = {**_FP32, **dense.with_adapters(dense.TMA), **masked.TMA, **moe.TMA, **binary.TMA}
_WGMMA = ByAssembler(90, _TMA, {**masked.WGMMA, **binary.WGMMA})
# Registers that hold g and u are spilled beside tcgen05's accumulators, read from tensor memory.
_TCGEN05 = {key: tuple(replace(tile, box=None) for tile in row) for key, row in _TMA.items()}
_INTERPRETED = {
    **dense.with_adapters(dense.INTERPRETED),
    **masked.INTERPRETED,
    **moe.INTERPRETED,
    **binary.INTERPRETED,
}

# Sizes are the CUDA Programming Guide's, "Compute Capabilities".
ARCHES: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 80, "mma.sync", 166_912, 2048, _MMA, hyper.MMA),
        Arch("sm_86", 86, "mma.sync", 101_376, 1536, _MMA, hyper.MMA),
        # The GPU that the tiles are made for.
        Arch("sm_90", 90, "wgmma", 232_448, 2048, _WGMMA, hyper.TMA, (H100, H200), thorough=True),
        Arch("sm_100", 100, "tcgen05", 232_448, 2048, _TCGEN05, hyper.TMA, (B200,)),
        Arch("sm_103", 103, "tcgen05", 232_448, 2048, _TCGEN05, hyper.TMA),
        # Thor, which CUDA 12 called sm_101.
        Arch("sm_110", 110, "tcgen05", 232_448, 1536, _TCGEN05, hyper.TCGEN05_110),
        Arch("sm_120", 120, "mma.sync", 101_376, 1536, _MMA, hyper.MMA),
    )
}
# CPU tensors, in Triton's interpreter, which needs no registers: tiles as for TMA.
INTERPRETER = Arch("interpreter", 0, "wgmma", 1 << 30, 2048, _INTERPRETED, hyper.INTERPRETED)


def arch_for(capability: int) -> Arch:
    """The row that serves such a GPU: the newest not newer than it. LookupError before sm_80."""
    older = [arch for arch in ARCHES.values() if arch.capability <= capability]
    if not older:
        oldest = min(arch.capability for arch in ARCHES.values())
        raise LookupError(
            f"compute capability {oldest / 10} or newer is needed, got {capability / 10}"
        )
    return max(older, key=lambda arch: arch.capability)
