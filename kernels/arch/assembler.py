"""Triton's assembler, ptxas, and the rows of tiles that wait for a newer one.

wgmma takes its left operand from registers or from shared memory. An older ptxas lets a later
instruction overwrite such registers before wgmma has read them, so that numbers are wrong and
nothing says so. Which ptxas runs is Triton's choice, by its version and the GPU, or the user's, by
an environment variable; hence it is asked, not told by Triton's version.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from .tile import Tile, Tiles

# The first ptxas that keeps them: "CUDA Tools" in the release notes of CUDA 13.3. Wrong results by
# 12.8.93 and 12.9.86 are in triton-lang/triton#11781 and fla-org/flash-linear-attention#1262.
KEEPS_REGISTERS = (13, 3)


@functools.cache
def assembler(capability: int) -> str:
    """The version of the ptxas that Triton runs for such a GPU. It is asked once in a process, as
    Triton asks for the keys of its cache: what is chosen by it needs no key of its own."""
    # Not above: tables are read where Triton is not imported yet, and most have no use for it.
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).version)


def keeps_registers(version: str) -> bool:
    """Does this ptxas keep the registers that wgmma reads?"""
    return tuple(map(int, version.split(".")))[:2] >= KEEPS_REGISTERS


class ByAssembler(Mapping[tuple[str, int], tuple[Tile, ...]]):
    """`rows` of tiles, in which those of `from_registers` stand where the assembler keeps the
    registers that wgmma reads: the one place where tiles are chosen by it."""

    def __init__(self, capability: int, rows: Tiles, from_registers: Tiles) -> None:
        self.capability, self.rows, self.from_registers = capability, rows, from_registers

    def __getitem__(self, key: tuple[str, int]) -> tuple[Tile, ...]:
        if key in self.from_registers and keeps_registers(assembler(self.capability)):
            return self.from_registers[key]
        return self.rows[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
