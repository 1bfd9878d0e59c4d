"""A row tile's operands: of queries, of the mixings, of the norm."""

from __future__ import annotations

import triton
import triton.language as tl

from .band import load_packed, row_values, rows_of


@triton.jit
def first_rows(ptr, b, a, m0, T, P: tl.constexpr):
    """A row tile of the first mixing's z or dh; without it a 0 that nothing reads."""
    HEADS: tl.constexpr = P.sub_heads
    RANK: tl.constexpr = P.rank1
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r1
    if P.rank1 == 0:
        rows = 0.0
    else:
        rows = load_packed(ptr, b, a, m0, T, HEADS, RANK, BLOCK, BLOCK_R)
    return rows


@triton.jit
def second_rows(ptr, b, a, m0, T, P: tl.constexpr):
    """The same of the second mixing."""
    HEADS: tl.constexpr = P.heads
    RANK: tl.constexpr = P.rank2
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r2
    if P.rank2 == 0:
        rows = 0.0
    else:
        rows = load_packed(ptr, b, a, m0, T, HEADS, RANK, BLOCK, BLOCK_R)
    return rows


@triton.jit
def both_first_rows(ptr, b, i, m0, T, P: tl.constexpr):
    """`first_rows` of sub-heads i and i + H; of the "relu" kind, of i twice."""
    HEADS: tl.constexpr = P.heads
    one = first_rows(ptr, b, i, m0, T, P)
    other = one
    if P.glu:
        other = first_rows(ptr, b, i + HEADS, m0, T, P)
    return one, other


@triton.jit
def row_operands(core, b, i, m0, T, P: tl.constexpr):
    """(q1, q2, z1, z2) of a row tile."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    q1 = rows_of(core.q, b, i, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
    z1 = first_rows(core.first.z_ptr, b, i, m0, T, P)
    q2 = q1
    z2 = z1
    if P.glu:
        q2 = rows_of(core.q, b, i + HEADS, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
        z2 = first_rows(core.first.z_ptr, b, i + HEADS, m0, T, P)
    return q1, q2, z1, z2


@triton.jit
def row_factor(core, b, i, m0, T, P: tl.constexpr):
    """n of a row tile, or 1 without a norm."""
    BLOCK: tl.constexpr = P.block
    HEADS: tl.constexpr = P.heads
    if P.normed:
        n = row_values(core.n_ptr, b, i, m0, T, HEADS, BLOCK)
    else:
        n = tl.full((BLOCK,), 1.0, tl.float32)
    return n
