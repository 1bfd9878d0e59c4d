"""Code that assembles and is known to go wrong on a GPU: what the gates of Triton's kernels and of
csrc/ look for in PTX and in machine code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...kernels.arch.assembler import KEEPS_REGISTERS, keeps_registers

# A grid's y and z end here, its x at 2^31 - 1 (CUDA Programming Guide, "Compute Capabilities").
MOST_BLOCKS = 65_535
# wgmma of 8 columns whose second operand is contiguous along them: half a row of a 32-byte swizzle.
# In PTX the last immediate says so, for 16-bit types alone.
_NARROW = re.compile(r"wgmma\.mma_async\S*\.m64n8k16\.[^;]*,\s*1\s*;|HGMMA\.64x8x16[^;]*\.tnspB")
# wgmma whose first operand is registers, not a descriptor.
_FROM_REGISTERS = re.compile(
    r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{|\b[A-Z]GMMA\.\S+\s+R\d+,\s*R\d+"
)


def in_code(code: str, assembler: str) -> list[str]:
    """What is wrong with PTX, or with a disassembly; assembler: the version of its ptxas."""
    faults = []
    if _NARROW.search(code):
        faults.append("wgmma of 8 columns along which B is contiguous")
    if not keeps_registers(assembler) and _FROM_REGISTERS.search(code):
        needed = ".".join(map(str, KEEPS_REGISTERS))
        faults.append(f"wgmma from registers by ptxas {assembler}, older than {needed}")
    return faults


def in_grid(grid: Sequence[int]) -> list[str]:
    """A grid that no GPU launches."""
    return [
        f"grid.{name} {blocks} > {MOST_BLOCKS}"
        for name, blocks in zip("yz", grid[1:], strict=False)
        if blocks > MOST_BLOCKS
    ]
