"""Tiles of hyper_attention by lag, where mixings are plain products.

A tile of scores by source holds BLOCK rows from m0 and BLOCK sources from n0. By lag, row i of the
tile holds at column c the source n0 - (BLOCK - 1) + c + i: the same lag in all rows, hence one slot
p0 + c of u, vt and d. A product with u or vt is then one of small matrices, d a row of factors, and
what is not seen lies beside the columns or before source 0.

Scores move from the one layout to the other through a ring: a block's own scratch of BLOCK rows
that hold two neighbouring tiles, and the even one of them twice, so that no window of BLOCK columns
goes round. `put` writes a tile straight, in rising order of n0; `by_lag` reads a window that moves
by one column a row, from the tile that was put last and the one before. Where tiles by lag lie side
by side in whole rows, `keep_tile` writes one, and `by_source` and `keep_by_source` read and write
such a window: weights move back there, and the scores of backward get there.

A barrier stands between writing and reading, and before what is read is written again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, rounded
from .band import slots_of

RING = tl.constexpr(3)  # tiles beside each other in a ring


@triton.jit
def put(ring, n0, X, BLOCK: tl.constexpr):
    """Write the tile of n0; its place is even or odd."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = ring + row * (RING * BLOCK) + column
    value = rounded(X, ring.dtype.element_ty)
    if n0 // BLOCK % 2 == 1:
        tl.store(at + BLOCK, value)
    else:
        # What later windows read of the one place, and this one of the other, 8 columns at a time.
        tl.store(at, value, mask=column // 8 >= row // 8)
        tl.store(at + 2 * BLOCK, value, mask=column // 8 <= row // 8)


@triton.jit
def by_lag(ring, n0, BLOCK: tl.constexpr):
    """The scores by lag of the tile that was put at n0, behind that of n0 - BLOCK."""
    rows = tl.arange(0, BLOCK)[:, None] * (RING * BLOCK + 1)
    first = (1 - n0 // BLOCK % 2) * BLOCK + 1
    return tl.load(ring + first + (rows + tl.arange(0, BLOCK)[None, :]))


@triton.jit
def _in_rows(n0, length, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None] * length
    return n0 + rows + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def keep_tile(rows, n0, length, X, BLOCK: tl.constexpr):
    """Write the tile by lag of n0, or columns of it from n0, into rows of `length` columns."""
    if X.dtype != rows.dtype.element_ty:
        X = rounded(X, rows.dtype.element_ty)
    tl.store(rows + _in_rows(n0, length, BLOCK, X.shape[1]), X)


@triton.jit
def tile_of(rows, n0, length, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(rows + _in_rows(n0, length, BLOCK, COLUMNS))


@triton.jit
def kept_tile(rows, n0, length, BLOCK: tl.constexpr):
    return tile_of(rows, n0, length, BLOCK, BLOCK).to(tl.float32)


@triton.jit
def by_source(rows, n0, length, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS sources from n0 of the tiles by lag that lie in rows."""
    return tl.load(rows + _in_rows(n0 + BLOCK - 1, length - 1, BLOCK, COLUMNS))


@triton.jit
def keep_by_source(rows, n0, length, X, BLOCK: tl.constexpr):
    """Write a tile by source to where `by_source` finds it."""
    to = rows + _in_rows(n0 + BLOCK - 1, length - 1, BLOCK, BLOCK)
    tl.store(to, rounded(X, rows.dtype.element_ty))


@triton.jit
def clear_unseen(rows, length, BLOCK: tl.constexpr):
    """Write zeros where the first tile by lag has no source."""
    zeros = tl.zeros((BLOCK, BLOCK), rows.dtype.element_ty)
    tl.store(rows + _in_rows(0, length, BLOCK, BLOCK), zeros, mask=~seen(0, BLOCK, BLOCK))


@triton.jit
def seen(n0, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Where COLUMNS columns from n0 have a source at all."""
    row = tl.arange(0, BLOCK)[:, None]
    return row + tl.arange(0, COLUMNS)[None, :] >= BLOCK - 1 - n0


@triton.jit
def factors(d, head, p0, L, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    """What a mixing multiplies each column by: shortcut + d[p]."""
    offs_p = p0 + tl.arange(0, BLOCK)
    base = d.ptr + tl.cast(head, tl.int64) * d.stride_h
    # Rows past the end have lags that are no slots.
    values = tl.load(base + offs_p.to(tl.int64) * d.stride_p, mask=offs_p >= 0, other=0.0)
    return values.to(tl.float32) + (1.0 if SHORT else 0.0)


@triton.jit
def kept(X, d, head, p0, L, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    """The part of a mixing that leaves an entry where it is."""
    if d.ptr is not None:
        out = X * factors(d, head, p0, L, SHORT, BLOCK)[None, :]
    elif SHORT:
        out = X
    else:
        out = X * 0.0
    return out


@triton.jit
def low_rank(acc, z, s, head, p0, L, RANK: tl.constexpr, BLOCK: tl.constexpr,
             BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + z s' over the ranks."""
    band = slots_of(s, head, p0, L, RANK, BLOCK, BLOCK_R)
    return dot(z, band.T, acc, PRECISION)


@triton.jit
def summed(acc, X, s, head, p0, L, RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """acc + X s over the lags."""
    band = slots_of(s, head, p0, L, RANK, BLOCK, BLOCK_R)
    return dot(X, band, acc, PRECISION)


@triton.jit
def summed_across(acc, X, s, head, p0, L, RANK: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same of an X that was computed, as acc (BLOCK_R, BLOCK): with the ranks as its rows a
    product is mma.sync. As wgmma it would read X from registers, which ptxas before 13.3 gets wrong
    (bench/gate/hazards.py)."""
    band = slots_of(s, head, p0, L, RANK, BLOCK, BLOCK_R)
    return dot(band.T, X.T, acc, PRECISION)
