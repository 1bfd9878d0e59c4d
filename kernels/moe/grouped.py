"""GEMMs over rows grouped by expert: which tile belongs to whom, and loads by expert.

Row tiles are cut from each expert's own rows, so a tile has one expert; how many there are is known
on the GPU alone. Launches take the most there can be, and each program counts for itself: the
cumulative tiles of all experts stay in registers, and a tile's expert is one comparison and sum.

Rows of a token-ordered matrix are gathered by pointers (GATHER), each once for every one of a
token's k choices; an expert-ordered one is read in place. A TMA box or tile that runs past an
expert's last row reads rows of the next: those results are never stored.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import Fit, Tile, cdiv
from ..device import multiprocessors
from ..maps import doubtful
from ..tiles import descriptor_of, dot, fit_of, halve, load_weight


@triton.jit
def tile_ends(offsets_ptr, groups, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tiles up to the end of each group; past the last group, all of them."""
    offs = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + offs, mask=offs < groups, other=0)
    end = tl.load(offsets_ptr + offs + 1, mask=offs < groups, other=0)
    return tl.cumsum(tl.cdiv(end - begin, BLOCK_M), 0)


@triton.jit
def group_at(ends, offsets_ptr, tile, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows) of a row tile."""
    behind = ends <= tile
    group = tl.sum(behind.to(tl.int32), 0)
    first = tl.max(tl.where(behind, ends, 0), 0)
    begin = tl.load(offsets_ptr + group) + (tile - first) * BLOCK_M
    return group, begin, tl.load(offsets_ptr + group + 1)


@triton.jit
def rows_at(tokens_ptr, r0, end, BLOCK_M: tl.constexpr):
    """(number of each row's choice, whether it is there) from row r0 on; without tokens_ptr the
    row."""
    offs_r = r0 + tl.arange(0, BLOCK_M)
    mask_r = offs_r < end
    rows = offs_r
    if tokens_ptr is not None:
        rows = tl.load(tokens_ptr + offs_r, mask=mask_r, other=0)
    return rows.to(tl.int64), mask_r


@triton.jit
def token_of(number, k):
    """The token of choice number t k + j; where k is 1 nothing is computed."""
    return (number.to(tl.int32) // k).to(tl.int64)


@triton.jit
def gathered_at(tokens_ptr, r0, end, k, BLOCK_M: tl.constexpr):
    """rows_at with the token of each row; without tokens_ptr the row."""
    rows, mask_r = rows_at(tokens_ptr, r0, end, BLOCK_M)
    if tokens_ptr is not None:
        rows = token_of(rows, k)
    return rows, mask_r


@triton.jit
def load_rows(
    x,
    rows,
    mask_r,
    r0,
    k0,
    K,
    stride_m,
    stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """Columns k0.. of the given rows; with TMA, of the BLOCK_M rows from r0 on."""
    if TMA:
        tile = x.load([r0, k0])
    else:
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = mask_r[:, None]
        if MASK_K:
            mask = mask & (offs_k[None, :] < K)
        pointers = x + rows[:, None] * stride_m + offs_k.to(tl.int64)[None, :] * stride_k
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def load_expert(
    w,
    expert,
    stride_e,
    stride_n,
    stride_k,
    n0,
    k0,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """A (BLOCK_K, BLOCK_N) operand from one expert's (N, K) weight; see tiles.load_weight."""
    if TMA:
        if K_MAJOR:
            tile = tl.reshape(w.load([expert, n0, k0]), (BLOCK_N, BLOCK_K)).T
        else:
            tile = tl.reshape(w.load([expert, k0, n0]), (BLOCK_K, BLOCK_N))
    else:
        own = w + tl.cast(expert, tl.int64) * stride_e
        tile = load_weight(
            own, stride_n, stride_k, n0, k0, N, K, BLOCK_N, BLOCK_K, False, True, MASK_K
        )
    return tile


@triton.jit
def multiply_both(
    x,
    rows,
    mask_r,
    r0,
    stride_xm,
    stride_xk,
    w1,
    stride_1e,
    stride_1n,
    stride_1k,
    w2,
    stride_2e,
    stride_2n,
    stride_2k,
    expert,
    n0,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR_1: tl.constexpr,
    K_MAJOR_2: tl.constexpr,
    STACKED: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of x times one expert's w1' and w2', in float32. STACKED: w1 is one descriptor over
    both, (2, E, N, K), hence one product twice as wide. Without w2 the second result is the
    first."""
    if STACKED:
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = load_rows(
                x, rows, mask_r, r0, k, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False, MASK_K
            )
            b = tl.reshape(w1.load([0, expert, n0, k]), (2 * BLOCK_N, BLOCK_K)).T
            acc = dot(a, b, acc, PRECISION)
        acc1, acc2 = halve(acc, BLOCK_M, 2 * BLOCK_N)
    else:
        acc1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = acc1
        for k in tl.range(0, K, BLOCK_K):
            a = load_rows(
                x, rows, mask_r, r0, k, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False, MASK_K
            )
            b = load_expert(
                w1, expert, stride_1e, stride_1n, stride_1k, n0, k, N, K,
                BLOCK_N, BLOCK_K, TMA, K_MAJOR_1, MASK_K,
            )  # fmt: skip
            acc1 = dot(a, b, acc1, PRECISION)
            if w2 is not None:
                b = load_expert(
                    w2, expert, stride_2e, stride_2n, stride_2k, n0, k, N, K,
                    BLOCK_N, BLOCK_K, TMA, K_MAJOR_2, MASK_K,
                )  # fmt: skip
                acc2 = dot(a, b, acc2, PRECISION)
        if w2 is None:
            acc2 = acc1
    return acc1, acc2


@triton.jit
def accumulate(
    acc,
    x,
    rows,
    mask_r,
    r0,
    stride_xm,
    stride_xk,
    w,
    stride_e,
    stride_n,
    stride_k,
    expert,
    n0,
    depth,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + rows of x times one expert's w', over `depth` of K: all of it, or nothing."""
    for k in tl.range(0, depth, BLOCK_K):
        a = load_rows(
            x, rows, mask_r, r0, k, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, X_TMA, MASK_K
        )
        b = load_expert(
            w, expert, stride_e, stride_n, stride_k, n0, k, N, K,
            BLOCK_N, BLOCK_K, TMA, K_MAJOR, MASK_K,
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)
    return acc


def most_tiles(T: int, groups: int, block_m: int) -> int:
    """Row tiles that T rows in so many groups can need."""
    return min(T, T // block_m + groups)


def grouped_grid(tile: Tile, like: Tensor, T: int, groups: int, N: int) -> tuple[int]:
    """A TMA tile runs persistently, as many blocks a multiprocessor as `tile.blocks` says."""
    tiles = most_tiles(T, groups, tile.block_m) * cdiv(N, tile.block_n)
    return (min(tiles, tile.blocks * multiprocessors(like.device)) if tile.tma else tiles,)


def block_e(groups: int) -> int:
    return triton.next_power_of_2(max(groups, 2))


def experts_fit(*weights: Tensor | None) -> Fit:
    """tiles.fit_of every expert's own matrix, experts a multiple of 16 bytes apart, and of all."""
    fit = Fit.TMA
    for w in weights:
        if w is None:
            continue
        if w.stride(0) <= 0 or w.stride(0) * w.element_size() % 16:
            return Fit.ELEMENT
        fit = min(fit, fit_of(weights=(w[0],)), Fit.VECTOR if doubtful(w) else Fit.TMA)
    return fit


def experts_of(
    w: Tensor | None, block_n: int, block_k: int, tma: bool
) -> tuple[Any, int, int, int, bool]:
    """(E, N, K) weights as a kernel takes them: (descriptor or tensor, its three strides,
    K_MAJOR)."""
    if w is None:
        return None, 0, 0, 0, True
    stride_e, stride_n, stride_k = w.stride()
    if not tma:
        return w, stride_e, stride_n, stride_k, True
    k_major = stride_k == 1  # a step of one element is no descriptor's
    view, block = (w, [1, block_n, block_k]) if k_major else (w.mT, [1, block_k, block_n])
    return descriptor_of(view, block), stride_e, stride_n, stride_k, k_major
