"""h = act(g) * u and its backward, elementwise. One program handles a block of rows and columns.

Inputs are (M, H) with any strides, so halves of a packed tensor and expanded gradients are read in
place.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ...packing import Packed, empty_pair, split_pair
from ..activations import act_of
from ..arch.tile import cdiv
from ..tiles import load_tile, store_tile

ELEMENTS = 2048  # a program: 128 threads with two 16-byte loads of bf16 each per tensor


@triton.jit
def _fwd_kernel(
    g_ptr,
    u_ptr,
    h_ptr,
    M,
    H,
    stride_gm,
    stride_gh,
    stride_um,
    stride_uh,
    stride_hm,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    g = load_tile(g_ptr, stride_gm, stride_gh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
    h, _ = ACT(g.to(tl.float32), *scalars)
    if u_ptr is not None:
        u = load_tile(u_ptr, stride_um, stride_uh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
        u = u.to(tl.float32)
        if UP is not None:
            u, _ = UP(u, *scalars)
        h = h * u
    store_tile(h_ptr, stride_hm, m0, n0, M, H, h, BLOCK_M, BLOCK_N, False)


@triton.jit
def _bwd_kernel(
    dh_ptr,
    g_ptr,
    u_ptr,
    dg_ptr,
    du_ptr,
    M,
    H,
    stride_dhm,
    stride_dhh,
    stride_gm,
    stride_gh,
    stride_um,
    stride_uh,
    stride_dgm,
    stride_dum,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    dh = load_tile(dh_ptr, stride_dhm, stride_dhh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
    dh = dh.to(tl.float32)
    g = load_tile(g_ptr, stride_gm, stride_gh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
    a, slope = ACT(g.to(tl.float32), *scalars)
    dg = dh * slope
    if u_ptr is not None:
        u = load_tile(u_ptr, stride_um, stride_uh, m0, n0, M, H, BLOCK_M, BLOCK_N, False)
        u = u.to(tl.float32)
        if UP is not None:
            u, up_slope = UP(u, *scalars)
        dg = dg * u
        du = dh * a
        if UP is not None:
            du = du * up_slope
        store_tile(du_ptr, stride_dum, m0, n0, M, H, du, BLOCK_M, BLOCK_N, False)
    store_tile(dg_ptr, stride_dgm, m0, n0, M, H, dg, BLOCK_M, BLOCK_N, False)


@functools.lru_cache(1024)
def _grid(M: int, H: int) -> tuple[tuple[int], dict[str, int | bool]]:
    block_n = min(triton.next_power_of_2(H), ELEMENTS)
    block_m = ELEMENTS // block_n
    grid = (cdiv(M, block_m) * cdiv(H, block_n),)
    return grid, {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def act_fwd(g: Tensor, u: Tensor | None, activation: str) -> Tensor:
    """act(g) * u, or act(g) with u = None."""
    M, H = g.shape
    h = g.new_empty((M, H))
    if h.numel():
        grid, options = _grid(M, H)
        u_strides = (0, 0) if u is None else u.stride()
        _fwd_kernel[grid](
            g, u, h, M, H, *g.stride(), *u_strides, h.stride(0),
            **act_of(activation), **options,
        )  # fmt: skip
    return h


def act_bwd(
    dh: Tensor, g: Tensor, u: Tensor | None, dg: Tensor, du: Tensor | None, activation: str
) -> None:
    """Write dg = dh * u * act'(g) and du = dh * act(g); with u = None only dg = dh * act'(g)."""
    M, H = g.shape
    if dg.numel():
        grid, options = _grid(M, H)
        u_strides = (0, 0) if u is None else u.stride()
        _bwd_kernel[grid](
            dh, g, u, dg, du, M, H, *dh.stride(), *g.stride(), *u_strides,
            dg.stride(0), 0 if du is None else du.stride(0),
            **act_of(activation), **options,
        )  # fmt: skip


def gated_act_fwd(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return act_fwd(g, u, activation)


def gated_act_bwd(
    dh: Tensor, g: Tensor, u: Tensor, activation: str, packed: Packed | None
) -> Tensor:
    dgu = empty_pair(g, g.shape[0], g.shape[1], packed)
    dg, du = split_pair(dgu, packed)
    act_bwd(dh, g, u, dg, du, activation)
    return dgu
