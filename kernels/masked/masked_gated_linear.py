"""h = sum_i act(g_i) * (t - g_i) with t = x w' and g_i = x (m_i * w)': the forward for many rows.

| file | kernels |
|---|---|
| masks.py | bit planes packed from logits; a mask over a weight tile |
| masked_gated_linear.py | the tiled forward |
| skinny.py | the forward for few rows, and its sum over parts |
| backward.py | the backward |

Each K step loads one tile of x and one of w; every mask is laid over the w tile in registers, so a
step makes 1 + MASKS products with the same x. The complement x ((1 - m_i) * w)' is t - g_i, by
subtraction in float32. One pass serves 1, 2 or 4 masks; more masks are taken two at a time, odd
numbers one at a time, because t and h, made in the first pass, then stay in registers.

A masked tile goes through shared memory to be wgmma's right operand; as its left one it stays in
registers. A tile of `weight_left` makes the result transposed for that, with a first pass for t
alone where there are several passes. Which assemblers can be trusted with it is in
arch/assembler.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..activations import act_of
from ..arch.tile import Tile, narrower
from ..left import shifts
from ..pick import LAST, pick_splits, pick_tile
from ..plans import noted
from ..tiles import (
    compiler_options,
    fit_of,
    grid_of,
    parts_of,
    precision,
    rows_of,
    slices_of,
    store_slice,
    store_tile,
    tile_at,
    upright,
    weight_of,
    zeros,
)
from .masks import multiply_masked, words_of
from .skinny import launch_split


@triton.jit
def _parts(
    accs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, LEFT: tl.constexpr
):
    """The column parts of each tile."""
    parts = ()
    for i in tl.static_range(len(accs)):
        parts = parts + (parts_of(accs[i], BLOCK_M, BLOCK_N, SUBTILES, LEFT),)
    return parts


@triton.jit
def _add_masks(
    h,
    total,
    gs,
    part: tl.constexpr,
    gt,
    m0,
    n0,
    M,
    H,
    first,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    LEFT: tl.constexpr,
):
    """h + sum_i act(g_i) * (total - g_i) over masks first.., on column part `part` of tiles as they
    were made."""
    for i in tl.static_range(MASKS):
        g = gs[i][part]
        if gt is not None:
            store_slice(gt, 1 + first + i, m0, n0, M, H, upright(g, LEFT), BLOCK_M, BLOCK_N, TMA)
        value, _ = ACT(g, *scalars)
        u = total - g
        if UP is not None:
            u, _ = UP(u, *scalars)
        h += value * u
    return h


@triton.jit
def _fwd_kernel(
    x,
    w,
    planes_ptr,
    out,
    gt,
    M,
    H,
    D,
    stride_xm,
    stride_xd,
    stride_wh,
    stride_wd,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    N_M: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PART_M: tl.constexpr = BLOCK_M // SUBTILES if LEFT else BLOCK_M
    PART_N: tl.constexpr = BLOCK_N if LEFT else BLOCK_N // SUBTILES
    # Beside two masked products and h there are no registers for a third product's.
    FIRST: tl.constexpr = 0 if LEFT and N_M > MASKS else MASKS
    STEP_M: tl.constexpr = PART_M if LEFT else 0
    STEP_N: tl.constexpr = 0 if LEFT else PART_N
    shift = shifts(planes_ptr, H, 8, LEFT)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        accs = multiply_masked(
            x, stride_xm, stride_xd, w, stride_wh, stride_wd, planes_ptr, shift,
            m0, n0, 0, D, M, H, D, 0, FIRST, 1, N_M,
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, K_MAJOR, MASK_K, LEFT, PRECISION,
        )  # fmt: skip
        gs = _parts(accs, BLOCK_M, BLOCK_N, SUBTILES, LEFT)
        totals = gs[0]
        gs = gs[1:]
        hs = ()
        for part in tl.static_range(SUBTILES):
            m1 = m0 + part * STEP_M
            n1 = n0 + part * STEP_N
            total = totals[part]
            if gt is not None:
                store_slice(gt, 0, m1, n1, M, H, upright(total, LEFT), PART_M, PART_N, TMA)
            h = _add_masks(
                zeros(PART_M, PART_N, LEFT), total, gs, part, gt, m1, n1, M, H,
                0, scalars, ACT, UP, FIRST, PART_M, PART_N, TMA, LEFT,
            )  # fmt: skip
            if N_M > FIRST:
                hs = hs + (h,)
            elif out is not None:
                store_tile(out, H, m1, n1, M, H, upright(h, LEFT), PART_M, PART_N, TMA)
        if N_M > FIRST:
            for first in tl.range(FIRST, N_M, MASKS):
                group = multiply_masked(
                    x, stride_xm, stride_xd, w, stride_wh, stride_wd, planes_ptr, shift,
                    m0, n0, 0, D, M, H, D, first, MASKS, 0, N_M,
                    BLOCK_M, BLOCK_N, BLOCK_K, TMA, K_MAJOR, MASK_K, LEFT, PRECISION,
                )  # fmt: skip
                group_gs = _parts(group, BLOCK_M, BLOCK_N, SUBTILES, LEFT)
                sums = ()
                for part in tl.static_range(SUBTILES):
                    h = _add_masks(
                        hs[part], totals[part], group_gs, part, gt,
                        m0 + part * STEP_M, n0 + part * STEP_N, M, H,
                        first, scalars, ACT, UP, MASKS, PART_M, PART_N, TMA, LEFT,
                    )  # fmt: skip
                    sums = sums + (h,)
                hs = sums
            if out is not None:
                for part in tl.static_range(SUBTILES):
                    m1 = m0 + part * STEP_M
                    n1 = n0 + part * STEP_N
                    h = upright(hs[part], LEFT)
                    store_tile(out, H, m1, n1, M, H, h, PART_M, PART_N, TMA)


def masked_options(tile: Tile, x: Tensor, n_m: int) -> dict[str, Any]:
    """Constants of a launch."""
    return {
        "N_M": n_m,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "SUBTILES": tile.subtiles,
        "TMA": tile.tma,
        "LEFT": tile.weight_left,
        "PRECISION": precision(x.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **compiler_options(tile),
    }


def _masks_of_a_pass(n_m: int, tile: Tile) -> int:
    return 4 if n_m == 4 and not tile.weight_left else 2 if n_m % 2 == 0 else 1


def masked_gated_linear_results(
    x: Tensor, w: Tensor, planes: Tensor, want_h: bool, want_gt: bool
) -> tuple[Tensor, Tensor]:
    """Memory for h (M, H) and gt (1 + n_m, M, H), each with M = 0 if not wanted."""
    M, H = x.shape[0], w.shape[0]
    gt = x.new_empty((1 + planes.shape[2], M if want_gt else 0, H))
    return x.new_empty((M if want_h else 0, H)), gt


def masked_gated_linear_fwd(
    x: Tensor, w: Tensor, planes: Tensor, activation: str, want_h: bool, want_gt: bool
) -> tuple[Tensor, Tensor]:
    """h (M or 0, H), and t, g_1, .. as gt (1 + n_m, M or 0, H)."""
    (M, D), H, n_m = x.shape, w.shape[0], planes.shape[2]
    h, gt = masked_gated_linear_results(x, w, planes, want_h, want_gt)
    if M == 0 or H == 0:
        return h, gt
    kernel = "masked_gated_linear_fwd" if n_m == 1 else "masked_gated_linear_fwd_group"
    outputs = h if want_h else None, gt if want_gt else None
    fit = fit_of(x, outputs[0], gt[0] if want_gt else None, weights=(w,))
    tile = LAST[kernel] = pick_tile(kernel, x, M, H, fit)
    if tile.skinny:
        launch_split(tile, pick_splits(tile, x, H, D), x, w, planes, *outputs, activation)
        return h, gt
    act = act_of(activation)
    if act["UP"] is not None:
        tile = narrower(tile)  # or the largest spill: psi needs g, t - g and h at once
    weight, *w_strides, k_major = weight_of(w, tile.block_n, tile.block_k, tile.tma)
    part_m, part_n = tile.part
    noted(_fwd_kernel)[grid_of(tile, x, M, H)](
        rows_of(x, tile.block_m, tile.block_k, tile.tma), weight, words_of(planes),
        rows_of(outputs[0], part_m, part_n, tile.tma),
        slices_of(outputs[1], part_m, part_n, tile.tma),
        M, H, D, *x.stride(), *w_strides,
        **act, MASKS=_masks_of_a_pass(n_m, tile),
        K_MAJOR=k_major, MASK_K=D % tile.block_k != 0, **masked_options(tile, x, n_m),
    )  # fmt: skip
    return h, gt
