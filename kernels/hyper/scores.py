"""One tile of hyper_attention's scores, mixed and weighted: what every pass makes again from q, k
and z."""

from __future__ import annotations

import triton
import triton.language as tl

from .band import expand, gathered, keep, load_packed, products, row_values, rows_of, visible


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
def both_queries(core, b, i, m0, d0, T, P: tl.constexpr):
    """Columns from d0 of the queries of sub-heads i and i + H; of the "relu" kind, of i twice."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    one = rows_of(core.q, b, i, m0, d0, T, WIDTH, BLOCK, BLOCK_D)
    other = one
    if P.glu:
        other = rows_of(core.q, b, i + HEADS, m0, d0, T, WIDTH, BLOCK, BLOCK_D)
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


@triton.jit
def expand_first(low1, low2, z1, z2, core, i, m0, n0, L, P: tl.constexpr):
    """The bands of both sub-heads' low-rank terms. The caller sets the barrier."""
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r1
    RANK: tl.constexpr = P.rank1
    PRECISION: tl.constexpr = P.precision
    HEADS: tl.constexpr = P.heads
    if P.rank1 > 0:
        vt = core.first.vt
        expand(low1, z1, vt, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
        if P.glu:
            expand(low2, z2, vt, i + HEADS, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)


@triton.jit
def expand_values(low, z1, z2, z3, core, i, m0, n0, L, P: tl.constexpr):
    """The bands of both mixings' low-rank terms, from `low` on; then a barrier."""
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r2
    RANK: tl.constexpr = P.rank2
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    PRECISION: tl.constexpr = P.precision
    expand_first(low, low + REGION, z1, z2, core, i, m0, n0, L, P)
    if P.rank2 > 0:
        vt = core.second.vt
        expand(low + 2 * REGION, z3, vt, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
    if P.rank1 > 0 or P.rank2 > 0:
        tl.debug_barrier()


@triton.jit
def scores_and_mixed(q0, region, core, b, a, m0, n0, T, L, P: tl.constexpr):
    """S, yet unmasked, and P of one sub-head's tile, whose band of low rank lies in `region`."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    SHORT: tl.constexpr = P.short1
    k0 = rows_of(core.k, b, a, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
    S = products(q0, k0, core.q, core.k, b, a, m0, n0, T, core.width_qk, P, WIDTH)
    out = S
    if P.rank1 > 0:
        out = out * keep(core.first.d, a, m0, n0, L, SHORT, BLOCK) + gathered(region, BLOCK)
    return S, tl.where(visible(m0, n0, BLOCK), out, 0.0)


@triton.jit
def both_scores(q1, q2, low1, low2, core, b, i, m0, n0, T, L, P: tl.constexpr):
    """(S1, P1, S2, P2) of a head's tile, behind expand_first and a barrier."""
    HEADS: tl.constexpr = P.heads
    S1, P1 = scores_and_mixed(q1, low1, core, b, i, m0, n0, T, L, P)
    S2 = S1
    P2 = P1
    if P.glu:
        S2, P2 = scores_and_mixed(q2, low2, core, b, i + HEADS, m0, n0, T, L, P)
    return S1, P1, S2, P2


@triton.jit
def both_mixed(q1, q2, low1, low2, core, b, i, m0, n0, T, L, P: tl.constexpr):
    _, P1, _, P2 = both_scores(q1, q2, low1, low2, core, b, i, m0, n0, T, L, P)
    return P1, P2


@triton.jit
def weights(A, third, core, i, m0, n0, L, P: tl.constexpr):
    """Y of a tile, whose band of low rank lies in `third`."""
    BLOCK: tl.constexpr = P.block
    SHORT: tl.constexpr = P.short2
    if P.rank2 == 0:
        Y = A
    else:
        Y = A * keep(core.second.d, i, m0, n0, L, SHORT, BLOCK) + gathered(third, BLOCK)
        Y = tl.where(visible(m0, n0, BLOCK), Y, 0.0)
    return Y
