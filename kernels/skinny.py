"""Few rows (M <= SKINNY_M): the weight is read once and its bytes are the time. K is cut into parts
so that every multiprocessor has work; they lie in float32 and are summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import act_of
from .arch.tile import Tile, cdiv
from .epilogues import store_fwd
from .plans import noted
from .tiles import (
    add_low_rank,
    compiler_options,
    load_tile,
    low_rank_of,
    multiply,
    precision,
    store_tile,
    unweave,
)

# x a' of gate's and up's adapters, (M, r) and scaled, and their b (H, r).
Adapters = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_ADAPTERS: Adapters = (None, None, None, None)


def adapted(adapters: Adapters) -> dict[str, Any]:
    """Arguments of a forward kernel; none without adapters, so that it is the same kernel."""
    t_gate, t_up, low_gate, low_up = adapters
    if t_gate is None and t_up is None:
        return {}
    return {
        "t_gate": t_gate, "t_up": t_up, "low_gate": low_gate, "low_up": low_up,
        "sizes_gate": low_rank_of(t_gate, low_gate), "sizes_up": low_rank_of(t_up, low_up),
    }  # fmt: skip


@triton.jit
def _partial_kernel(
    x,
    w_gate,
    w_up,
    parts_ptr,
    M,
    H,
    D,
    depth,
    stride_xm,
    stride_xd,
    stride_gate_h,
    stride_gate_d,
    stride_up_h,
    stride_up_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products over `depth` of K for few rows (M <= BLOCK_M): parts (splits, 1 or 2, M, H) in
    float32."""
    GATED: tl.constexpr = INTERLEAVED or w_up is not None
    TURNS: tl.constexpr = 2 if INTERLEAVED else 1
    n0 = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    k_begin = part * depth
    acc_g, acc_u = multiply(
        x, stride_xm, stride_xd,
        w_gate, stride_gate_h, stride_gate_d,
        w_up, stride_up_h, stride_up_d,
        0, TURNS * n0, k_begin, min(k_begin + depth, D), M, TURNS * H, D,
        BLOCK_M, TURNS * BLOCK_N, BLOCK_K, False, True, True, MASK_K, PRECISION,
    )  # fmt: skip
    if INTERLEAVED:
        acc_g, acc_u = unweave(acc_g, BLOCK_M, BLOCK_N)
    size = tl.cast(M, tl.int64) * H
    parts_ptr += part * size * (2 if GATED else 1)
    store_tile(parts_ptr, H, 0, n0, M, H, acc_g, BLOCK_M, BLOCK_N, False)
    if GATED:
        store_tile(parts_ptr + size, H, 0, n0, M, H, acc_u, BLOCK_M, BLOCK_N, False)


@triton.jit
def reduce_kernel(
    parts_ptr,
    b_gate_ptr,
    b_up_ptr,
    h,
    g,
    u,
    M,
    H,
    splits,
    stride_hm,
    stride_gm,
    stride_bg: tl.constexpr,
    stride_bu: tl.constexpr,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
    t_gate=None,
    t_up=None,
    low_gate=None,
    low_up=None,
    sizes_gate=None,
    sizes_up=None,
):
    """Sum the parts, always in the same order, then finish as _fwd_kernel does."""
    n0 = tl.program_id(0) * BLOCK_N
    size = tl.cast(M, tl.int64) * H
    acc_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_u = acc_g
    for _ in tl.range(0, splits):
        acc_g += load_tile(parts_ptr, H, 1, 0, n0, M, H, BLOCK_M, BLOCK_N, False)
        if GATED:
            parts_ptr += size
            acc_u += load_tile(parts_ptr, H, 1, 0, n0, M, H, BLOCK_M, BLOCK_N, False)
        parts_ptr += size
    acc_g = add_low_rank(
        acc_g, t_gate, low_gate, sizes_gate, 0, n0, M, H, BLOCK_M, BLOCK_N, PRECISION
    )
    if GATED:
        acc_u = add_low_rank(
            acc_u, t_up, low_up, sizes_up, 0, n0, M, H, BLOCK_M, BLOCK_N, PRECISION
        )
    store_fwd(
        acc_g, acc_u, b_gate_ptr, b_up_ptr, h, g, u, 0, n0, M, H,
        stride_hm, stride_gm, stride_bg, stride_bu,
        scalars, ACT, UP, BLOCK_M, BLOCK_N, False, GATED,
    )  # fmt: skip


def launch_split(
    tile: Tile,
    splits: int,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    interleaved: bool,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    strides: tuple[int, ...],
    activation: str,
    of_adapters: dict[str, Any],
) -> None:
    """What gated_linear.launch_fwd does, in `splits` parts of K. interleaved: w_gate (2H, D) holds
    both. strides: of h, g, b_gate, b_up. of_adapters: what `adapted` made."""
    M, D = x.shape
    H = w_gate.shape[0] // 2 if interleaved else w_gate.shape[0]
    gated = interleaved or w_up is not None
    depth = cdiv(cdiv(D, splits), tile.block_k) * tile.block_k
    splits = cdiv(D, depth)
    parts = x.new_empty((splits, 2 if gated else 1, M, H), dtype=torch.float32)
    shared = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **compiler_options(tile)}
    columns = cdiv(H, tile.block_n)
    noted(_partial_kernel)[columns, splits](
        x, w_gate, w_up, parts, M, H, D, depth,
        *x.stride(), *w_gate.stride(), *(w_up.stride() if w_up is not None else (0, 0)),
        BLOCK_K=tile.block_k, INTERLEAVED=interleaved, MASK_K=D % tile.block_k != 0,
        PRECISION=precision(x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
    )  # fmt: skip
    if of_adapters:
        of_adapters = {**of_adapters, "PRECISION": precision(x.dtype)}
    noted(reduce_kernel)[columns,](
        parts, b_gate, b_up, h, g, u, M, H, splits, *strides,
        **act_of(activation), GATED=gated, **shared, **of_adapters,
    )  # fmt: skip
