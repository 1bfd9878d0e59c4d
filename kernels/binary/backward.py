"""The backward over one-bit weights: dx = dy w, two such products in one; the same with the
backward of what comes before a down projection; and the gradient of the scales.

A weight tile is made as in the forward, but for rows of the sum: it needs no transpose. Two
products are two loops into one accumulator, since sm_100 miscompiles two products in one loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...packing import empty_pair, split_pair
from ..activations import act_of
from ..arch.tile import cdiv, unboxed
from ..epilogues import store_bwd
from ..left import shifts
from ..pick import LAST, pick_tile
from ..plans import noted
from ..tiles import (
    column_parts,
    dot,
    fit_of,
    gemm_options,
    grid_of,
    load_tile,
    multiplied,
    pair_of,
    parts_of,
    precision,
    rows_of,
    store_tile,
    tile_at,
    upright,
    zeros,
)
from .binary_linear import load_binary
from .bits import load_words, signed


@triton.jit
def _multiply_rows(
    acc,
    dy,
    stride_ym,
    stride_yn,
    q_ptr,
    s_ptr,
    shift,
    m0,
    k0,
    M,
    N,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + dy w, rows m0.. and weights k0.. of each row of w, over all of N;
    transposed if LEFT."""
    if LEFT:  # as multiply_masked says
        tl.assume(N > 0)
    for n in tl.range(0, N, BLOCK_K):
        a = load_tile(dy, stride_ym, stride_yn, m0, n, M, N, BLOCK_M, BLOCK_K, TMA, MASK_K)
        w = load_binary(q_ptr, s_ptr, shift, n, k0, N, groups, a.dtype, BLOCK_K, BLOCK_N, LEFT)
        acc = multiplied(a, w, acc, LEFT, PRECISION)
    return acc


@triton.jit
def _dx_kernel(
    dy1,
    q1_ptr,
    s1_ptr,
    dy2,
    q2_ptr,
    s2_ptr,
    dx,
    M,
    N,
    D,
    stride_ym,
    stride_yn,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy1 w1 + dy2 w2 (M, D); dy2 is laid out as dy1 is, or None."""
    PART_M: tl.constexpr = BLOCK_M // SUBTILES if LEFT else BLOCK_M
    PART_N: tl.constexpr = BLOCK_N if LEFT else BLOCK_N // SUBTILES
    STEP_M: tl.constexpr = PART_M if LEFT else 0
    STEP_N: tl.constexpr = 0 if LEFT else PART_N
    shift = shifts(q1_ptr, N, 32, LEFT)
    groups = tl.cdiv(D, 128)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_d = tl.cdiv(D, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_d, tl.num_programs(0)):
        tile_m, tile_d = tile_at(index, tiles_m, tiles_d, GROUP_M)
        m0 = tile_m * BLOCK_M
        d0 = tile_d * BLOCK_N
        acc = _multiply_rows(
            zeros(BLOCK_M, BLOCK_N, LEFT), dy1, stride_ym, stride_yn, q1_ptr, s1_ptr, shift,
            m0, d0, M, N, groups, BLOCK_M, BLOCK_N, BLOCK_K, TMA, MASK_K, LEFT, PRECISION,
        )  # fmt: skip
        if dy2 is not None:
            acc = _multiply_rows(
                acc, dy2, stride_ym, stride_yn, q2_ptr, s2_ptr, shift,
                m0, d0, M, N, groups, BLOCK_M, BLOCK_N, BLOCK_K, TMA, MASK_K, LEFT, PRECISION,
            )  # fmt: skip
        parts = parts_of(acc, BLOCK_M, BLOCK_N, SUBTILES, LEFT)
        for i in tl.static_range(SUBTILES):
            store_tile(
                dx, stride_xm, m0 + i * STEP_M, d0 + i * STEP_N, M, D, upright(parts[i], LEFT),
                PART_M, PART_N, TMA,
            )  # fmt: skip


@triton.jit
def _dh_kernel(
    dy,
    q_ptr,
    s_ptr,
    g,
    u,
    dg,
    du,
    h,
    M,
    N,
    H,
    stride_ym,
    stride_yn,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh = dy w_down, which goes into dg, du and h, all (M, H) with contiguous rows."""
    shift = shifts(q_ptr, N, 32, LEFT)
    groups = tl.cdiv(H, 128)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_h = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_h, tl.num_programs(0)):
        tile_m, tile_h = tile_at(index, tiles_m, tiles_h, GROUP_M)
        m0 = tile_m * BLOCK_M
        h0 = tile_h * BLOCK_N
        dh = _multiply_rows(
            zeros(BLOCK_M, BLOCK_N, LEFT), dy, stride_ym, stride_yn, q_ptr, s_ptr, shift,
            m0, h0, M, N, groups, BLOCK_M, BLOCK_N, BLOCK_K, TMA, MASK_K, LEFT, PRECISION,
        )  # fmt: skip
        store_bwd(
            dh, g, u, dg, du, h, None, tile_m, tiles_m, m0, h0, M, H, H, 1, H, H, scalars, ACT, UP,
            BLOCK_M, BLOCK_N, SUBTILES, TMA, True, LEFT,
        )  # fmt: skip


@triton.jit
def _ds_kernel(
    dy,
    x,
    q_ptr,
    ds_ptr,
    M,
    N,
    D,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ds (N, groups): of dy' x, one group's columns (BLOCK_N = 128) at a time, the sum by signs."""
    PART: tl.constexpr = BLOCK_N // SUBTILES
    groups = tl.cdiv(D, 128)
    tiles_n = tl.cdiv(N, BLOCK_M)
    for index in tl.range(tl.program_id(0), tiles_n * groups, tl.num_programs(0)):
        tile_n, group = tile_at(index, tiles_n, groups, GROUP_M)
        n0 = tile_n * BLOCK_M
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for m in tl.range(0, M, BLOCK_K):
            a = load_tile(dy, stride_ym, stride_yn, m, n0, M, N, BLOCK_K, BLOCK_M, TMA)
            b = load_tile(x, stride_xm, stride_xd, m, group * BLOCK_N, M, D, BLOCK_K, BLOCK_N, TMA)
            acc = dot(a.T, b, acc, PRECISION)
        parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
        ds = tl.zeros((BLOCK_M,), tl.float32)
        ones = tl.full((BLOCK_M,), 1.0, tl.float32)
        for i in tl.static_range(SUBTILES):
            k0 = group * BLOCK_N + i * PART
            words = load_words(q_ptr, n0, k0, N, groups, BLOCK_M, PART)
            ds += tl.sum(parts[i] * signed(words, ones, BLOCK_M, PART), 1)
        offs_n = n0 + tl.arange(0, BLOCK_M)
        tl.store(ds_ptr + offs_n.to(tl.int64) * groups + group, ds, mask=offs_n < N)


def binary_linear_dx(
    dy1: Tensor,
    q1: Tensor,
    s1: Tensor,
    dy2: Tensor | None,
    q2: Tensor | None,
    s2: Tensor | None,
    D: int,
) -> Tensor:
    M, N = dy1.shape
    dx = dy1.new_empty((M, D))
    if M == 0 or D == 0:
        return dx
    kernel = "binary_linear_dx"
    tile = LAST[kernel] = pick_tile(kernel, dy1, M, D, fit_of(dy1, dy2, dx))
    read = tile.block_m, tile.block_k, tile.tma
    noted(_dx_kernel)[grid_of(tile, dy1, M, D)](
        rows_of(dy1, *read), q1, s1, rows_of(dy2, *read), q2, s2,
        rows_of(dx, *tile.part, tile.tma), M, N, D, *dy1.stride(), dx.stride(0),
        LEFT=tile.weight_left,
        **gemm_options(tile, N % tile.block_k != 0, precision(dy1.dtype)),
    )  # fmt: skip
    return dx


def binary_gated_mlp_grads(dy: Tensor, gu: Tensor, want_h: bool) -> tuple[Tensor, Tensor]:
    """Memory for dg and du as one (2, M, H), and for h (M, or 0 if not wanted, H)."""
    _, M, H = gu.shape
    return empty_pair(dy, M, H, None), dy.new_empty((M if want_h else 0, H))


def binary_gated_mlp_bwd(
    dy: Tensor, q_down: Tensor, s_down: Tensor, gu: Tensor, activation: str, want_h: bool
) -> tuple[Tensor, Tensor]:
    """dg and du as one (2, M, H), and h (M, or 0 if not wanted, H)."""
    (M, N), H = dy.shape, gu.shape[2]
    dgu, h = binary_gated_mlp_grads(dy, gu, want_h)
    if M == 0 or H == 0:
        return dgu, h
    kernel = "binary_gated_mlp_bwd"
    outputs = *split_pair(dgu, None), h if want_h else None
    tile = LAST[kernel] = pick_tile(kernel, dy, M, H, fit_of(dy, gu, *outputs))
    act = act_of(activation)
    if act["UP"] is not None:
        tile = unboxed(tile)
    noted(_dh_kernel)[grid_of(tile, dy, M, H)](
        rows_of(dy, tile.block_m, tile.block_k, tile.tma), q_down, s_down,
        *pair_of(gu, *tile.box_shape, tile.tma),
        *(rows_of(t, *tile.part, tile.tma) for t in outputs),
        M, N, H, *dy.stride(), **act, LEFT=tile.weight_left,
        **gemm_options(tile, N % tile.block_k != 0, precision(dy.dtype)),
    )  # fmt: skip
    return dgu, h


def binary_linear_ds(dy: Tensor, x: Tensor, qweight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the scales (N, groups), in `dtype`."""
    (M, N), D = dy.shape, x.shape[1]
    groups = cdiv(D, 128)
    ds = dy.new_empty((N, groups), dtype=torch.float32)
    if M == 0 or ds.numel() == 0:
        return ds.zero_().to(dtype)
    kernel = "binary_linear_ds"
    tile = LAST[kernel] = pick_tile(kernel, dy, N, D, fit_of(dy, x))
    noted(_ds_kernel)[grid_of(tile, dy, N, D)](
        rows_of(dy, tile.block_k, tile.block_m, tile.tma),
        rows_of(x, tile.block_k, tile.block_n, tile.tma),
        qweight, ds, M, N, D, *dy.stride(), *x.stride(),
        **gemm_options(tile, M % tile.block_k != 0, precision(dy.dtype)),
    )  # fmt: skip
    return ds.to(dtype)
