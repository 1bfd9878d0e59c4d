"""y = x w' + b over one-bit weights, and two such products with a gate; few rows and many.

| file | kernels |
|---|---|
| bits.py | words and scales as a weight tile |
| binary_linear.py | the tiled forward and the forward for few rows, plain or gated |
| binary_gated_linear.py | their launcher with a gate |
| backward.py | dx, the backward of a whole block's h, the gradient of the scales |

Many rows: each K step makes a tile of +-scale in x's dtype and multiplies it on the tensor cores;
by a tile of `weight_left` as the left operand, from the registers in which it is made.
Few rows (M <= SKINNY_M): words and scales are read once and are the time; the tile is +-1, its
product with x one group's, scaled in float32; K is cut into parts, summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import act_of
from ..arch.tile import Tile, cdiv
from ..epilogues import store_fwd
from ..left import shifts
from ..pick import LAST, pick_splits, pick_tile
from ..plans import noted
from ..skinny import reduce_kernel
from ..tiles import (
    compiler_options,
    dot,
    fit_of,
    gemm_options,
    grid_of,
    load_tile,
    multiplied,
    parts_of,
    precision,
    rounded,
    rows_of,
    store_tile,
    tile_at,
    upright,
    zeros,
)
from .bits import load_scales, load_words, signed, signed_pairs


@triton.jit
def load_binary(
    q_ptr, s_ptr, shift, n0, k0, N, groups, dtype: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """+-scale of rows n0.. and weights k0.., which lie in one group: (BLOCK_N, BLOCK_K). If LEFT it
    is multiplied where it is made."""
    words = load_words(q_ptr, n0, k0, N, groups, BLOCK_N, BLOCK_K)
    scales = rounded(load_scales(s_ptr, n0, k0, N, groups, BLOCK_N), dtype)
    if LEFT and dtype.primitive_bitwidth == 16:
        tile = signed_pairs(words, shift, scales, BLOCK_N, BLOCK_K)
    else:
        tile = signed(words, scales.to(tl.float32), BLOCK_N, BLOCK_K).to(dtype)
    return tile


@triton.jit
def _fwd_kernel(
    x,
    q_gate_ptr,
    s_gate_ptr,
    q_up_ptr,
    s_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    h,
    g,
    u,
    M,
    H,
    D,
    stride_xm,
    stride_xd,
    stride_hm,
    stride_gm,
    stride_bg,
    stride_bu,
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
    GATED: tl.constexpr = q_up_ptr is not None
    PART_M: tl.constexpr = BLOCK_M // SUBTILES if LEFT else BLOCK_M
    PART_N: tl.constexpr = BLOCK_N if LEFT else BLOCK_N // SUBTILES
    STEP_M: tl.constexpr = PART_M if LEFT else 0
    STEP_N: tl.constexpr = 0 if LEFT else PART_N
    shift = shifts(q_gate_ptr, H, 32, LEFT)
    groups = tl.cdiv(D, 128)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        acc_g = zeros(BLOCK_M, BLOCK_N, LEFT)
        acc_u = acc_g
        if LEFT:  # as multiply_masked says
            tl.assume(D > 0)
        for k in tl.range(0, D, BLOCK_K):
            a = load_tile(x, stride_xm, stride_xd, m0, k, M, D, BLOCK_M, BLOCK_K, TMA, MASK_K)
            w = load_binary(
                q_gate_ptr, s_gate_ptr, shift, n0, k, H, groups, a.dtype, BLOCK_N, BLOCK_K, LEFT
            )
            acc_g = multiplied(a, w.T, acc_g, LEFT, PRECISION)
            if GATED:
                w = load_binary(
                    q_up_ptr, s_up_ptr, shift, n0, k, H, groups, a.dtype, BLOCK_N, BLOCK_K, LEFT
                )
                acc_u = multiplied(a, w.T, acc_u, LEFT, PRECISION)
        if not GATED:
            acc_u = acc_g
        parts_g = parts_of(acc_g, BLOCK_M, BLOCK_N, SUBTILES, LEFT)
        parts_u = parts_of(acc_u, BLOCK_M, BLOCK_N, SUBTILES, LEFT)
        for i in tl.static_range(SUBTILES):
            store_fwd(
                upright(parts_g[i], LEFT), upright(parts_u[i], LEFT), b_gate_ptr, b_up_ptr, h, g, u,
                m0 + i * STEP_M, n0 + i * STEP_N, M, H,
                stride_hm, stride_gm, stride_bg, stride_bu, scalars, ACT, UP,
                PART_M, PART_N, TMA, GATED,
            )  # fmt: skip


@triton.jit
def _add_group(
    acc, a, q_ptr, s_ptr, n0, k, H, groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + scale * (a signs'), the scale in float32."""
    words = load_words(q_ptr, n0, k, H, groups, BLOCK_N, BLOCK_K)
    scales = load_scales(s_ptr, n0, k, H, groups, BLOCK_N)
    ones = tl.full((BLOCK_N,), 1.0, tl.float32)
    signs = signed(words, ones, BLOCK_N, BLOCK_K).to(a.dtype)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return acc + dot(a, signs.T, zero, PRECISION) * scales[None, :]


@triton.jit
def _partial_kernel(
    x,
    q_gate_ptr,
    s_gate_ptr,
    q_up_ptr,
    s_up_ptr,
    parts_ptr,
    M,
    H,
    D,
    depth,
    stride_xm,
    stride_xd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products over `depth` of K for few rows (M <= BLOCK_M): parts (splits, 1 or 2, M, H) in
    float32."""
    GATED: tl.constexpr = q_up_ptr is not None
    n0 = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    groups = tl.cdiv(D, 128)
    k_begin = part * depth
    acc_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_u = acc_g
    for k in tl.range(k_begin, min(k_begin + depth, D), BLOCK_K):
        a = load_tile(x, stride_xm, stride_xd, 0, k, M, D, BLOCK_M, BLOCK_K, False, MASK_K)
        acc_g = _add_group(
            acc_g, a, q_gate_ptr, s_gate_ptr, n0, k, H, groups, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if GATED:
            acc_u = _add_group(
                acc_u, a, q_up_ptr, s_up_ptr, n0, k, H, groups, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
    size = tl.cast(M, tl.int64) * H
    parts_ptr += part * size * (2 if GATED else 1)
    store_tile(parts_ptr, H, 0, n0, M, H, acc_g, BLOCK_M, BLOCK_N, False)
    if GATED:
        store_tile(parts_ptr + size, H, 0, n0, M, H, acc_u, BLOCK_M, BLOCK_N, False)


def _launch_split(
    tile: Tile,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    activation: str,
) -> None:
    (M, D), H, gated = x.shape, weights[0].shape[0], weights[2] is not None  # type: ignore[union-attr]
    splits = pick_splits(tile, x, H, D)
    depth = cdiv(cdiv(D, splits), tile.block_k) * tile.block_k
    splits = cdiv(D, depth) if depth else 1
    parts = x.new_empty((splits, 2 if gated else 1, M, H), dtype=torch.float32)
    shared = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **compiler_options(tile)}
    columns = cdiv(H, tile.block_n)
    noted(_partial_kernel)[columns, splits](
        x, *weights, parts, M, H, D, depth, *x.stride(),
        BLOCK_K=tile.block_k, MASK_K=D % tile.block_k != 0, PRECISION=precision(x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
    )  # fmt: skip
    noted(reduce_kernel)[columns,](
        parts, *biases, *outputs, M, H, splits, *strides,
        **act_of(activation), GATED=gated, **shared,
    )  # fmt: skip


def launch_fwd(
    kernel: str,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
) -> None:
    """Fill whichever of `outputs`, h, g, u (M, H), are given. weights: words and scales of gate and
    up, the latter None where there is no gate. `kernel` names the row of tiles."""
    (M, D), H = x.shape, weights[0].shape[0]  # type: ignore[union-attr]
    if M == 0 or H == 0:
        return
    tile = LAST[kernel] = pick_tile(kernel, x, M, H, fit_of(x, *outputs))
    h, g, _ = outputs
    # Strides of whatever is there; u is laid out as g is.
    strides = tuple(0 if t is None else t.stride(0) for t in (h, g, *biases))
    if tile.skinny:
        _launch_split(tile, x, weights, outputs, biases, strides, activation)
        return
    options = gemm_options(tile, D % tile.block_k != 0, precision(x.dtype))
    noted(_fwd_kernel)[grid_of(tile, x, M, H)](
        rows_of(x, tile.block_m, tile.block_k, tile.tma), *weights, *biases,
        *(rows_of(t, *tile.part, tile.tma) for t in outputs),
        M, H, D, *x.stride(), *strides, **act_of(activation), LEFT=tile.weight_left, **options,
    )  # fmt: skip


def binary_linear_result(x: Tensor, qweight: Tensor) -> Tensor:
    """Memory for y (M, H)."""
    return x.new_empty((x.shape[0], qweight.shape[0]))


def binary_linear_fwd(x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None) -> Tensor:
    y = binary_linear_result(x, qweight)
    weights = (qweight, scales, None, None)
    launch_fwd("binary_linear_fwd", x, weights, (b, None), (y, None, None), "identity")
    return y
