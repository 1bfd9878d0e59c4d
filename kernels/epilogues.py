"""What a GEMM tile goes through between its accumulators and memory: forward, bias, activation and
product; backward, the gate's own gradient. The tiled kernels and the skinny one share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import half_vector, load_tile, store_tile, weave


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
def store_column_sums(value, sums_ptr, tile_m, n0, H, BLOCK_N: tl.constexpr):
    offs_n = n0 + tl.arange(0, BLOCK_N)
    row = sums_ptr + tl.cast(tile_m, tl.int64) * H
    tl.store(row + offs_n, tl.sum(value, 0), mask=offs_n < H)


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
    TMA: tl.constexpr,
    GATED: tl.constexpr,
):
    """dg = dh psi(u) act'(g), du = dh act(g) psi'(u), h = act(g) psi(u) of one (part of a) tile,
    and their column sums; psi(u) = u where UP is None. Rows past M have dh = 0, so they add nothing
    to a sum. With du = None dg holds both, (M, 2H), interleaved."""
    TURNS: tl.constexpr = GATED and du is None
    MOST: tl.constexpr = half_vector(dg.dtype.element_ty) if TURNS and not TMA else None
    gate = load_tile(g, stride_gm, stride_gh, m0, n0, M, H, BLOCK_M, BLOCK_N, TMA, True, MOST)
    gate = gate.to(tl.float32)
    value, slope = ACT(gate, *scalars)
    grad = dh * slope
    if GATED:
        up = load_tile(u, stride_gm, stride_gh, m0, n0, M, H, BLOCK_M, BLOCK_N, TMA, True, MOST)
        up = up.to(tl.float32)
        grad_up = dh * value
        if UP is not None:
            up, up_slope = UP(up, *scalars)
            grad_up = grad_up * up_slope
        if du is not None:
            store_tile(du, stride_dgm, m0, n0, M, H, grad_up, BLOCK_M, BLOCK_N, TMA)
        if sums_ptr is not None:
            up_sums_ptr = sums_ptr + tl.cast(tiles_m, tl.int64) * H
            store_column_sums(grad_up, up_sums_ptr, tile_m, n0, H, BLOCK_N)
        grad = grad * up
        value = value * up
    if TURNS:
        both = weave(grad, grad_up, BLOCK_M, BLOCK_N)
        store_tile(dg, stride_dgm, m0, 2 * n0, M, 2 * H, both, BLOCK_M, 2 * BLOCK_N, TMA)
    else:
        store_tile(dg, stride_dgm, m0, n0, M, H, grad, BLOCK_M, BLOCK_N, TMA)
    if sums_ptr is not None:
        store_column_sums(grad, sums_ptr, tile_m, n0, H, BLOCK_N)
    if h is not None:
        store_tile(h, stride_hm, m0, n0, M, H, value, BLOCK_M, BLOCK_N, TMA, MOST)
