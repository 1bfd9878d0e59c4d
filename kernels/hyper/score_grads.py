"""The gradients of one tile of hyper_attention: of its weights Y, of the mixed scores P, of the
scores S."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import rounded
from .band import expand, gate_grads, gathered, keep, products, row_values, rows_of, visible
from .scores import both_first_rows, both_mixed, both_queries, expand_first, row_factor, second_rows


@triton.jit
def value_grads(do0, n, core, do, b, i, m0, n0, T, P: tl.constexpr):
    """dY of a tile: n dO v'."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_v
    v0 = rows_of(core.v, b, i, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
    dY = products(do0, v0, do, core.v, b, i, m0, n0, T, core.width_v, P, WIDTH)
    return tl.where(visible(m0, n0, BLOCK), dY * n[:, None], 0.0)


@triton.jit
def norm_coefficient(coefficient_ptr, n, b, i, m0, T, P: tl.constexpr):
    """A row tile of coefficient_kernel's; without a norm what nothing reads."""
    BLOCK: tl.constexpr = P.block
    HEADS: tl.constexpr = P.heads
    coefficient = n
    if P.normed:
        coefficient = row_values(coefficient_ptr, b, i, m0, T, HEADS, BLOCK)
    return coefficient


@triton.jit
def expand_grads(low, z1, z2, dh3, core, i, m0, n0, L, P: tl.constexpr):
    """The bands of F1, F2 and dh3 u2', from `low` on. The caller sets the barrier."""
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r2
    RANK: tl.constexpr = P.rank2
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    PRECISION: tl.constexpr = P.precision
    expand_first(low, low + REGION, z1, z2, core, i, m0, n0, L, P)
    if P.rank2 > 0:
        u = core.second.u
        expand(low + 2 * REGION, dh3, u, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)


@triton.jit
def mixed_grads(low, P1, P2, dY, coefficient, core, i, m0, n0, L, P: tl.constexpr):
    """dP1 and dP2 of a tile, behind expand_grads and a barrier."""
    BLOCK: tl.constexpr = P.block
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    GLU: tl.constexpr = P.glu
    NORMED: tl.constexpr = P.normed
    SHORT: tl.constexpr = P.short2
    dA = dY
    if P.rank2 > 0:
        dA = dA * keep(core.second.d, i, m0, n0, L, SHORT, BLOCK)
        dA = dA + gathered(low + 2 * REGION, BLOCK)
    # P1 is 0 where nothing is seen, so both gradients are.
    return gate_grads(dA, P1, P2, coefficient, GLU, NORMED)


@triton.jit
def _before_mixing(dP, band, core, a, m0, n0, L, P: tl.constexpr):
    """dS of one sub-head's tile, whose band of dh u' lies in `band`."""
    BLOCK: tl.constexpr = P.block
    SHORT: tl.constexpr = P.short1
    dS = dP * keep(core.first.d, a, m0, n0, L, SHORT, BLOCK) + gathered(band, BLOCK)
    return tl.where(visible(m0, n0, BLOCK), dS, 0.0)


@triton.jit
def score_grads(low, core, do, coefficient_ptr, b, i, m0, n0, T, L, P: tl.constexpr):
    """dS of both sub-heads' tile. The bands lie in `low`, which the next tile must not use. A row
    tile's operands are loaded again for every tile: kept, they would spill."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r1
    RANK: tl.constexpr = P.rank1
    HEADS: tl.constexpr = P.heads
    WIDTH_V: tl.constexpr = P.width_v
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    third = low + 3 * REGION
    last = low + 4 * REGION
    do0 = rows_of(do, b, i, m0, 0, T, WIDTH_V, BLOCK, BLOCK_D)
    q1, q2 = both_queries(core, b, i, m0, 0, T, P)
    n = row_factor(core, b, i, m0, T, P)
    coefficient = norm_coefficient(coefficient_ptr, n, b, i, m0, T, P)
    z1, z2 = both_first_rows(core.first.z_ptr, b, i, m0, T, P)
    dh1, dh2 = both_first_rows(core.first.dh_ptr, b, i, m0, T, P)
    dh3 = second_rows(core.second.dh_ptr, b, i, m0, T, P)
    expand_grads(low, z1, z2, dh3, core, i, m0, n0, L, P)
    if P.rank1 > 0:
        u = core.first.u
        expand(third, dh1, u, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
        if P.glu:
            expand(last, dh2, u, i + HEADS, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
    if P.rank1 > 0 or P.rank2 > 0:
        tl.debug_barrier()
    dY = value_grads(do0, n, core, do, b, i, m0, n0, T, P)
    P1, P2 = both_mixed(q1, q2, low, low + REGION, core, b, i, m0, n0, T, L, P)
    dS1, dS2 = mixed_grads(low, P1, P2, dY, coefficient, core, i, m0, n0, L, P)
    if P.rank1 > 0:
        dS1 = _before_mixing(dS1, third, core, i, m0, n0, L, P)
        if P.glu:
            dS2 = _before_mixing(dS2, last, core, i + HEADS, m0, n0, L, P)
    dtype: tl.constexpr = core.q.ptr.dtype.element_ty
    return rounded(dS1, dtype), rounded(dS2, dtype)
