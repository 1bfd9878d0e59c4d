"""How many blocks of a kernel a multiprocessor holds at once."""

from __future__ import annotations

import math

from ..kernels.arch import Arch
from ..kernels.arch.tile import Tile

REGISTERS = 65536  # of each multiprocessor
RESERVED_SHARED = 1024  # of each block, for the system


def blocks_at_once(
    arch: Arch, tile: Tile, registers: int, shared: int, tensor_memory: int = 0
) -> int:
    """Blocks that fit one multiprocessor by registers, shared and tensor memory, and threads."""
    by_threads = arch.threads // (32 * tile.num_warps)
    # A warp gets registers in units of 256.
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = REGISTERS // per_warp // tile.num_warps if registers else by_threads
    by_shared = (arch.shared_memory + RESERVED_SHARED) // (shared + RESERVED_SHARED)
    by_tensors = arch.tensor_memory // tensor_memory if tensor_memory else by_threads
    return min(by_registers, by_shared, by_tensors, by_threads)
