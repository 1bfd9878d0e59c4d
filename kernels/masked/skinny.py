"""masked_gated_linear for few rows (M <= SKINNY_M): weights and planes are read once, and their
bytes are the time. K is cut into parts so that every multiprocessor has work; the parts lie in
float32 and are summed in a fixed order. All masks fit in one pass here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import act_of
from ..arch.tile import Tile, cdiv
from ..left import shifts
from ..plans import noted
from ..tiles import compiler_options, load_tile, precision, store_tile
from .masks import multiply_masked, words_of


@triton.jit
def _partial_kernel(
    x,
    w,
    planes_ptr,
    parts_ptr,
    M,
    H,
    D,
    depth,
    stride_xm,
    stride_xd,
    stride_wh,
    stride_wd,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t, g_1, .. over `depth` of K for few rows (M <= BLOCK_M): parts (splits, 1 + N_M, M, H)."""
    n0 = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    k_begin = part * depth
    accs = multiply_masked(
        x, stride_xm, stride_xd, w, stride_wh, stride_wd, planes_ptr,
        shifts(planes_ptr, H, 8, False), 0, n0, k_begin, min(k_begin + depth, D),
        M, H, D, 0, N_M, 1, N_M,
        BLOCK_M, BLOCK_N, BLOCK_K, False, True, MASK_K, False, PRECISION,
    )  # fmt: skip
    size = tl.cast(M, tl.int64) * H
    parts_ptr += part * size * (1 + N_M)
    for i in tl.static_range(1 + N_M):
        store_tile(parts_ptr + i * size, H, 0, n0, M, H, accs[i], BLOCK_M, BLOCK_N, False)


@triton.jit
def _sum(parts_ptr, n0, M, H, splits, step, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, splits):
        acc += load_tile(parts_ptr, H, 1, 0, n0, M, H, BLOCK_M, BLOCK_N, False)
        parts_ptr += step
    return acc


@triton.jit
def _reduce_kernel(
    parts_ptr,
    h_ptr,
    gt_ptr,
    M,
    H,
    splits,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the parts, always in the same order, then finish as the tiled forward does."""
    n0 = tl.program_id(0) * BLOCK_N
    size = tl.cast(M, tl.int64) * H
    step = size * (1 + N_M)
    total = _sum(parts_ptr, n0, M, H, splits, step, BLOCK_M, BLOCK_N)
    if gt_ptr is not None:
        store_tile(gt_ptr, H, 0, n0, M, H, total, BLOCK_M, BLOCK_N, False)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(1, 1 + N_M):
        g = _sum(parts_ptr + i * size, n0, M, H, splits, step, BLOCK_M, BLOCK_N)
        if gt_ptr is not None:
            store_tile(gt_ptr + i * size, H, 0, n0, M, H, g, BLOCK_M, BLOCK_N, False)
        value, _ = ACT(g, *scalars)
        u = total - g
        if UP is not None:
            u, _ = UP(u, *scalars)
        h += value * u
    if h_ptr is not None:
        store_tile(h_ptr, H, 0, n0, M, H, h, BLOCK_M, BLOCK_N, False)


def launch_split(
    tile: Tile,
    splits: int,
    x: Tensor,
    w: Tensor,
    planes: Tensor,
    h: Tensor | None,
    gt: Tensor | None,
    activation: str,
) -> None:
    """Fill whichever of h (M, H) and gt (1 + n_m, M, H) are given, in `splits` parts of K."""
    (M, D), H, n_m = x.shape, w.shape[0], planes.shape[2]
    depth = cdiv(cdiv(D, splits), tile.block_k) * tile.block_k
    splits = cdiv(D, depth) if depth else 1
    parts = x.new_empty((splits, 1 + n_m, M, H), dtype=torch.float32)
    shared = {
        "N_M": n_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **compiler_options(tile)
    }  # fmt: skip
    columns = cdiv(H, tile.block_n)
    noted(_partial_kernel)[columns, splits](
        x, w, words_of(planes), parts, M, H, D, depth, *x.stride(), *w.stride(),
        BLOCK_K=tile.block_k, MASK_K=D % tile.block_k != 0,
        PRECISION=precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        **shared,
    )  # fmt: skip
    noted(_reduce_kernel)[columns,](parts, h, gt, M, H, splits, **act_of(activation), **shared)
