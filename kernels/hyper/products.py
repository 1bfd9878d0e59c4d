"""Gradients of q, k and v: products of a chunk's tiles, read by source."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot
from .band import fresh, rows_of, store_rows
from .chunks import CHUNK, SCORE_GRADS, in_batch, tile_rows
from .lag import by_source


@triton.jit(do_not_specialize=CHUNK)
def dq_kernel(k, dq, planes, first, heads, low, high, T, parts, P: tl.constexpr):
    k = fresh(k)
    dq = fresh(dq)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    SUBS: tl.constexpr = P.sub_heads // P.heads
    PRECISION: tl.constexpr = P.precision
    for index in tl.range(
        tl.program_id(0), (high - low) * heads * SUBS * parts, tl.num_programs(0),
        disable_licm=True,
    ):  # fmt: skip
        d0 = index % parts * BLOCK_D
        sub = index // parts % SUBS
        head = index // parts // SUBS % heads
        j = high - 1 - index // parts // SUBS // heads
        b, i = in_batch(head, first, HEADS)
        a = i + sub * HEADS
        at, length = tile_rows(planes, sub * 2 + SCORE_GRADS, head, j, heads, low, high, BLOCK)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for n0 in tl.range(0, (j + 1) * BLOCK, BLOCK, disable_licm=True):
            dS = by_source(at, n0, length, BLOCK, BLOCK)
            acc = dot(dS, rows_of(k, b, a, n0, d0, T, WIDTH, BLOCK, BLOCK_D), acc, PRECISION)
        store_rows(dq, b, a, j * BLOCK, d0, T, acc, WIDTH, BLOCK, BLOCK_D)


@triton.jit(do_not_specialize=CHUNK)
def columns_kernel(
    x, out, core, planes, first, heads, low, high, T, parts, KIND: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """dk of dS and q, or with KIND WEIGHTS dv of Y and dO, added to what earlier rows left."""
    x = fresh(x)
    out = fresh(out)
    core = fresh(core)
    BLOCK: tl.constexpr = P.block
    QK: tl.constexpr = KIND == SCORE_GRADS
    WIDTH: tl.constexpr = P.width_qk if QK else P.width_v
    BLOCK_N: tl.constexpr = P.block_d if QK else P.block_v
    HEADS: tl.constexpr = P.heads
    SUBS: tl.constexpr = P.sub_heads // P.heads if QK else 1
    PRECISION: tl.constexpr = P.precision
    for index in tl.range(
        tl.program_id(0), high * heads * SUBS * parts, tl.num_programs(0), disable_licm=True
    ):
        d0 = index % parts * BLOCK_N
        sub = index // parts % SUBS
        head = index // parts // SUBS % heads
        column = index // parts // SUBS // heads
        n0 = column * BLOCK
        b, i = in_batch(head, first, HEADS)
        a = i + sub * HEADS
        acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        for j in tl.range(tl.maximum(column, low), high, disable_licm=True):
            at, length = tile_rows(planes, sub * 2 + KIND, head, j, heads, low, high, BLOCK)
            tile = by_source(at, n0, length, BLOCK, BLOCK)
            xt = rows_of(x, b, a, j * BLOCK, d0, T, WIDTH, BLOCK, BLOCK_N)
            acc = dot(tile.T, xt, acc, PRECISION)
        if column < low:
            acc += rows_of(out, b, a, n0, d0, T, WIDTH, BLOCK, BLOCK_N)
        store_rows(out, b, a, n0, d0, T, acc, WIDTH, BLOCK, BLOCK_N)
