"""Gradients of u, vt and d of a mixing, and what the mixing makes of a chunk's tiles.

All entries of a tile by lag, over all its row tiles, meet the same BLOCK slots. A block walks over
the row tiles of one, with the gradients of those slots in registers, and writes them once. No
atomics: gradients.py adds up the sequences of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tiles import dot
from .band import fresh
from .chunks import CHUNK, SCORE_GRADS, SCORES, WEIGHT_GRADS, WEIGHTS, in_batch, tile_rows
from .lag import keep_tile, kept, low_rank, tile_of
from .row_tiles import first_rows, row_factor, second_rows


class Bands(NamedTuple):
    """Where one mixing's gradients go: (B, heads, lag tiles, BLOCK, BLOCK_R), d's without the last;
    float32."""

    du: Any
    dvt: Any
    dd: Any


@triton.jit
def _add_band(bands, du, dvt, dd, at, again, BLOCK: tl.constexpr,
              BLOCK_R: tl.constexpr):  # fmt: skip
    """Write a band's gradients; again: add them to what earlier rows left there."""
    offs_p = tl.arange(0, BLOCK)
    offs = offs_p[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    base = tl.cast(at, tl.int64) * BLOCK
    to_u = bands.du + base * BLOCK_R + offs
    to_v = bands.dvt + base * BLOCK_R + offs
    if again:
        du += tl.load(to_u)
        dvt += tl.load(to_v)
    tl.store(to_u, du)
    tl.store(to_v, dvt)
    if bands.dd is not None:
        to_d = bands.dd + base + offs_p
        if again:
            dd += tl.load(to_d)
        tl.store(to_d, dd)


@triton.jit(do_not_specialize=CHUNK)
def slots_kernel(
    core, bands, planes, first, heads, low, high, T, L, tiles,
    MIXING: tl.constexpr, WANTED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """MIXING 1: X = S, G = dP, of which dS is made; 2: X = A, of which Y is, and G = dY. In place.
    Not WANTED: that alone, for tiles without gradients."""
    core = fresh(core)
    bands = fresh(bands)
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r1 if MIXING == 1 else P.block_r2
    RANK: tl.constexpr = P.rank1 if MIXING == 1 else P.rank2
    SHORT: tl.constexpr = P.short1 if MIXING == 1 else P.short2
    HEADS: tl.constexpr = P.heads
    SUBS: tl.constexpr = P.sub_heads // P.heads if MIXING == 1 else 1
    X: tl.constexpr = SCORES if MIXING == 1 else WEIGHTS
    G: tl.constexpr = SCORE_GRADS if MIXING == 1 else WEIGHT_GRADS
    PRECISION: tl.constexpr = P.precision
    HAS_D: tl.constexpr = bands.dd is not None
    for index in tl.range(
        tl.program_id(0), high * heads * SUBS, tl.num_programs(0), disable_licm=True
    ):
        sub = index % SUBS
        head = index // SUBS % heads
        lag = index // SUBS // heads
        b, i = in_batch(head, first, HEADS)
        a = i + sub * HEADS
        p0 = L - BLOCK - lag * BLOCK
        du = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        dvt = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        # Summed over the rows at the end: a sum takes as long as a product.
        dd = tl.zeros((BLOCK, BLOCK), tl.float32)
        for j in tl.range(tl.maximum(lag, low), high, disable_licm=True):
            m0 = j * BLOCK
            n0 = m0 - lag * BLOCK
            at_x, length = tile_rows(planes, sub * 2 + X, head, j, heads, low, high, BLOCK)
            at_g, _l = tile_rows(planes, sub * 2 + G, head, j, heads, low, high, BLOCK)
            if MIXING == 1:
                z = first_rows(core.first.z_ptr, b, a, m0, T, P)
                dh = first_rows(core.first.dh_ptr, b, a, m0, T, P)
            else:
                z = second_rows(core.second.z_ptr, b, a, m0, T, P)
                dh = second_rows(core.second.dh_ptr, b, a, m0, T, P)
            if MIXING == 1 or WANTED:
                Gt = tile_of(at_g, n0, length, BLOCK, BLOCK)
            if MIXING == 2 or WANTED:
                Xt = tile_of(at_x, n0, length, BLOCK, BLOCK)
            if WANTED:
                du = dot(Xt.T, dh, du, PRECISION)
                dvt = dot(Gt.T, z, dvt, PRECISION)
                if HAS_D:
                    dd += Xt.to(tl.float32) * Gt.to(tl.float32)
            if MIXING == 1:
                out = kept(Gt.to(tl.float32), core.first.d, a, p0, L, SHORT, BLOCK)
                out = kept(Gt.to(tl.float32), core.first.d, a, p0, L, SHORT, BLOCK)
                out = low_rank(out, dh, core.first.u, a, p0, L, RANK, BLOCK, BLOCK_R, PRECISION)
                tl.debug_barrier()
                keep_tile(at_g, n0, length, out, BLOCK)
            else:
                out = kept(Xt.to(tl.float32), core.second.d, a, p0, L, SHORT, BLOCK)
                out = low_rank(out, z, core.second.vt, a, p0, L, RANK, BLOCK, BLOCK_R, PRECISION)
                tl.debug_barrier()
                keep_tile(at_x, n0, length, out * row_factor(core, b, i, m0, T, P)[:, None], BLOCK)
        if WANTED:
            at = (b * (HEADS * SUBS) + a) * tiles + lag
            _add_band(bands, du, dvt, tl.sum(dd, 0), at, lag < low, BLOCK, BLOCK_R)
