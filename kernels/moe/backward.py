"""Backward of experts. dx is moe_mlp.py's down kernel on dg and du, and its sums for k > 1.

| kernel | reads | writes |
|---|---|---|
| _dh_kernel | dy, gathered; w_down, g, u, prob | dg, du and prob h in expert order; parts of dprob |
| _wgrad_kernel | rows of a and b of one expert, either of them gathered | dW (E, N, K), 0 where an expert has no row |
| _bias_kernel | dy, gathered; prob, b_down; or dg, du | column sums of prob dy, of dg, of du; parts of dprob |
| _dprob_kernel | the parts | dprob in token order, 0 for dropped tokens |
| _column_sums_kernel | the column sums of all row tiles | those of each expert |

Columns are summed by a kernel of their own: beside a tile of 128 x 256 their way through threads and
warps takes longer than reading dg and du once more does, and spares those without a bias nothing.

What is gathered has T rows and is read once for each of a token's k choices; R = T k. Partial sums are float32 and added in a fixed order: two runs give the same bits.
"""  # noqa: E501

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...packing import Packed, empty_pair, split_pair
from ..activations import act_of
from ..arch.tile import Tile, cdiv, finer
from ..epilogues import store_column_sums
from ..pick import LAST, pick_grouped_tile
from ..plans import noted
from ..tiles import (
    column_parts,
    dot,
    fit_of,
    half_vector,
    load_tile,
    precision,
    rounded,
    store_tile,
    tile_at,
    weave,
)
from .grouped import (
    accumulate,
    block_e,
    experts_fit,
    experts_of,
    gathered_at,
    group_at,
    grouped_grid,
    load_rows,
    most_tiles,
    rows_at,
    tile_ends,
    token_of,
)
from .moe_mlp import grouped_options

BIAS_ROWS, BIAS_COLUMNS = 64, 128  # of a tile whose rows are only summed
DOT_ROWS, DOT_PARTS = 64, 32  # of partial sums of dprob that are read at once


@triton.jit
def _store_dots(dots_ptr, part, R, r0, mask_r, value, BLOCK_M: tl.constexpr):
    offs_r = r0 + tl.arange(0, BLOCK_M)
    tl.store(dots_ptr + tl.cast(part, tl.int64) * R + offs_r, tl.sum(value, 1), mask=mask_r)


@triton.jit
def _dh_kernel(
    dy_ptr,
    w_down,
    g_ptr,
    u_ptr,
    prob_ptr,
    dg_ptr,
    du_ptr,
    h_ptr,
    dots_ptr,
    tokens_ptr,
    offsets_ptr,
    R,
    E,
    H,
    D,
    k,
    stride_dym,
    stride_dyd,
    stride_down_e,
    stride_down_h,
    stride_down_d,
    stride_gm,
    stride_dgm,
    stride_p,
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
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With c = dy w_down: dprob = sum c h, dh = prob c, then as store_bwd. h is stored times prob,
    as the gradient of w_down wants it. With u_ptr, but du_ptr None, dg_ptr takes both,
    interleaved."""
    GATED: tl.constexpr = u_ptr is not None
    TURNS: tl.constexpr = GATED and du_ptr is None
    MOST: tl.constexpr = half_vector(dg_ptr.dtype.element_ty) if TURNS else None
    PART: tl.constexpr = BLOCK_N // SUBTILES
    ends = tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    tiles_m = tl.max(ends, 0)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        expert, r0, end = group_at(ends, offsets_ptr, tile_m, BLOCK_M)
        number, mask_r = rows_at(tokens_ptr, r0, end, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = accumulate(
            acc, dy_ptr, token_of(number, k), mask_r, r0, stride_dym, stride_dyd,
            w_down, stride_down_e, stride_down_h, stride_down_d, expert, tile_n * BLOCK_N, D, H, D,
            BLOCK_M, BLOCK_N, BLOCK_K, False, TMA, K_MAJOR, MASK_K, PRECISION,
        )  # fmt: skip
        prob = tl.load(prob_ptr + number * stride_p, mask=mask_r, other=0.0).to(tl.float32)[:, None]
        parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            n0 = tile_n * BLOCK_N + i * PART
            gate = load_tile(g_ptr, stride_gm, 1, r0, n0, end, H, BLOCK_M, PART, False, True, MOST)
            value, slope = ACT(gate.to(tl.float32), *scalars)
            dh = parts[i] * prob
            grad = dh * slope
            if GATED:
                up = load_tile(
                    u_ptr, stride_gm, 1, r0, n0, end, H, BLOCK_M, PART, False, True, MOST
                )
                up = up.to(tl.float32)
                grad_up = dh * value
                if UP is not None:
                    up, up_slope = UP(up, *scalars)
                    grad_up = grad_up * up_slope
                if du_ptr is not None:
                    store_tile(du_ptr, stride_dgm, r0, n0, end, H, grad_up, BLOCK_M, PART, False)
                grad = grad * up
                value = value * up
            if TURNS:
                both = weave(grad, grad_up, BLOCK_M, PART)
                store_tile(
                    dg_ptr, stride_dgm, r0, 2 * n0, end, 2 * H, both, BLOCK_M, 2 * PART, False
                )
            else:
                store_tile(dg_ptr, stride_dgm, r0, n0, end, H, grad, BLOCK_M, PART, False)
            if h_ptr is not None:
                store_tile(h_ptr, H, r0, n0, end, H, prob * value, BLOCK_M, PART, False, MOST)
            if dots_ptr is not None:
                _store_dots(
                    dots_ptr, tile_n * SUBTILES + i, R, r0, mask_r, parts[i] * value, BLOCK_M
                )


@triton.jit
def _wgrad_kernel(
    a_ptr,
    b_ptr,
    dw_ptr,
    a_tokens_ptr,
    b_tokens_ptr,
    offsets_ptr,
    N,
    K,
    k,
    stride_am,
    stride_an,
    stride_bm,
    stride_bk,
    stride_e,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW[e] = a' b over expert e's rows: (BLOCK_M, BLOCK_N) of (N, K), BLOCK_K rows a step."""
    tiles_n = tl.cdiv(N, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile_n, tile_k = tile_at(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_M)
    n0 = tile_n * BLOCK_M
    k0 = tile_k * BLOCK_N
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tokens are loaded a step ahead: the loads that wait for them are then no deeper than others.
    a_rows, a_mask = gathered_at(a_tokens_ptr, begin, end, k, BLOCK_K)
    b_rows, b_mask = gathered_at(b_tokens_ptr, begin, end, k, BLOCK_K)
    for r in tl.range(begin, end, BLOCK_K):
        a = load_rows(
            a_ptr, a_rows, a_mask, r, n0, N, stride_am, stride_an, BLOCK_K, BLOCK_M, False, True
        )
        b = load_rows(
            b_ptr, b_rows, b_mask, r, k0, K, stride_bm, stride_bk, BLOCK_K, BLOCK_N, False, True
        )
        a_rows, a_mask = gathered_at(a_tokens_ptr, r + BLOCK_K, end, k, BLOCK_K)
        b_rows, b_mask = gathered_at(b_tokens_ptr, r + BLOCK_K, end, k, BLOCK_K)
        acc = dot(a.T, b, acc, PRECISION)
    dw_ptr += tl.cast(expert, tl.int64) * stride_e
    PART: tl.constexpr = BLOCK_N // SUBTILES
    parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
    for i in tl.static_range(SUBTILES):
        store_tile(dw_ptr, stride_n, n0, k0 + i * PART, N, K, parts[i], BLOCK_M, PART, False)


@triton.jit
def _bias_kernel(
    dy_ptr,
    prob_ptr,
    b_ptr,
    dots_ptr,
    sums_ptr,
    tokens_ptr,
    offsets_ptr,
    R,
    E,
    D,
    k,
    stride_dym,
    stride_dyd,
    stride_p,
    stride_be,
    stride_bd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    ends = tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    tile = tl.program_id(0)
    if tile < tl.max(ends, 0):
        expert, r0, end = group_at(ends, offsets_ptr, tile, BLOCK_M)
        number, mask_r = rows_at(tokens_ptr, r0, end, BLOCK_M)
        tokens = token_of(number, k)
        n0 = tl.program_id(1) * BLOCK_N
        dy = load_rows(
            dy_ptr, tokens, mask_r, r0, n0, D, stride_dym, stride_dyd, BLOCK_M, BLOCK_N, False, True
        ).to(tl.float32)
        if dots_ptr is not None:
            offs_n = n0 + tl.arange(0, BLOCK_N)
            own = b_ptr + tl.cast(expert, tl.int64) * stride_be
            bias = tl.load(own + offs_n.to(tl.int64) * stride_bd, mask=offs_n < D, other=0.0)
            value = dy * bias.to(tl.float32)[None, :]
            _store_dots(dots_ptr, tl.program_id(1), R, r0, mask_r, value, BLOCK_M)
        if sums_ptr is not None:
            if prob_ptr is not None:
                prob = tl.load(prob_ptr + number * stride_p, mask=mask_r, other=0.0)
                dy = dy * prob.to(tl.float32)[:, None]
            store_column_sums(dy, sums_ptr, tile, n0, D, BLOCK_N)


@triton.jit
def _dprob_kernel(
    dots_ptr,
    dprob_ptr,
    tokens_ptr,
    offsets_ptr,
    R,
    E,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = offs_r < tl.load(offsets_ptr + E)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.range(0, parts, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)[:, None]
        dots = dots_ptr + offs_p.to(tl.int64) * R + offs_r[None, :]
        total += tl.sum(tl.load(dots, mask=kept[None, :] & (offs_p < parts), other=0.0), 0)
    number = tl.load(tokens_ptr + offs_r, mask=offs_r < R, other=0)
    tl.store(dprob_ptr + number, rounded(total, dprob_ptr.dtype.element_ty), mask=offs_r < R)


@triton.jit
def _column_sums_kernel(
    sums_ptr,
    out_ptr,
    offsets_ptr,
    E,
    N,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out (E, N): the sums of each expert's row tiles; BLOCK_M is what those were cut by."""
    ends = tile_ends(offsets_ptr, E, BLOCK_M, BLOCK_E)
    expert = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    begin = tl.sum(tl.where(offs_e == expert - 1, ends, 0), 0)
    end = tl.sum(tl.where(offs_e == expert, ends, 0), 0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(begin, end):
        row = sums_ptr + tl.cast(tile, tl.int64) * stride_m
        total += tl.load(row + offs_n.to(tl.int64) * stride_n, mask=mask_n, other=0.0)
    own = out_ptr + tl.cast(expert, tl.int64) * N
    tl.store(own + offs_n, rounded(total, out_ptr.dtype.element_ty), mask=mask_n)


def _column_sums(sums: Tensor, out: Tensor, offsets: Tensor) -> None:
    """Fill out (E, N) from sums (row tiles, N), of any strides."""
    E, N = out.shape
    noted(_column_sums_kernel)[E, cdiv(N, BIAS_COLUMNS)](
        sums, out, offsets, E, N, *sums.stride(),
        BLOCK_M=BIAS_ROWS, BLOCK_N=BIAS_COLUMNS, BLOCK_E=block_e(E),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _dprob(dots: Tensor, dprob: Tensor, tokens: Tensor, offsets: Tensor) -> None:
    """Fill dprob (R,), in token order, with the sums of dots (parts, R), in expert order."""
    parts, R = dots.shape
    noted(_dprob_kernel)[cdiv(R, DOT_ROWS),](
        dots, dprob, tokens, offsets, R, offsets.shape[0] - 2, parts,
        BLOCK_M=DOT_ROWS, BLOCK_P=DOT_PARTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def moe_dh_results(
    dy: Tensor, prob: Tensor, w_down: Tensor, gu: Tensor, packed: Packed | None,
    want_h: bool, want_db: bool, want_db_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for what moe_dh returns; dprob is made from it."""
    R, D, (E, _, H), parts = prob.shape[0], dy.shape[1], w_down.shape, gu.shape[0]
    dgu = empty_pair(dy, R, H, packed) if parts == 2 else dy.new_empty((1, R, H))
    h, db = dy.new_empty((R if want_h else 0, H)), dy.new_empty((parts, E if want_db else 0, H))
    return dgu, h, torch.empty_like(prob), db, dy.new_empty((E if want_db_down else 0, D))


def moe_dh(
    dy: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    prob: Tensor,
    w_down: Tensor,
    gu: Tensor,
    b_down: Tensor | None,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_dprob: bool,
    want_db: bool,
    want_db_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgu (2, R, H), or (R, 2H) when packed, or (1, R, H) without up; prob h (R, H); dprob (R,);
    db (1 or 2, E, H), gate first; db_down (E, D), of dy (T, D) and R = T k choices. In expert order
    but for dprob; a result that is not wanted has no rows."""
    (T, D), R = dy.shape, prob.shape[0]
    E, _, H = w_down.shape
    gated = gu.shape[0] == 2
    dgu, h, dprob, db, db_down = moe_dh_results(
        dy, prob, w_down, gu, packed, want_h, want_db, want_db_down
    )
    if T == 0:
        return dgu, h, dprob, db.zero_(), db_down.zero_()
    g, u = split_pair(gu, None) if gated else (gu[0], None)
    if packed == "interleaved":
        dg, du = dgu, None
    else:
        dg, du = split_pair(dgu, packed) if gated else (dgu[0], None)
    fit = min(fit_of(dy, g, u, dg, du, h if want_h else None), experts_fit(w_down))
    tile = LAST["moe_dh"] = pick_grouped_tile("moe_dh", dy, R, E, fit)
    act = act_of(activation)
    if not tile.tma and (packed == "interleaved" or act["UP"] is not None):
        tile = finer(tile)
    dots = _new_dots(prob, tile, H, D, b_down) if want_dprob else None
    down, *strides, k_major = experts_of(w_down.mT, tile.block_n, tile.block_k, tile.tma)
    options = grouped_options(tile, E, D % tile.block_k != 0, precision(dy.dtype))
    noted(_dh_kernel)[grouped_grid(tile, dy, R, E, H)](
        dy, down, g, u, prob, dg, du, h if want_h else None, dots, tokens, offsets,
        R, E, H, D, R // T, *dy.stride(), *strides, g.stride(0), dg.stride(0), prob.stride(0),
        **act, K_MAJOR=k_major, **options,
    )  # fmt: skip
    if want_db:
        _up_bias(dg, du, offsets, db)
    if b_down is not None and (want_db_down or want_dprob):
        _down_bias(dy, tokens, offsets, prob, b_down, dots, db_down)
    if dots is not None:
        _dprob(dots, dprob, tokens, offsets)
    return dgu, h, dprob, db, db_down


def _new_dots(prob: Tensor, tile: Tile, H: int, D: int, b_down: Tensor | None) -> Tensor:
    """(parts, R): one of each column part of dh's tiles, then one of each of dy's columns."""
    parts = cdiv(H, tile.block_n) * tile.subtiles
    more = 0 if b_down is None else cdiv(D, BIAS_COLUMNS)
    return prob.new_empty((parts + more, prob.shape[0]), dtype=torch.float32)


def _bias(
    rows: Tensor,
    tokens: Tensor | None,
    offsets: Tensor,
    R: int,
    prob: Tensor | None = None,
    b: Tensor | None = None,
    dots: Tensor | None = None,
    want_sums: bool = True,
) -> Tensor:
    """Column sums (row tiles, N) of R rows in expert order, or, with their tokens, gathered; with
    dots, their products with b as well."""
    N, E = rows.shape[1], offsets.shape[0] - 2
    columns, most = cdiv(N, BIAS_COLUMNS), most_tiles(R, E, BIAS_ROWS)
    sums = rows.new_empty((most if want_sums else 0, N), dtype=torch.float32)
    noted(_bias_kernel)[most, columns](
        rows, prob, b, dots, sums if want_sums else None, tokens, offsets, R, E, N,
        R // rows.shape[0], *rows.stride(),
        0 if prob is None else prob.stride(0), *((0, 0) if b is None else b.stride()),
        BLOCK_M=BIAS_ROWS, BLOCK_N=BIAS_COLUMNS, BLOCK_E=block_e(E),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return sums


def _up_bias(dg: Tensor, du: Tensor | None, offsets: Tensor, db: Tensor) -> None:
    """Fill db (1 or 2, E, H); without du dg holds both, interleaved, where db has two."""
    R = dg.shape[0]
    each = [_bias(t, None, offsets, R) for t in (dg, du) if t is not None]
    if len(each) < len(db):
        each = [each[0][:, 0::2], each[0][:, 1::2]]
    for sums, out in zip(each, db, strict=True):
        _column_sums(sums, out, offsets)


def _down_bias(
    dy: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    prob: Tensor,
    b: Tensor,
    dots: Tensor | None,
    db: Tensor,
) -> None:
    """Fill db (E, D), unless it has no rows, with sums of prob dy, and the last parts of dots."""
    own = None if dots is None else dots[len(dots) - cdiv(dy.shape[1], BIAS_COLUMNS) :]
    sums = _bias(dy, tokens, offsets, prob.shape[0], prob, b, own, len(db) > 0)
    if len(db):
        _column_sums(sums, db, offsets)


def bias_result(dy: Tensor, offsets: Tensor) -> Tensor:
    """Memory for (E, N)."""
    return dy.new_empty((offsets.shape[0] - 2, dy.shape[1]))


def moe_bias_grad(dy: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """(E, N): the sums of dy's rows (T, N), in token order, over each expert's tokens."""
    db = bias_result(dy, offsets)
    if db.numel() == 0 or dy.shape[0] == 0:
        return db.zero_()
    _column_sums(_bias(dy, tokens, offsets, tokens.shape[0]), db, offsets)
    return db


def _wgrad_options(tile: Tile, precision: str) -> dict[str, object]:
    options = grouped_options(tile, 1, False, precision)
    return {k: v for k, v in options.items() if k not in ("BLOCK_E", "TMA", "MASK_K")}


def _choices(t: Tensor, tokens: Tensor | None) -> int:
    """How often each row of `t` is gathered."""
    return 1 if tokens is None else max(1, tokens.shape[0] // max(1, t.shape[0]))


def fill_wgrad(
    dw: Tensor,
    a: Tensor,
    b: Tensor,
    a_tokens: Tensor | None,
    b_tokens: Tensor | None,
    offsets: Tensor,
) -> None:
    """dw (E, N, K), columns contiguous, = a' b over each expert's rows; a (R, N) and b (R, K) are
    in expert order, or with their tokens in token order, (T, ...)."""
    E, N, K = dw.shape
    if dw.numel() == 0:
        return
    k = max(_choices(a, a_tokens), _choices(b, b_tokens))
    fit = min(fit_of(a, b), experts_fit(dw))
    tile = LAST["moe_wgrad"] = pick_grouped_tile("moe_wgrad", a, N, 1, fit)
    noted(_wgrad_kernel)[E * cdiv(N, tile.block_m) * cdiv(K, tile.block_n),](
        a, b, dw, a_tokens, b_tokens, offsets, N, K, k,
        *a.stride(), *b.stride(), dw.stride(0), dw.stride(1),
        **_wgrad_options(tile, precision(a.dtype)),
    )  # fmt: skip


def wgrad_result(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Memory for (E, N, K)."""
    return a.new_empty((offsets.shape[0] - 2, a.shape[1], b.shape[1]))


def moe_wgrad(
    a: Tensor, b: Tensor, tokens: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool
) -> Tensor:
    """dw (E, N, K) of one weight; see fill_wgrad."""
    dw = wgrad_result(a, b, offsets)
    fill_wgrad(dw, a, b, tokens if gather_a else None, tokens if gather_b else None, offsets)
    return dw
