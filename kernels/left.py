"""Weights that a kernel makes in registers, from where wgmma takes its left operand: nothing waits
for such a tile in shared memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED


@triton.jit
def shifts(words_ptr, R, BITS: tl.constexpr, LEFT: tl.constexpr):
    """How far left each of BITS bits is moved to become the highest of them, from the lowest on. If
    LEFT they come by a load that reads nothing, as no matrix has -R rows: Triton moves what makes a
    left operand to registers of the product's layout where all of it is loaded or constant, which
    `tl.arange` is not. As right operands the same would be made by each warp."""
    lanes = tl.arange(0, BITS)
    values = BITS - 1 - lanes
    if LEFT:
        values = tl.load(words_ptr + lanes, mask=lanes < -R, other=values)
    return values.to(tl.uint32)


@triton.jit
def in_registers(tile, LEFT: tl.constexpr):
    """`tile`, which is not multiplied from shared memory if LEFT."""
    if LEFT and not INTERPRETED:
        tile = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=True, pack=2
        )
    return tile
