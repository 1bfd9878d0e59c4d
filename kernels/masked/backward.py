"""The backward of masked_gated_linear. With V = sum_i dv_i and e_i = dg_i - dv_i, where
dv_i = dh act(g_i) and dg_i = dh act'(g_i) (t - g_i):

| kernel | computes |
|---|---|
| _ev_kernel | V, e_1, .. elementwise as ev (1 + n_m, M, H), and h again |
| _dx_kernel | dx = V w + sum_i e_i (m_i * w): one product over the concatenation |
| _dw_kernel | dw = V' x + sum_i m_i * G_i and dlogit_i = w * G_i, with G_i = e_i' x |

Masks are laid over the w tile in registers; _dw_kernel takes one G_i after the other, so any number
of masks needs the same registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import act_of
from ..arch.tile import cdiv
from ..left import shifts
from ..pick import LAST, pick_tile
from ..plans import noted
from ..tiles import (
    column_parts,
    dot,
    fit_of,
    grid_of,
    load_slice,
    load_tile,
    multiplied,
    rows_of,
    slices_of,
    store_slice,
    store_tile,
    tile_at,
    upright,
    weight_of,
    zeros,
)
from .masked_gated_linear import masked_options
from .masks import bits_of, keep, keep_pairs, load_words, words_of

ELEMENTS = 1024  # a program of the elementwise kernel


@triton.jit
def _ev_kernel(
    dh_ptr,
    gt_ptr,
    ev_ptr,
    h_ptr,
    M,
    H,
    stride_dhm,
    stride_dhh,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    size = tl.cast(M, tl.int64) * H
    dh = load_tile(dh_ptr, stride_dhm, stride_dhh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
    dh = dh.to(tl.float32)
    total = load_tile(gt_ptr, H, 1, m0, n0, M, H, BLOCK_M, BLOCK_N, False).to(tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = values
    for i in tl.range(1, 1 + N_M):
        g = load_tile(gt_ptr + i * size, H, 1, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
        g = g.to(tl.float32)
        value, slope = ACT(g, *scalars)
        v = total - g
        dv = dh * value
        if UP is not None:
            v, v_slope = UP(v, *scalars)
            dv = dv * v_slope
        e = dh * slope * v - dv
        store_tile(ev_ptr + i * size, H, m0, n0, M, H, e, BLOCK_M, BLOCK_N, False)
        values += dv
        h += value * v
    store_tile(ev_ptr, H, m0, n0, M, H, values, BLOCK_M, BLOCK_N, False)
    if h_ptr is not None:
        store_tile(h_ptr, H, m0, n0, M, H, h, BLOCK_M, BLOCK_N, False)


@triton.jit
def _words(
    planes_ptr,
    i,
    r0,
    c0,
    R,
    C,
    N_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Which weights mask i - 1 keeps, eight a byte; all of them for i = 0."""
    words = load_words(
        planes_ptr, tl.maximum(i, 1) - 1, r0, c0, R, C, N_M, 1, BLOCK_R, BLOCK_C, True, LEFT
    )
    return tl.where(i == 0, 255, words).to(tl.uint32)


@triton.jit
def _dx_kernel(
    ev,
    w,
    planes_ptr,
    dx,
    M,
    D,
    H,
    stride_wh,
    stride_wd,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    shift = shifts(planes_ptr, H, 8, LEFT)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        acc = zeros(BLOCK_M, BLOCK_N, LEFT)
        if LEFT:  # as multiply_masked says
            tl.assume(H > 0)
        # One product a step: two into one accumulator miscompile on sm_100 (kernels/README.md).
        for step in tl.range(0, tl.cdiv(H, BLOCK_K) * (1 + N_M)):
            k = step // (1 + N_M) * BLOCK_K
            i = step % (1 + N_M)
            a = load_slice(ev, i, m0, k, M, H, BLOCK_M, BLOCK_K, TMA)
            if TMA and not K_MAJOR:
                tile = w.load([n0, k]).T
            elif TMA:
                tile = w.load([k, n0])
            else:
                tile = load_tile(w, stride_wh, stride_wd, k, n0, H, D, BLOCK_K, BLOCK_N, False)
            words = _words(planes_ptr, i, k, n0, H, D, N_M, BLOCK_K, BLOCK_N, LEFT)
            kept = keep_pairs(words, shift, 0, tile, BLOCK_K, BLOCK_N)
            acc = multiplied(a, kept, acc, LEFT, PRECISION)
        store_tile(dx, D, m0, n0, M, D, upright(acc, LEFT), BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _dw_kernel(
    ev,
    x,
    w_ptr,
    planes_ptr,
    dw,
    dlogits,
    H,
    D,
    M,
    stride_xm,
    stride_xd,
    stride_wh,
    stride_wd,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles (BLOCK_M, BLOCK_N) of (H, D); K is M tokens."""
    FIRST: tl.constexpr = 0 if dw is not None else 1
    PART: tl.constexpr = BLOCK_N // SUBTILES
    tiles_m = tl.cdiv(H, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        r0 = tile_m * BLOCK_M
        c0 = tile_n * BLOCK_N
        sums = ()
        for _ in tl.static_range(SUBTILES):
            sums = sums + (tl.zeros((BLOCK_M, PART), tl.float32),)
        for i in tl.range(FIRST, 1 + N_M):
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, M, BLOCK_K):
                a = load_slice(ev, i, k, r0, M, H, BLOCK_K, BLOCK_M, TMA).T
                b = load_tile(x, stride_xm, stride_xd, k, c0, M, D, BLOCK_K, BLOCK_N, TMA)
                acc = dot(a, b, acc, PRECISION)
            parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
            added = ()
            for part in tl.static_range(SUBTILES):
                c1 = c0 + part * PART
                # Not one condition: the first is known when compiling, the second is not.
                if dlogits is not None:  # noqa: SIM102
                    if i > 0:
                        w = load_tile(
                            w_ptr, stride_wh, stride_wd, r0, c1, H, D, BLOCK_M, PART, False
                        )
                        grad = w.to(tl.float32) * parts[part]
                        store_slice(dlogits, i - 1, r0, c1, H, D, grad, BLOCK_M, PART, TMA)
                if dw is not None:
                    words = _words(planes_ptr, i, r0, c1, H, D, N_M, BLOCK_M, PART, False)
                    kept = keep(bits_of(words, 0, BLOCK_M, PART), parts[part])
                    added = added + (sums[part] + kept,)
                else:
                    added = added + (sums[part],)
            sums = added
        if dw is not None:
            for part in tl.static_range(SUBTILES):
                store_tile(dw, D, r0, c0 + part * PART, H, D, sums[part], BLOCK_M, PART, TMA)


def masked_gated_linear_ev_results(gt: Tensor, want_h: bool) -> tuple[Tensor, Tensor]:
    """Memory for ev (1 + n_m, M, H), and for h (M, or 0 if not wanted, H)."""
    _, M, H = gt.shape
    return gt.new_empty(gt.shape), gt.new_empty((M if want_h else 0, H))


def masked_gated_linear_dw_results(
    w: Tensor, planes: Tensor, want_dw: bool, want_dlogits: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Memory for dw (H, D) and dlogits (n_m, H, D), each with no rows if not wanted."""
    (H, D), n_m = w.shape, planes.shape[2]
    dw = w.new_empty((H if want_dw else 0, D))
    return dw, w.new_empty((n_m if want_dlogits else 0, H, D), dtype=dtype)


def masked_gated_linear_ev(
    dh: Tensor, gt: Tensor, activation: str, want_h: bool
) -> tuple[Tensor, Tensor]:
    """V, e_1, .. as ev (1 + n_m, M, H), and h (M or 0, H)."""
    planes, M, H = gt.shape
    ev, h = masked_gated_linear_ev_results(gt, want_h)
    if M and H:
        block_n = min(triton.next_power_of_2(H), ELEMENTS)
        block_m = ELEMENTS // block_n
        noted(_ev_kernel)[cdiv(M, block_m) * cdiv(H, block_n),](
            dh, gt, ev, h if want_h else None, M, H, *dh.stride(),
            **act_of(activation), N_M=planes - 1, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return ev, h


def masked_gated_linear_dx(ev: Tensor, w: Tensor, planes: Tensor) -> Tensor:
    (_, M, H), D = ev.shape, w.shape[1]
    dx = ev.new_empty((M, D))
    if dx.numel() == 0:
        return dx
    if H == 0:
        return dx.zero_()
    kernel = "masked_gated_linear_dx"
    tile = LAST[kernel] = pick_tile(kernel, ev, M, D, fit_of(ev[0], dx, weights=(w,)))
    # Here the weight's columns are the result's, and its rows are summed over.
    weight, *w_strides, k_major = weight_of(w, tile.block_k, tile.block_n, tile.tma)
    noted(_dx_kernel)[grid_of(tile, ev, M, D)](
        slices_of(ev, tile.block_m, tile.block_k, tile.tma), weight, words_of(planes),
        rows_of(dx, tile.block_m, tile.block_n, tile.tma), M, D, H, *w_strides,
        K_MAJOR=k_major, **masked_options(tile, ev, planes.shape[2]),
    )  # fmt: skip
    return dx


def masked_gated_linear_dw(
    ev: Tensor,
    x: Tensor,
    w: Tensor,
    planes: Tensor,
    want_dw: bool,
    want_dlogits: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dw (H or 0, D), and dlogits (n_m or 0, H, D) in `dtype`."""
    (M, D), H, n_m = x.shape, w.shape[0], planes.shape[2]
    dw, dlogits = masked_gated_linear_dw_results(w, planes, want_dw, want_dlogits, dtype)
    if H == 0 or D == 0 or not (want_dw or want_dlogits):
        return dw, dlogits
    kernel = "masked_gated_linear_dw"
    wanted_w, wanted_logits = dw if want_dw else None, dlogits if want_dlogits else None
    fit = fit_of(ev[0], x, wanted_w, dlogits[0] if want_dlogits else None)
    tile = LAST[kernel] = pick_tile(kernel, x, H, D, fit)
    block_out = tile.block_n // tile.subtiles
    noted(_dw_kernel)[grid_of(tile, x, H, D)](
        slices_of(ev, tile.block_k, tile.block_m, tile.tma),
        rows_of(x, tile.block_k, tile.block_n, tile.tma),
        w, words_of(planes),
        rows_of(wanted_w, tile.block_m, block_out, tile.tma),
        slices_of(wanted_logits, tile.block_m, block_out, tile.tma),
        H, D, M, *x.stride(), *w.stride(), **masked_options(tile, x, n_m),
    )  # fmt: skip
    return dw, dlogits
