"""The backward of hyper_attention. Every kernel makes the scores, the mixing and the gate of a tile
again from q, k, v and what the forward left: h1, h2, n.

| kernel | computes | by |
|---|---|---|
| coefficient_kernel | n^2 (dO . O), the norm's part of dP1 | row tile |
| dz2_kernel | dz2 = dY vt2' | row tile; only with the second mixing |
| dz1_kernel | dz1 = dP vt1' | row tile; only with the first |
| dq_kernel | dq = dS k | row tile and part of q's width |
| dk_kernel | dk = dS' q | column tile and part of k's width |
| dv_kernel | dv = Y' dO | column tile and part of v's width |
| slots.py's slots_kernel | du, dvt, dd of both mixings | diagonal |

A row's dP needs the whole of dz2, and its dS the whole of dz1: hence the passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, rounded
from .band import (
    clear,
    fresh,
    gate_of,
    place,
    reduce,
    row_values,
    rows_of,
    spread,
    store_conditioned,
    store_rows,
)
from .score_grads import expand_grads, mixed_grads, norm_coefficient, score_grads, value_grads
from .scores import (
    both_mixed,
    both_queries,
    expand_values,
    row_factor,
    row_operands,
    second_rows,
    weights,
)


@triton.jit
def coefficient_kernel(do, out, n_ptr, coefficient_ptr, T, eps, P: tl.constexpr):
    # One dimension of the grid: the others end at 65,535, below B H of a large batch.
    do = fresh(do)
    out = fresh(out)
    BLOCK: tl.constexpr = P.block
    BLOCK_V: tl.constexpr = P.block_v
    WIDTH: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    tiles = tl.cdiv(T, BLOCK)
    m0 = tl.program_id(0) % tiles * BLOCK
    i = tl.program_id(0) // tiles % HEADS
    b = tl.program_id(0) // tiles // HEADS
    total = tl.zeros((BLOCK,), tl.float32)
    for d in tl.range(0, WIDTH, BLOCK_V):
        grad = rows_of(do, b, i, m0, d, T, WIDTH, BLOCK, BLOCK_V).to(tl.float32)
        total += tl.sum(grad * rows_of(out, b, i, m0, d, T, WIDTH, BLOCK, BLOCK_V), 1)
    n = row_values(n_ptr, b, i, m0, T, HEADS, BLOCK)
    # A clamped norm is constant; n eps is 1 there but for rounding.
    value = tl.where(n * eps < 0.999999, total * n * n, 0.0)
    offs_t = m0 + tl.arange(0, BLOCK)
    base = coefficient_ptr + (tl.cast(b, tl.int64) * HEADS + i) * T
    tl.store(base + offs_t, value, mask=offs_t < T)


@triton.jit
def dz2_kernel(core, do, c, dz_ptr, scratch_ptr, batch, T, L, P: tl.constexpr):
    core = fresh(core)
    do = fresh(do)
    c = fresh(c)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r2
    WIDTH: tl.constexpr = P.width_v
    RANK: tl.constexpr = P.rank2
    HEADS: tl.constexpr = P.heads
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * REGION)
    clear(region, 2, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, _ = place(index, batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        n = row_factor(core, b, i, m0, T, P)
        do0 = rows_of(do, b, i, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
        acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            side = region + n0 // BLOCK % 2 * REGION
            spread(side, value_grads(do0, n, core, do, b, i, m0, n0, T, P), BLOCK)
            tl.debug_barrier()
            vt = core.second.vt
            acc = reduce(acc, side, vt, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
        tl.debug_barrier()
        store_conditioned(
            dz_ptr, c, core.second.dh_ptr, b, i, m0, T, acc, HEADS, RANK, BLOCK, BLOCK_R
        )


@triton.jit
def dz1_kernel(core, do, c, dz_ptr, coefficient_ptr, scratch_ptr, batch, T, L, P: tl.constexpr):
    core = fresh(core)
    do = fresh(do)
    c = fresh(c)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r1
    WIDTH_V: tl.constexpr = P.width_v
    RANK: tl.constexpr = P.rank1
    HEADS: tl.constexpr = P.heads
    SUB_HEADS: tl.constexpr = P.sub_heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (5 * REGION)
    low = region + 2 * REGION
    clear(region, 2, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, _ = place(index, batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        n = row_factor(core, b, i, m0, T, P)
        coefficient = norm_coefficient(coefficient_ptr, n, b, i, m0, T, P)
        do0 = rows_of(do, b, i, m0, 0, T, WIDTH_V, BLOCK, BLOCK_D)
        q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
        dh3 = second_rows(core.second.dh_ptr, b, i, m0, T, P)
        acc1 = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        acc2 = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            expand_grads(low, z1, z2, dh3, core, i, m0, n0, L, P)
            tl.debug_barrier()
            dY = value_grads(do0, n, core, do, b, i, m0, n0, T, P)
            P1, P2 = both_mixed(q1, q2, low, low + REGION, core, b, i, m0, n0, T, L, P)
            dP1, dP2 = mixed_grads(low, P1, P2, dY, coefficient, core, i, m0, n0, L, P)
            spread(region, dP1, BLOCK)
            if GLU:
                spread(region + REGION, dP2, BLOCK)
            tl.debug_barrier()
            vt = core.first.vt
            acc1 = reduce(acc1, region, vt, i, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
            if GLU:
                acc2 = reduce(
                    acc2, region + REGION, vt, i + HEADS, m0, n0, L,
                    RANK, BLOCK, BLOCK_R, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()
        dh = core.first.dh_ptr
        store_conditioned(dz_ptr, c, dh, b, i, m0, T, acc1, SUB_HEADS, RANK, BLOCK, BLOCK_R)
        if GLU:
            store_conditioned(
                dz_ptr, c, dh, b, i + HEADS, m0, T, acc2, SUB_HEADS, RANK, BLOCK, BLOCK_R
            )


@triton.jit
def dq_kernel(core, do, dq, coefficient_ptr, scratch_ptr, batch, T, L, parts, P: tl.constexpr):
    core = fresh(core)
    do = fresh(do)
    dq = fresh(dq)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (10 * REGION)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS * parts, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, part = place(index, batch, HEADS, parts)
        m0 = (tiles - 1 - order) * BLOCK
        d0 = part * BLOCK_D
        acc1 = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        acc2 = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            low = region + n0 // BLOCK % 2 * (5 * REGION)
            dS1, dS2 = score_grads(low, core, do, coefficient_ptr, b, i, m0, n0, T, L, P)
            k1 = rows_of(core.k, b, i, n0, d0, T, WIDTH, BLOCK, BLOCK_D)
            acc1 = dot(dS1, k1, acc1, PRECISION)
            if GLU:
                k2 = rows_of(core.k, b, i + HEADS, n0, d0, T, WIDTH, BLOCK, BLOCK_D)
                acc2 = dot(dS2, k2, acc2, PRECISION)
        tl.debug_barrier()
        store_rows(dq, b, i, m0, d0, T, acc1, WIDTH, BLOCK, BLOCK_D)
        if GLU:
            store_rows(dq, b, i + HEADS, m0, d0, T, acc2, WIDTH, BLOCK, BLOCK_D)


@triton.jit
def dk_kernel(core, do, dk, coefficient_ptr, scratch_ptr, batch, T, L, parts, P: tl.constexpr):
    core = fresh(core)
    do = fresh(do)
    dk = fresh(dk)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (10 * REGION)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS * parts, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, part = place(index, batch, HEADS, parts)
        n0 = order * BLOCK
        d0 = part * BLOCK_D
        acc1 = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        acc2 = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for m0 in tl.range(n0, T, BLOCK, disable_licm=True):
            low = region + m0 // BLOCK % 2 * (5 * REGION)
            dS1, dS2 = score_grads(low, core, do, coefficient_ptr, b, i, m0, n0, T, L, P)
            q1, q2 = both_queries(core, b, i, m0, d0, T, P)
            acc1 = dot(dS1.T, q1, acc1, PRECISION)
            if GLU:
                acc2 = dot(dS2.T, q2, acc2, PRECISION)
        tl.debug_barrier()
        store_rows(dk, b, i, n0, d0, T, acc1, WIDTH, BLOCK, BLOCK_D)
        if GLU:
            store_rows(dk, b, i + HEADS, n0, d0, T, acc2, WIDTH, BLOCK, BLOCK_D)


@triton.jit
def dv_kernel(core, do, dv, scratch_ptr, batch, T, L, parts, P: tl.constexpr):
    core = fresh(core)
    do = fresh(do)
    dv = fresh(dv)
    BLOCK: tl.constexpr = P.block
    BLOCK_V: tl.constexpr = P.block_v
    WIDTH_V: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (6 * REGION)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS * parts, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, part = place(index, batch, HEADS, parts)
        n0 = order * BLOCK
        d0 = part * BLOCK_V
        acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
        for m0 in tl.range(n0, T, BLOCK, disable_licm=True):
            low = region + m0 // BLOCK % 2 * (3 * REGION)
            n = row_factor(core, b, i, m0, T, P)
            q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
            z3 = second_rows(core.second.z_ptr, b, i, m0, T, P)
            expand_values(low, z1, z2, z3, core, i, m0, n0, L, P)
            P1, P2 = both_mixed(q1, q2, low, low + REGION, core, b, i, m0, n0, T, L, P)
            A = gate_of(P1, P2, GLU) * n[:, None]
            Y = weights(A, low + 2 * REGION, core, i, m0, n0, L, P)
            grad = rows_of(do, b, i, m0, d0, T, WIDTH_V, BLOCK, BLOCK_V)
            acc = dot(rounded(Y, grad.dtype).T, grad, acc, PRECISION)
        tl.debug_barrier()
        store_rows(dv, b, i, n0, d0, T, acc, WIDTH_V, BLOCK, BLOCK_V)
