"""Gradients of u, vt and d of both mixings.

All entries of a tile diagonal, over all rows and batches, meet the same band of slots. A block
walks one diagonal with that band's gradients in registers and writes them once; neighbouring
diagonals share half a band, which hyper_gradients.py adds. No atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hyper_attention import first_z, scores_and_mixed
from .hyper_backward import (
    expand_grads,
    first_dh,
    mixed_grads,
    row_factor,
    second_dh,
    value_grads,
)
from .hyper_tiles import banded, clear, gate_of, row_values, rows_of, spread, visible
from .tiles import dot


class Bands(NamedTuple):
    """Where one mixing's gradients go: (splits, heads, diagonals, 2 BLOCK, BLOCK_R), d's without
    the last; float32."""

    du: Any
    dvt: Any
    dd: Any


@triton.jit
def _add_band(
    du, dvt, dd, region, X, dOut, dh, z, has_d: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add X' dh, dOut' z and the sums of X dOut along the tile's diagonals to a band."""
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    spread(region, X, BLOCK)
    spread(region + REGION, dOut, BLOCK)
    if has_d:
        spread(region + 2 * REGION, X * dOut, BLOCK)
    tl.debug_barrier()
    du = dot(banded(region, BLOCK).T, dh, du, PRECISION)
    dvt = dot(banded(region + REGION, BLOCK).T, z, dvt, PRECISION)
    if has_d:
        dd += tl.sum(banded(region + 2 * REGION, BLOCK).to(tl.float32), 0)
    return du, dvt, dd


@triton.jit
def _store_band(bands, du, dvt, dd, at, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_p = tl.arange(0, 2 * BLOCK)
    offs = offs_p[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    base = tl.cast(at, tl.int64) * (2 * BLOCK)
    tl.store(bands.du + base * BLOCK_R + offs, du)
    tl.store(bands.dvt + base * BLOCK_R + offs, dvt)
    if bands.dd is not None:
        tl.store(bands.dd + base + offs_p, dd)


@triton.jit
def slots_kernel(
    core,
    do,
    z3_rows,
    bands1,
    bands2,
    coefficient_ptr,
    scratch_ptr,
    batch,
    splits,
    T,
    L,
    P: tl.constexpr,
):
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R1: tl.constexpr = P.block_r1
    BLOCK_R2: tl.constexpr = P.block_r2
    RANK2: tl.constexpr = P.rank2
    WIDTH: tl.constexpr = P.width_qk
    WIDTH_V: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    SUB_HEADS: tl.constexpr = P.sub_heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    FIRST: tl.constexpr = bands1 is not None
    SECOND: tl.constexpr = bands2 is not None
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (12 * REGION)
    low = region + 9 * REGION
    clear(region, 9, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(tl.program_id(0), tiles * splits * HEADS, tl.num_programs(0)):
        split = index % splits
        i = index // splits % HEADS
        diagonal = index // splits // HEADS
        if FIRST:
            du1 = tl.zeros((2 * BLOCK, BLOCK_R1), tl.float32)
            dvt1 = tl.zeros((2 * BLOCK, BLOCK_R1), tl.float32)
            dd1 = tl.zeros((2 * BLOCK,), tl.float32)
            du2 = tl.zeros((2 * BLOCK, BLOCK_R1), tl.float32)
            dvt2 = tl.zeros((2 * BLOCK, BLOCK_R1), tl.float32)
            dd2 = tl.zeros((2 * BLOCK,), tl.float32)
        if SECOND:
            du3 = tl.zeros((2 * BLOCK, BLOCK_R2), tl.float32)
            dvt3 = tl.zeros((2 * BLOCK, BLOCK_R2), tl.float32)
            dd3 = tl.zeros((2 * BLOCK,), tl.float32)
        for b in tl.range(split, batch, splits):
            for m0 in tl.range(diagonal * BLOCK, T, BLOCK):
                n0 = m0 - diagonal * BLOCK
                n = row_factor(core.n_ptr, b, i, m0, T, P)
                coefficient = n
                if P.normed and FIRST:
                    coefficient = row_values(coefficient_ptr, b, i, m0, T, HEADS, BLOCK)
                do0 = rows_of(do, b, i, m0, 0, T, WIDTH_V, BLOCK, BLOCK_D)
                q1 = rows_of(core.q, b, i, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
                z1 = first_z(core, b, i, m0, T, P)
                q2 = q1
                z2 = z1
                if GLU:
                    q2 = rows_of(core.q, b, i + HEADS, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
                    z2 = first_z(core, b, i + HEADS, m0, T, P)
                dh3 = second_dh(core, b, i, m0, T, P)
                expand_grads(low, z1, z2, dh3, core, i, m0, n0, L, P)
                tl.debug_barrier()
                dY = value_grads(do0, n, core, do, b, i, m0, n0, T, P)
                S1, P1 = scores_and_mixed(q1, low, core, b, i, m0, n0, T, L, P)
                P2 = P1
                S2 = S1
                if GLU:
                    S2, P2 = scores_and_mixed(q2, low + REGION, core, b, i + HEADS, m0, n0, T, L, P)
                seen = visible(m0, n0, BLOCK)
                S1 = tl.where(seen, S1, 0.0)
                S2 = tl.where(seen, S2, 0.0)
                if FIRST:
                    dP1, dP2 = mixed_grads(low, P1, P2, dY, coefficient, core, i, m0, n0, L, P)
                    has_d: tl.constexpr = bands1.dd is not None
                    dh1 = first_dh(core, b, i, m0, T, P)
                    du1, dvt1, dd1 = _add_band(
                        du1, dvt1, dd1, region, S1, dP1, dh1, z1, has_d, BLOCK, PRECISION
                    )
                    if GLU:
                        dh2 = first_dh(core, b, i + HEADS, m0, T, P)
                        du2, dvt2, dd2 = _add_band(
                            du2, dvt2, dd2, region + 3 * REGION, S2, dP2, dh2, z2, has_d, BLOCK,
                            PRECISION,
                        )  # fmt: skip
                if SECOND:
                    # second.z has n in it, dY too.
                    z3 = rows_of(z3_rows, b, i, m0, 0, T, RANK2, BLOCK, BLOCK_R2)
                    du3, dvt3, dd3 = _add_band(
                        du3, dvt3, dd3, region + 6 * REGION, gate_of(P1, P2, GLU), dY, dh3, z3,
                        bands2.dd is not None, BLOCK, PRECISION,
                    )  # fmt: skip
        tl.debug_barrier()
        if FIRST:
            at = (split * SUB_HEADS + i) * tiles + diagonal
            _store_band(bands1, du1, dvt1, dd1, at, BLOCK, BLOCK_R1)
            if GLU:
                _store_band(bands1, du2, dvt2, dd2, at + HEADS * tiles, BLOCK, BLOCK_R1)
        if SECOND:
            at = (split * HEADS + i) * tiles + diagonal
            _store_band(bands2, du3, dvt3, dd3, at, BLOCK, BLOCK_R2)
