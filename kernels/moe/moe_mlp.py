"""The two GEMMs of experts: up, from token order into expert order, and down, back again.

| kernel | reads | writes |
|---|---|---|
| _up_kernel | rows of x, gathered; w_gate, w_up, biases | h, g, u in expert order: whichever are wanted |
| _down_kernel | rows in expert order (or gathered), one or two weights | y in token order, 0 for dropped tokens; in expert order for k > 1 |
| _combine_kernel | a token's k rows in expert order, prob | their sum in token order; for k > 1 alone |

_down_kernel also makes dx: with a = dg, du and the up weights transposed. A choice has one row:
plain stores, no atomics, and a token's k rows are added in the order of its choices. Sizes: x (T, D),
up weights (E, H, D), down (E, D, H); R = T k rows.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...packing import interleaved, split_pair
from ..activations import act_of
from ..arch.tile import Tile, cdiv
from ..epilogues import store_fwd
from ..pick import LAST, pick_grouped_tile
from ..plans import noted
from ..stacked import Stacked, run, stacked_of
from ..tiles import (
    column_parts,
    compiler_options,
    fit_of,
    precision,
    rounded,
    rows_of,
    tile_at,
    unweave,
)
from .grouped import (
    accumulate,
    block_e,
    experts_fit,
    experts_of,
    gathered_at,
    group_at,
    grouped_grid,
    multiply_both,
    rows_at,
    tile_ends,
)

COMBINED = 8, 512  # rows and columns of a tile of sums


@triton.jit
def _up_kernel(
    x_ptr,
    w_gate,
    w_up,
    b_gate_ptr,
    b_up_ptr,
    h_ptr,
    g_ptr,
    u_ptr,
    tokens_ptr,
    offsets_ptr,
    E,
    H,
    D,
    k,
    stride_xm,
    stride_xd,
    stride_gate_e,
    stride_gate_h,
    stride_gate_d,
    stride_up_e,
    stride_up_h,
    stride_up_d,
    stride_hm,
    stride_gm,
    stride_bg_e,
    stride_bg: tl.constexpr,
    stride_bu_e,
    stride_bu: tl.constexpr,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    GATE_K_MAJOR: tl.constexpr,
    UP_K_MAJOR: tl.constexpr,
    STACKED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GATED: tl.constexpr = STACKED or INTERLEAVED or w_up is not None
    # INTERLEAVED: w_gate holds both, and the accumulator the columns of g and u in turn.
    TURNS: tl.constexpr = 2 if INTERLEAVED else 1
    ends = tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    tiles_m = tl.max(ends, 0)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        n0 = tile_n * BLOCK_N
        expert, r0, end = group_at(ends, offsets_ptr, tile_m, BLOCK_M)
        rows, mask_r = gathered_at(tokens_ptr, r0, end, k, BLOCK_M)
        acc_g, acc_u = multiply_both(
            x_ptr, rows, mask_r, r0, stride_xm, stride_xd,
            w_gate, stride_gate_e, stride_gate_h, stride_gate_d,
            w_up, stride_up_e, stride_up_h, stride_up_d,
            expert, TURNS * n0, TURNS * H, D, BLOCK_M, TURNS * BLOCK_N, BLOCK_K,
            TMA, GATE_K_MAJOR, UP_K_MAJOR, STACKED, MASK_K, PRECISION,
        )  # fmt: skip
        if UP_FIRST:
            acc_g, acc_u = acc_u, acc_g
        bias_g = b_gate_ptr
        bias_u = b_up_ptr
        if b_gate_ptr is not None:
            bias_g = b_gate_ptr + tl.cast(expert, tl.int64) * stride_bg_e
        if b_up_ptr is not None:
            bias_u = b_up_ptr + tl.cast(expert, tl.int64) * stride_bu_e
        PART: tl.constexpr = BLOCK_N // SUBTILES
        parts_g = column_parts(acc_g, BLOCK_M, TURNS * BLOCK_N, SUBTILES)
        parts_u = column_parts(acc_u, BLOCK_M, TURNS * BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            part_g, part_u = parts_g[i], parts_u[i]
            if INTERLEAVED:
                part_g, part_u = unweave(part_g, BLOCK_M, PART)
            store_fwd(
                part_g, part_u, bias_g, bias_u, h_ptr, g_ptr, u_ptr,
                r0, n0 + i * PART, end, H,
                stride_hm, stride_gm, stride_bg, stride_bu, scalars, ACT, UP,
                BLOCK_M, PART, False, GATED,
            )  # fmt: skip


@triton.jit
def _down_kernel(
    a,
    w,
    a2,
    w2,
    b_ptr,
    prob_ptr,
    y_ptr,
    tokens_ptr,
    offsets_ptr,
    E,
    N,
    K,
    stride_am,
    stride_ak,
    stride_we,
    stride_wn,
    stride_wk,
    stride_2e,
    stride_2n,
    stride_2k,
    stride_be,
    stride_bn,
    stride_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    K_MAJOR_2: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """prob (a w' + a2 w2' + b); GATHER: a is in token order too. Group E are dropped tokens.
    Without tokens_ptr the result stays in expert order."""
    A_TMA: tl.constexpr = TMA and not GATHER
    # One loop: the next tile's boxes arrive under this one's epilogue. Gathered rows gain nothing
    # from it, since their addresses come first, and a spill costs more (kernels/README.md).
    FLATTEN: tl.constexpr = A_TMA and w2 is None
    ends = tile_ends(offsets_ptr, E + 1, BLOCK_M, BLOCK_E)
    tiles_m = tl.max(ends, 0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        n0 = tile_n * BLOCK_N
        expert, r0, end = group_at(ends, offsets_ptr, tile_m, BLOCK_M)
        # Nothing is read for dropped tokens.
        depth = tl.where(expert < E, K, 0)
        width = tl.where(expert < E, N, 0)
        kept = tl.where(expert < E, end, 0)
        tokens, mask_r = rows_at(tokens_ptr, r0, end, BLOCK_M)
        rows, mask_kept = rows_at(None, r0, kept, BLOCK_M)
        if GATHER:
            rows = tokens
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = accumulate(
            acc, a, rows, mask_r, r0, stride_am, stride_ak,
            w, stride_we, stride_wn, stride_wk, expert, n0, depth, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, A_TMA, TMA, K_MAJOR, MASK_K, PRECISION,
        )  # fmt: skip
        if w2 is not None:
            acc = accumulate(
                acc, a2, rows, mask_r, r0, stride_am, stride_ak,
                w2, stride_2e, stride_2n, stride_2k, expert, n0, depth, N, K,
                BLOCK_M, BLOCK_N, BLOCK_K, A_TMA, TMA, K_MAJOR_2, MASK_K, PRECISION,
            )  # fmt: skip
        PART: tl.constexpr = BLOCK_N // SUBTILES
        parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            value = parts[i]
            offs_n = n0 + i * PART + tl.arange(0, PART)
            mask_n = offs_n < N
            if b_ptr is not None:
                bias = b_ptr + tl.cast(expert, tl.int64) * stride_be
                bias = bias + offs_n.to(tl.int64) * stride_bn
                value += tl.load(bias, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
            if prob_ptr is not None:
                prob = tl.load(prob_ptr + tokens * stride_p, mask=mask_kept, other=0.0)
                value = value * prob.to(tl.float32)[:, None]
            pointers = y_ptr + tokens[:, None] * N + offs_n[None, :]
            value = rounded(value, y_ptr.dtype.element_ty)
            tl.store(pointers, value, mask=mask_r[:, None] & mask_n[None, :])


@triton.jit
def _combine_kernel(
    r_ptr,
    prob_ptr,
    y_ptr,
    rows_ptr,
    offsets_ptr,
    T,
    E,
    N,
    k,
    stride_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] = sum of prob r over the choices of t, in their order; dropped ones are not read."""
    offs_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    kept = tl.load(offsets_ptr + E)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(0, k):
        number = offs_t * k + j
        row = tl.load(rows_ptr + number, mask=mask_t, other=0)
        own = mask_t & (row < kept)
        at = row.to(tl.int64)[:, None] * N + offs_n[None, :]
        value = tl.load(r_ptr + at, mask=own[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        if prob_ptr is not None:
            prob = tl.load(prob_ptr + number.to(tl.int64) * stride_p, mask=own, other=0.0)
            value = value * prob.to(tl.float32)[:, None]
        acc += value
    pointers = y_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    value = rounded(acc, y_ptr.dtype.element_ty)
    tl.store(pointers, value, mask=mask_t[:, None] & mask_n[None, :])


@functools.lru_cache(1024)
def grouped_options(tile: Tile, groups: int, masked: bool, precision: str) -> dict[str, Any]:
    """Constants of a grouped launch. masked: K does not end on a K step."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_E": block_e(groups),
        "GROUP_M": tile.group_m,
        "SUBTILES": tile.subtiles,
        "TMA": tile.tma,
        "MASK_K": masked,
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **compiler_options(tile),
    }


def moe_up_results(
    x: Tensor, tokens: Tensor, w_gate: Tensor, w_up: Tensor | None, want_h: bool, want_gu: bool
) -> tuple[Tensor, Tensor]:
    """Memory for h (R, H) and gu (2, R, H), or g (1, R, H); each with R = 0 if not wanted."""
    R, H = tokens.shape[0], w_gate.shape[1]
    gu = x.new_empty((1 if w_up is None else 2, R if want_gu else 0, H))
    return x.new_empty((R if want_h else 0, H)), gu


def moe_up(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
) -> tuple[Tensor, Tensor]:
    """h (R, H) and gu (2, R, H), or g (1, R, H) without w_up, in expert order, of x (T, D) and
    R = T k choices; rows of dropped ones are not written."""
    (T, D), R = x.shape, tokens.shape[0]
    E, H, _ = w_gate.shape
    h, gu = moe_up_results(x, tokens, w_gate, w_up, want_h, want_gu)
    if T == 0:
        return h, gu
    g, u = (None, None) if not want_gu else (gu[0], None) if w_up is None else split_pair(gu, None)
    turns = interleaved(w_gate, w_up, 1)
    if turns is not None:
        w_gate, w_up = turns, None
    fit = min(fit_of(x, h if want_h else None, g, u), experts_fit(w_gate, w_up))
    tile = LAST["moe_up"] = pick_grouped_tile("moe_up", x, R, E, fit)
    block_n = tile.block_n if turns is None else 2 * tile.block_n
    gate, *gate_strides, gate_k_major = experts_of(w_gate, block_n, tile.block_k, tile.tma)
    up, *up_strides, up_k_major = experts_of(w_up, tile.block_n, tile.block_k, tile.tma)
    options = grouped_options(tile, E, D % tile.block_k != 0, precision(x.dtype))

    def launch(both: Stacked | None) -> None:
        weights = (gate, up) if both is None else (both.descriptor, None)
        noted(_up_kernel)[grouped_grid(tile, x, R, E, H)](
            x, *weights, b_gate, b_up, h if want_h else None, g, u, tokens, offsets,
            E, H, D, R // T, *x.stride(), *gate_strides, *up_strides, h.stride(0),
            0 if g is None else g.stride(0),
            *((0, 0) if b_gate is None else b_gate.stride()),
            *((0, 0) if b_up is None else b_up.stride()),
            **act_of(activation), GATE_K_MAJOR=gate_k_major, UP_K_MAJOR=up_k_major,
            STACKED=both is not None, UP_FIRST=both is not None and both.second_first,
            INTERLEAVED=turns is not None, **options,
        )  # fmt: skip

    both = None
    if tile.tma and w_up is not None:
        both = stacked_of(w_gate, w_up, tile.block_n, tile.block_k)
    run(both, launch)
    return h, gu


def moe_down_result(a: Tensor, w: Tensor) -> Tensor:
    """Memory for (T, N)."""
    return a.new_empty((a.shape[0], w.shape[1]))


def moe_down(
    a: Tensor,
    tokens: Tensor | None,
    offsets: Tensor,
    w: Tensor,
    a2: Tensor | None,
    w2: Tensor | None,
    b: Tensor | None,
    prob: Tensor | None,
    gather: bool,
) -> Tensor:
    """prob (a w' + a2 w2' + b) in token order (T, N), or without tokens, and prob, in expert order.
    a and a2 (T, K), laid out alike, are in expert order, or with `gather` in token order; w and w2
    are (E, N, K)."""
    T, K = a.shape
    E, N, _ = w.shape
    y = moe_down_result(a, w)
    if T == 0:
        return y
    fit = min(fit_of(a, a2, y), experts_fit(w, w2))
    tile = LAST["moe_down"] = pick_grouped_tile("moe_down", a, T, E, fit)
    first, *strides, k_major = experts_of(w, tile.block_n, tile.block_k, tile.tma)
    second, *strides2, k_major2 = experts_of(w2, tile.block_n, tile.block_k, tile.tma)
    by_tma = tile.tma and not gather
    rows, rows2 = (rows_of(t, tile.block_m, tile.block_k, by_tma) for t in (a, a2))
    options = grouped_options(tile, E + 1, K % tile.block_k != 0, precision(a.dtype))
    noted(_down_kernel)[grouped_grid(tile, a, T, E + 1, N)](
        rows, first, rows2, second, b, prob, y, tokens, offsets, E, N, K,
        *a.stride(), *strides, *strides2, *((0, 0) if b is None else b.stride()),
        0 if prob is None else prob.stride(0),
        GATHER=gather, K_MAJOR=k_major, K_MAJOR_2=k_major2, **options,
    )  # fmt: skip
    return y


def moe_combine_result(r: Tensor, rows: Tensor, k: int) -> Tensor:
    """Memory for (T, N)."""
    return r.new_empty((rows.shape[0] // k, r.shape[1]))


def moe_combine(r: Tensor, rows: Tensor, offsets: Tensor, prob: Tensor | None, k: int) -> Tensor:
    """The sums of each token's k rows of r (T k, N) in expert order, times prob (T k,) if given;
    rows (T k,) are those of its choices."""
    y = moe_combine_result(r, rows, k)
    T, N = y.shape
    if y.numel() == 0:
        return y
    noted(_combine_kernel)[cdiv(T, COMBINED[0]), cdiv(N, COMBINED[1])](
        r, prob, y, rows, offsets, T, offsets.shape[0] - 2, N, k,
        0 if prob is None else prob.stride(0), BLOCK_M=COMBINED[0], BLOCK_N=COMBINED[1],
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y
