"""The backward of hyper_attention, a chunk of rows at a time. All of a chunk's tiles are made once,
by lag, from q, k, v and what the forward left, h1, h2 and n, and kept until its last kernel.

| kernel | computes | by |
|---|---|---|
| coefficient_kernel | n^2 (dO . O), the norm's part of dP1 | row tile |
| scores_kernel | S | segment of a row tile |
| dz2_kernel | dY = n dO v', parts of dz2 = dY vt2' | segment of a row tile |
| gate_kernel | A, dP, parts of dz1 = dP vt1' | segment of a row tile |
| sum_kernel | dz2 or dz1 of its parts | row tile |
| slots.py's slots_kernel | du, dvt, dd of a mixing; Y of A, or dS of dP | lag tile |
| products.py's dq_kernel | dq = dS k | row tile and part of q's width |
| products.py's columns_kernel | dk = dS' q, or dv = Y' dO | column tile and part of the width |

A row's dP needs the whole of dz2, and its dS and du1 the whole of dz1: hence two walks over a row,
and slots_kernel behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, rounded
from .band import fresh, gate_slopes, products, row_values, rows_of, store_conditioned
from .chunks import (
    CHUNK,
    SCORE_GRADS,
    SCORES,
    SECOND_GRADS,
    SECOND_SCORES,
    SEGMENT,
    WEIGHT_GRADS,
    in_batch,
    plane_size,
    segment_part,
    segment_place,
    tile_rows,
)
from .hyper_attention import mixed, only_seen
from .lag import (
    RING,
    by_lag,
    clear_unseen,
    keep_by_source,
    keep_tile,
    kept,
    low_rank,
    put,
    summed,
    summed_across,
    tile_of,
)
from .row_tiles import both_first_rows, row_factor, second_rows


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
def _products(x, y, b, a, m0, n0, T, width, WIDTH: tl.constexpr, STEP: tl.constexpr,
              P: tl.constexpr):  # fmt: skip
    """x y' of a tile by source."""
    BLOCK: tl.constexpr = P.block
    PRECISION: tl.constexpr = P.precision
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for d in tl.range(0, width, STEP, disable_licm=True):
        x0 = rows_of(x, b, a, m0, d, T, WIDTH, BLOCK, STEP)
        y0 = rows_of(y, b, a, n0, d, T, WIDTH, BLOCK, STEP)
        acc = dot(x0, y0.T, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=CHUNK)
def scores_kernel(core, planes, first, heads, low, high, T, P: tl.constexpr):
    """S of each sub-head."""
    core = fresh(core)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    SUBS: tl.constexpr = P.sub_heads // P.heads
    work = (high - low) * heads * SUBS * tl.cdiv(high, SEGMENT)
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        sub, head, j, segment = segment_place(index, heads, high, SUBS)
        b, i = in_batch(head, first, HEADS)
        a = i + sub * HEADS
        m0 = j * BLOCK
        start = segment * (SEGMENT * BLOCK)
        stop = tl.minimum(start + SEGMENT * BLOCK, m0 + BLOCK)
        at, length = tile_rows(planes, sub * 2 + SCORES, head, j, heads, low, high, BLOCK)
        if segment == 0:
            clear_unseen(at, length, BLOCK)
        q0 = rows_of(core.q, b, a, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
        for n0 in tl.range(start, stop, BLOCK, disable_licm=True):
            k0 = rows_of(core.k, b, a, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
            S = products(q0, k0, core.q, core.k, b, a, m0, n0, T, core.width_qk, P, WIDTH)
            keep_by_source(at, n0, length, S, BLOCK)


@triton.jit(do_not_specialize=CHUNK)
def dz2_kernel(
    core, do, scratch_ptr, planes, parts, first, heads, low, high, T, L, P: tl.constexpr
):
    """dY and, with the second mixing, parts of dz2."""
    core = fresh(core)
    do = fresh(do)
    BLOCK: tl.constexpr = P.block
    STEP: tl.constexpr = P.block_v
    BLOCK_R: tl.constexpr = P.block_r2
    WIDTH: tl.constexpr = P.width_v
    RANK: tl.constexpr = P.rank2
    HEADS: tl.constexpr = P.heads
    PRECISION: tl.constexpr = P.precision
    ring = scratch_ptr + tl.program_id(0).to(tl.int64) * (RING * BLOCK * BLOCK)
    work = (high - low) * heads * tl.cdiv(high, SEGMENT)
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        _sub, head, j, segment = segment_place(index, heads, high, 1)
        b, i = in_batch(head, first, HEADS)
        m0 = j * BLOCK
        start = segment * (SEGMENT * BLOCK)
        stop = tl.minimum(start + SEGMENT * BLOCK, m0 + BLOCK)
        at, length = tile_rows(planes, WEIGHT_GRADS, head, j, heads, low, high, BLOCK)
        n = row_factor(core, b, i, m0, T, P)
        acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        # The tile before a segment belongs to another; before the first there is none.
        before = start - BLOCK
        if (start > 0) & (start <= m0):
            dY = _products(do, core.v, b, i, m0, before, T, core.width_v, WIDTH, STEP, P)
            put(ring, before, dY * n[:, None], BLOCK)
        else:
            put(ring, BLOCK, tl.zeros((BLOCK, BLOCK), tl.float32), BLOCK)
        for n0 in tl.range(start, stop, BLOCK, disable_licm=True):
            dY = _products(do, core.v, b, i, m0, n0, T, core.width_v, WIDTH, STEP, P)
            put(ring, n0, dY * n[:, None], BLOCK)
            tl.debug_barrier()
            banded = by_lag(ring, n0, BLOCK)
            keep_tile(at, n0, length, banded, BLOCK)
            if RANK > 0:
                p0 = L - BLOCK - (m0 - n0)
                acc = summed(acc, banded, core.second.vt, i, p0, L, RANK, BLOCK, BLOCK_R, PRECISION)
            tl.debug_barrier()
        if RANK > 0:
            part = segment_part(parts, segment, 0, head, j, heads, low, high, 1, BLOCK, BLOCK_R)
            tl.store(part, acc)
        tl.debug_barrier()


@triton.jit(do_not_specialize=CHUNK)
def sum_kernel(
    core, c, dz_ptr, parts, first, heads, low, high, T, MIXING: tl.constexpr, P: tl.constexpr
):
    """dz of a mixing, and times its control as an operand, of the segments' parts."""
    core = fresh(core)
    c = fresh(c)
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r1 if MIXING == 1 else P.block_r2
    RANK: tl.constexpr = P.rank1 if MIXING == 1 else P.rank2
    HEADS: tl.constexpr = P.heads
    OUT_HEADS: tl.constexpr = P.sub_heads if MIXING == 1 else P.heads
    SUBS: tl.constexpr = OUT_HEADS // HEADS
    sub = tl.program_id(0) % SUBS
    head = tl.program_id(0) // SUBS % heads
    j = low + tl.program_id(0) // SUBS // heads
    b, i = in_batch(head, first, HEADS)
    acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for segment in tl.range(0, j // SEGMENT + 1):
        part = segment_part(parts, segment, sub, head, j, heads, low, high, SUBS, BLOCK, BLOCK_R)
        acc += tl.load(part)
    dh = core.first.dh_ptr if MIXING == 1 else core.second.dh_ptr
    a = i + sub * HEADS
    store_conditioned(dz_ptr, c, dh, b, a, j * BLOCK, T, acc, OUT_HEADS, RANK, BLOCK, BLOCK_R)


@triton.jit(do_not_specialize=CHUNK)
def gate_kernel(
    core, coefficient_ptr, planes, parts, first, heads, low, high, T, L, GRADS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """A, dP and, with the first mixing, parts of dz1. Without GRADS A alone, for dv."""
    core = fresh(core)
    BLOCK: tl.constexpr = P.block
    COLUMNS: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r1
    RANK1: tl.constexpr = P.rank1
    RANK2: tl.constexpr = P.rank2
    R2: tl.constexpr = P.block_r2
    HEADS: tl.constexpr = P.heads
    SUBS: tl.constexpr = P.sub_heads // P.heads
    GLU: tl.constexpr = P.glu
    QUICK: tl.constexpr = P.quick
    NORMED: tl.constexpr = P.normed
    SHORT: tl.constexpr = P.short2
    PRECISION: tl.constexpr = P.precision
    DTYPE: tl.constexpr = core.q.ptr.dtype.element_ty
    zeros = tl.zeros((BLOCK, BLOCK), tl.float32)
    work = (high - low) * heads * tl.cdiv(high, SEGMENT)
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        _sub, head, j, segment = segment_place(index, heads, high, 1)
        b, i = in_batch(head, first, HEADS)
        m0 = j * BLOCK
        start = segment * (SEGMENT * BLOCK)
        stop = tl.minimum(start + SEGMENT * BLOCK, m0 + BLOCK)
        size = plane_size(heads, low, high, BLOCK)
        at, length = tile_rows(planes, 0, head, j, heads, low, high, BLOCK)
        z1, z2 = both_first_rows(core.first.z_ptr, b, i, m0, T, P)
        dh3 = second_rows(core.second.dh_ptr, b, i, m0, T, P)
        acc1 = tl.zeros((BLOCK_R, BLOCK), tl.float32)
        acc2 = tl.zeros((BLOCK_R, BLOCK), tl.float32)
        if NORMED and GRADS:
            coefficient = row_values(coefficient_ptr, b, i, m0, T, HEADS, BLOCK)
        else:
            coefficient = tl.zeros((BLOCK,), tl.float32)
        for n0 in tl.range(start, stop, COLUMNS, disable_licm=True):
            p0 = L - BLOCK - (m0 - n0)
            S1 = tile_of(at + SCORES * size, n0, length, BLOCK, COLUMNS)
            P1 = only_seen(mixed(S1, z1, core, i, m0, n0, L, P), n0, BLOCK)
            P2 = P1
            if GLU:
                S2 = tile_of(at + SECOND_SCORES * size, n0, length, BLOCK, COLUMNS)
                P2 = mixed(S2, z2, core, i + HEADS, m0, n0, L, P)
            A, slope1, slope2 = gate_slopes(P1, P2, GLU, QUICK)
            if RANK2 == 0:
                # Nothing makes Y of it.
                A = A * row_factor(core, b, i, m0, T, P)[:, None]
            keep_tile(at, n0, length, A, BLOCK)
            if GRADS:
                dA = tile_of(at + WEIGHT_GRADS * size, n0, length, BLOCK, COLUMNS).to(tl.float32)
                if RANK2 > 0:
                    dA = kept(dA, core.second.d, i, p0, L, SHORT, COLUMNS)
                    dA = low_rank(dA, dh3, core.second.u, i, p0, L, RANK2, COLUMNS, R2, PRECISION)
                # P1 is 0 where nothing is seen, so both gradients are.
                dP1 = dA * slope1
                if NORMED:
                    dP1 = dP1 - coefficient[:, None] * P1
                keep_tile(at + SCORE_GRADS * size, n0, length, dP1, BLOCK)
                if RANK1 > 0:
                    vt = core.first.vt
                    acc1 = summed_across(
                        acc1, rounded(dP1, DTYPE), vt, i, p0, L, RANK1, COLUMNS, BLOCK_R, PRECISION
                    )
                if GLU:
                    dP2 = dA * slope2
                    keep_tile(at + SECOND_GRADS * size, n0, length, dP2, BLOCK)
                    if RANK1 > 0:
                        acc2 = summed_across(
                            acc2, rounded(dP2, DTYPE), vt, i + HEADS, p0, L, RANK1, COLUMNS,
                            BLOCK_R, PRECISION,
                        )  # fmt: skip
        if segment == 0:
            # Lags below 0.
            keep_tile(at, m0 + BLOCK, length, zeros, BLOCK)
            if GRADS:
                keep_tile(at + SCORE_GRADS * size, m0 + BLOCK, length, zeros, BLOCK)
                if GLU:
                    keep_tile(at + SECOND_GRADS * size, m0 + BLOCK, length, zeros, BLOCK)
        if GRADS and RANK1 > 0:
            part = segment_part(parts, segment, 0, head, j, heads, low, high, SUBS, BLOCK, BLOCK_R)
            tl.store(part, acc1.T)
            if GLU:
                part = segment_part(
                    parts, segment, 1, head, j, heads, low, high, SUBS, BLOCK, BLOCK_R
                )
                tl.store(part, acc2.T)
