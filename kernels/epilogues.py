"""What a GEMM tile goes through between its accumulators and memory: forward, bias, activation and
product; backward, the gate's own gradient. The tiled kernels and the skinny one share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arch.tile import Tile, cdiv
from .tiles import (
    INTERPRETED,
    add_low_rank,
    half_vector,
    load_tile,
    parts_of,
    store_tile,
    upright,
    weave,
)

# Rows of a wgmma that one warp has.
SUM_ROWS = tl.constexpr(16)


@triton.jit
def _add_bias(acc, b_ptr, stride_b, n0, H, BLOCK_N: tl.constexpr):
    if b_ptr is not None:
        offs_n = n0 + tl.arange(0, BLOCK_N)
        pointers = b_ptr + offs_n.to(tl.int64) * stride_b
        acc += tl.load(pointers, mask=offs_n < H, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def store_fwd(
    acc_g,
    acc_u,
    b_gate_ptr,
    b_up_ptr,
    h,
    g,
    u,
    m0,
    n0,
    M,
    H,
    stride_hm,
    stride_gm,
    stride_bg,
    stride_bu,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    GATED: tl.constexpr,
):
    """Bias, activation and product of one (part of a) tile; g and u are stored before
    activation."""
    acc_g = _add_bias(acc_g, b_gate_ptr, stride_bg, n0, H, BLOCK_N)
    if g is not None:
        store_tile(g, stride_gm, m0, n0, M, H, acc_g, BLOCK_M, BLOCK_N, TMA)
    value, _ = ACT(acc_g, *scalars)
    if GATED:
        acc_u = _add_bias(acc_u, b_up_ptr, stride_bu, n0, H, BLOCK_N)
        if u is not None:
            store_tile(u, stride_gm, m0, n0, M, H, acc_u, BLOCK_M, BLOCK_N, TMA)
        if UP is not None:
            acc_u, _ = UP(acc_u, *scalars)
        value = value * acc_u
    if h is not None:
        store_tile(h, stride_hm, m0, n0, M, H, value, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def store_column_sums(
    value, sums_ptr, tile_m, n0, H, BLOCK_N: tl.constexpr, SLICES: tl.constexpr = 1
):
    """Column sums of each of SLICES parts of a tile's rows. Where a part is one warp's rows, no
    other warp is waited for."""
    offs_m = tile_m * SLICES + tl.arange(0, SLICES)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    sums = tl.sum(tl.reshape(value, (SLICES, value.shape[0] // SLICES, BLOCK_N)), 1)
    rows = sums_ptr + offs_m.to(tl.int64)[:, None] * H
    tl.store(rows + offs_n[None, :], sums, mask=offs_n[None, :] < H)


@triton.jit
def _beside(tile, like):
    """What TMA has loaded, put into the threads that have `like`: else Triton computes the
    activation in both layouts, for what is made of `like` and for what is not."""
    if not INTERPRETED:
        tile = tl.inline_asm_elementwise(
            "mov.b16 $0, $1;", "=h,h,f", [tile, like], dtype=tile.dtype, is_pure=False, pack=1
        )
    return tile


@triton.jit
def _read_beside(
    g, u, stride_r, stride_c, m0, n0, M, H, like, TMA: tl.constexpr, GATED: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Tiles of g and u in the shape of `like`; by TMA of both at once. Without u it is g again."""
    BLOCK_M: tl.constexpr = like.shape[0]
    BLOCK_N: tl.constexpr = like.shape[1]
    if not TMA:
        gate = load_tile(g, stride_r, stride_c, m0, n0, M, H, BLOCK_M, BLOCK_N, False, True, MOST)
        up = gate
        if GATED:
            up = load_tile(u, stride_r, stride_c, m0, n0, M, H, BLOCK_M, BLOCK_N, False, True, MOST)
    elif GATED:
        gate, up = tl.split(tl.permute(g.load([0, m0, n0]), (1, 2, 0)))
        gate = _beside(gate, like)
        up = _beside(up, like)
    else:
        gate = _beside(g.load([m0, n0]), like)
        up = gate
    return gate, up


@triton.jit
def _store_bwd_part(
    dh,
    gate,
    up,
    dg,
    du,
    h,
    sums_ptr,
    tile_m,
    tiles_m,
    m0,
    n0,
    M,
    H,
    stride_dgm,
    stride_hm,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    GATED: tl.constexpr,
    TURNS: tl.constexpr,
    MOST: tl.constexpr,
    SLICES: tl.constexpr,
):
    value, slope = ACT(gate.to(tl.float32), *scalars)
    grad = dh * slope
    if GATED:
        up = up.to(tl.float32)
        grad_up = dh * value
        if UP is not None:
            up, up_slope = UP(up, *scalars)
            grad_up = grad_up * up_slope
        if du is not None:
            store_tile(du, stride_dgm, m0, n0, M, H, grad_up, BLOCK_M, BLOCK_N, TMA)
        if sums_ptr is not None:
            up_sums_ptr = sums_ptr + tl.cast(tiles_m, tl.int64) * SLICES * H
            store_column_sums(grad_up, up_sums_ptr, tile_m, n0, H, BLOCK_N, SLICES)
        grad = grad * up
        value = value * up
    if TURNS:
        both = weave(grad, grad_up, BLOCK_M, BLOCK_N)
        store_tile(dg, stride_dgm, m0, 2 * n0, M, 2 * H, both, BLOCK_M, 2 * BLOCK_N, TMA)
    else:
        store_tile(dg, stride_dgm, m0, n0, M, H, grad, BLOCK_M, BLOCK_N, TMA)
    if sums_ptr is not None:
        store_column_sums(grad, sums_ptr, tile_m, n0, H, BLOCK_N, SLICES)
    if h is not None:
        store_tile(h, stride_hm, m0, n0, M, H, value, BLOCK_M, BLOCK_N, TMA, MOST)


@triton.jit
def store_bwd(
    dh,
    g,
    u,
    dg,
    du,
    h,
    sums_ptr,
    tile_m,
    tiles_m,
    m0,
    n0,
    M,
    H,
    stride_gm,
    stride_gh,
    stride_dgm,
    stride_hm,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    GATED: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr = None,
    t=None,
    low=None,
    sizes=None,
):
    """dg = dh psi(u) act'(g), du = dh act(g) psi'(u), h = act(g) psi(u) of a tile, in SUBTILES
    column parts, and their column sums; psi(u) = u where UP is None. Rows past M have dh = 0, so
    they add nothing to a sum. With du = None dg holds both, (M, 2H), interleaved.

    If LEFT dh is transposed, and its parts are rows of the result: most of a column is one
    thread's, so that its sum takes few shuffles. By TMA g and u are read in boxes of several parts,
    as large as their descriptors say: each is waited for at once. An adapter adds t low' to dh."""
    TURNS: tl.constexpr = GATED and du is None
    MOST: tl.constexpr = half_vector(dg.dtype.element_ty) if TURNS and not TMA else None
    LENGTH: tl.constexpr = BLOCK_M if LEFT else BLOCK_N
    PART: tl.constexpr = LENGTH // SUBTILES
    BOX: tl.constexpr = g.block_shape[-2 if LEFT else -1] if TMA else PART
    PARTS: tl.constexpr = BOX // PART
    BOX_M: tl.constexpr = BOX if LEFT else BLOCK_M
    BOX_N: tl.constexpr = BLOCK_N if LEFT else BOX
    SLICES: tl.constexpr = BLOCK_M // SUM_ROWS if TMA and not LEFT else 1
    boxes = parts_of(dh, BLOCK_M, BLOCK_N, LENGTH // BOX, LEFT)
    for j in tl.static_range(LENGTH // BOX):
        m1 = m0 + (j * BOX if LEFT else 0)
        n1 = n0 + (0 if LEFT else j * BOX)
        box = upright(boxes[j], LEFT)
        box = add_low_rank(box, t, low, sizes, m1, n1, M, H, BOX_M, BOX_N, PRECISION)
        parts = parts_of(upright(box, LEFT), BOX_M, BOX_N, PARTS, LEFT)
        gate, up = _read_beside(g, u, stride_gm, stride_gh, m1, n1, M, H, box, TMA, GATED, MOST)
        gates = parts_of(upright(gate, LEFT), BOX_M, BOX_N, PARTS, LEFT)
        ups = parts_of(upright(up, LEFT), BOX_M, BOX_N, PARTS, LEFT)
        for i in tl.static_range(PARTS):
            # What is summed has a row of partial sums: a part's rows, or a tile's.
            _store_bwd_part(
                upright(parts[i], LEFT), upright(gates[i], LEFT), upright(ups[i], LEFT),
                dg, du, h, sums_ptr,
                tile_m * SUBTILES + j * PARTS + i if LEFT else tile_m,
                tiles_m * SUBTILES if LEFT else tiles_m,
                m1 + (i * PART if LEFT else 0), n1 + (0 if LEFT else i * PART), M, H,
                stride_dgm, stride_hm, scalars, ACT, UP,
                PART if LEFT else BLOCK_M, BLOCK_N if LEFT else PART,
                TMA, GATED, TURNS, MOST, SLICES,
            )  # fmt: skip


def sums_rows(tile: Tile, M: int) -> int:
    """Rows of partial column sums that store_bwd makes."""
    slices = tile.block_m // SUM_ROWS.value if tile.tma else 1
    return cdiv(M, tile.block_m) * (tile.subtiles if tile.weight_left else slices)
