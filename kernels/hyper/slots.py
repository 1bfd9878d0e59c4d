"""Gradients of u, vt and d of both mixings.

All entries of a tile diagonal, over all rows and batches, meet the same band of slots. A block
walks one diagonal with that band's gradients in registers and writes them once; neighbouring
diagonals share half a band, which gradients.py adds. No atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tiles import dot
from .band import banded, clear, fresh, gate_of, rows_of, spread, visible
from .score_grads import expand_grads, mixed_grads, norm_coefficient, value_grads
from .scores import both_scores, first_rows, row_factor, row_operands, second_rows


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
    core, do, z3_ptr, bands, coefficient_ptr, scratch_ptr, batch, splits, T, L,
    WHICH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """WHICH: 1 and 2, the first mixing of sub-heads i and i + H; 3, the second mixing. One a
    launch: the bands of more would spill."""
    core = fresh(core)
    do = fresh(do)
    bands = fresh(bands)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r2 if WHICH == 3 else P.block_r1
    WIDTH_V: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    OUT_HEADS: tl.constexpr = P.heads if WHICH == 3 else P.sub_heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    HAS_D: tl.constexpr = bands.dd is not None
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (6 * REGION)
    low = region + 3 * REGION
    clear(region, 3, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * splits * HEADS, tl.num_programs(0), disable_licm=True
    ):
        split = index % splits
        i = index // splits % HEADS
        diagonal = index // splits // HEADS
        du = tl.zeros((2 * BLOCK, BLOCK_R), tl.float32)
        dvt = tl.zeros((2 * BLOCK, BLOCK_R), tl.float32)
        dd = tl.zeros((2 * BLOCK,), tl.float32)
        for b in tl.range(split, batch, splits, disable_licm=True):
            for m0 in tl.range(diagonal * BLOCK, T, BLOCK, disable_licm=True):
                n0 = m0 - diagonal * BLOCK
                n = row_factor(core, b, i, m0, T, P)
                do0 = rows_of(do, b, i, m0, 0, T, WIDTH_V, BLOCK, BLOCK_D)
                q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
                dh3 = second_rows(core.second.dh_ptr, b, i, m0, T, P)
                expand_grads(low, z1, z2, dh3, core, i, m0, n0, L, P)
                tl.debug_barrier()
                dY = value_grads(do0, n, core, do, b, i, m0, n0, T, P)
                S1, P1, S2, P2 = both_scores(q1, q2, low, low + REGION, core, b, i, m0, n0, T, L, P)
                if WHICH == 3:
                    # dY holds n; second.z would bring it in once more.
                    z = second_rows(z3_ptr, b, i, m0, T, P)
                    du, dvt, dd = _add_band(
                        du, dvt, dd, region, gate_of(P1, P2, GLU), dY, dh3, z, HAS_D, BLOCK,
                        PRECISION,
                    )  # fmt: skip
                else:
                    coefficient = norm_coefficient(coefficient_ptr, n, b, i, m0, T, P)
                    dP1, dP2 = mixed_grads(low, P1, P2, dY, coefficient, core, i, m0, n0, L, P)
                    S = S1 if WHICH == 1 else S2
                    dP = dP1 if WHICH == 1 else dP2
                    z = z1 if WHICH == 1 else z2
                    dh = first_rows(core.first.dh_ptr, b, i + (WHICH - 1) * HEADS, m0, T, P)
                    S = tl.where(visible(m0, n0, BLOCK), S, 0.0)
                    du, dvt, dd = _add_band(
                        du, dvt, dd, region, S, dP, dh, z, HAS_D, BLOCK, PRECISION
                    )
        tl.debug_barrier()
        head = i + (HEADS if WHICH == 2 else 0)
        at = (split * OUT_HEADS + head) * tiles + diagonal
        _store_band(bands, du, dvt, dd, at, BLOCK, BLOCK_R)
