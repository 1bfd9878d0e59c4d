"""h = act(g) * u and its backward, elementwise. One program handles a block of rows and columns.

Inputs are (M, H) with any strides, so halves of a packed tensor and expanded gradients are read in
place. Halves that take turns are read and written together: by 16 bytes, and each byte once.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ...packing import Packed, empty_pair, interleaved, split_pair
from ..activations import act_of
from ..arch.tile import cdiv
from ..plans import noted
from ..tiles import half_vector, load_tile, store_tile, unweave, weave

ELEMENTS = 2048  # a program: 128 threads with two 16-byte loads of bf16 each per tensor


@triton.jit
def _load_pair(
    g_ptr,
    u_ptr,
    m0,
    n0,
    M,
    H,
    stride_gm,
    stride_gh,
    stride_um,
    stride_uh,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MOST: tl.constexpr,
):
    """g and u in float32; without u_ptr the second is the first. INTERLEAVED: g_ptr holds both."""
    if INTERLEAVED:
        both = load_tile(
            g_ptr, stride_gm, stride_gh, m0, 2 * n0, M, 2 * H, BLOCK_M, 2 * BLOCK_N, False
        )
        g, u = unweave(both.to(tl.float32), BLOCK_M, BLOCK_N)
    else:
        g = load_tile(
            g_ptr, stride_gm, stride_gh, m0, n0, M, H, BLOCK_M, BLOCK_N, False, True, MOST
        )
        g = g.to(tl.float32)
        u = g
        if u_ptr is not None:
            u = load_tile(
                u_ptr, stride_um, stride_uh, m0, n0, M, H, BLOCK_M, BLOCK_N, False, True, MOST
            )
            u = u.to(tl.float32)
    return g, u


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
    INTERLEAVED: tl.constexpr,
):
    MOST: tl.constexpr = half_vector(h_ptr.dtype.element_ty) if INTERLEAVED else None
    tiles_n = tl.cdiv(H, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    g, u = _load_pair(
        g_ptr, u_ptr, m0, n0, M, H, stride_gm, stride_gh, stride_um, stride_uh,
        BLOCK_M, BLOCK_N, INTERLEAVED, MOST,
    )  # fmt: skip
    h, _ = ACT(g, *scalars)
    if INTERLEAVED or u_ptr is not None:
        if UP is not None:
            u, _ = UP(u, *scalars)
        h = h * u
    store_tile(h_ptr, stride_hm, m0, n0, M, H, h, BLOCK_M, BLOCK_N, False, MOST)


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
    INTERLEAVED: tl.constexpr,
):
    """With u, but du_ptr None, dg_ptr takes both, interleaved."""
    GATED: tl.constexpr = INTERLEAVED or u_ptr is not None
    TURNS: tl.constexpr = INTERLEAVED or (GATED and du_ptr is None)
    MOST: tl.constexpr = half_vector(dh_ptr.dtype.element_ty) if TURNS else None
    tiles_n = tl.cdiv(H, BLOCK_N)
    m0 = tl.program_id(0) // tiles_n * BLOCK_M
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    dh = load_tile(
        dh_ptr, stride_dhm, stride_dhh, m0, n0, M, H, BLOCK_M, BLOCK_N, False, True, MOST
    )
    dh = dh.to(tl.float32)
    g, u = _load_pair(
        g_ptr, u_ptr, m0, n0, M, H, stride_gm, stride_gh, stride_um, stride_uh,
        BLOCK_M, BLOCK_N, INTERLEAVED, MOST,
    )  # fmt: skip
    a, slope = ACT(g, *scalars)
    dg = dh * slope
    if GATED:
        if UP is not None:
            u, up_slope = UP(u, *scalars)
        dg = dg * u
        du = dh * a
        if UP is not None:
            du = du * up_slope
        if du_ptr is not None:
            store_tile(du_ptr, stride_dum, m0, n0, M, H, du, BLOCK_M, BLOCK_N, False, MOST)
    if GATED and du_ptr is None:
        both = weave(dg, du, BLOCK_M, BLOCK_N)
        store_tile(dg_ptr, stride_dgm, m0, 2 * n0, M, 2 * H, both, BLOCK_M, 2 * BLOCK_N, False)
    else:
        store_tile(dg_ptr, stride_dgm, m0, n0, M, H, dg, BLOCK_M, BLOCK_N, False, MOST)


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


def _in_turn(g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """g (M, 2H), None and True where g and u take turns in memory; else both, and False."""
    both = interleaved(g, u)
    return (g, u, False) if both is None else (both, None, True)


def act_fwd(g: Tensor, u: Tensor | None, activation: str) -> Tensor:
    """act(g) * u, or act(g) with u = None."""
    M, H = g.shape
    h = g.new_empty((M, H))
    if h.numel():
        grid, options = _grid(M, H)
        g, u, in_turn = _in_turn(g, u)
        u_strides = (0, 0) if u is None else u.stride()
        noted(_fwd_kernel)[grid](
            g, u, h, M, H, *g.stride(), *u_strides, h.stride(0),
            **act_of(activation), INTERLEAVED=in_turn, **options,
        )  # fmt: skip
    return h


def act_bwd(
    dh: Tensor, g: Tensor, u: Tensor | None, dg: Tensor, du: Tensor | None, activation: str
) -> None:
    """Write dg = dh * u * act'(g) and du = dh * act(g); with u = None only dg = dh * act'(g). With
    u, but du None, dg (M, 2H) takes both, interleaved."""
    M, H = g.shape
    if dg.numel():
        grid, options = _grid(M, H)
        g, u, in_turn = _in_turn(g, u)
        u_strides = (0, 0) if u is None else u.stride()
        noted(_bwd_kernel)[grid](
            dh, g, u, dg, du, M, H, *dh.stride(), *g.stride(), *u_strides,
            dg.stride(0), 0 if du is None else du.stride(0),
            **act_of(activation), INTERLEAVED=in_turn, **options,
        )  # fmt: skip


def gated_act_fwd(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return act_fwd(g, u, activation)


def gated_act_bwd(
    dh: Tensor, g: Tensor, u: Tensor, activation: str, packed: Packed | None
) -> Tensor:
    dgu = empty_pair(g, g.shape[0], g.shape[1], packed)
    dg, du = (dgu, None) if packed == "interleaved" else split_pair(dgu, packed)
    act_bwd(dh, g, u, dg, du, activation)
    return dgu
