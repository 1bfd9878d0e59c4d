"""h = act(x w_gate') * (x w_up') in one pass over x, and the backward of what comes before and
after it.

| kernel | reads | writes |
|---|---|---|
| _fwd_kernel | x, w_gate, w_up, biases | h, g, u: whichever are wanted |
| skinny.py's kernels | the same, for few rows | the same |
| _bwd_kernel | dy, w_down, g, u | dg, du, h, column sums of dg and du |

Without w_up and u the same kernels are those of a plain linear with activation (linear_act.py).
Gate and up share each x tile and need no repacking: one TMA box takes rows of both weights into one
product twice as wide; where TMA cannot (stacked.py), two accumulators do. Where their rows take
turns and lie along contiguous memory, as of a transposed interleaved weight, they are one operand,
and a thread splits the columns of its product. Names of sizes: x (M, D), weights (H, D), h (M, H);
in the backward dy (M, D) and w_down (D, H), read as its (H, D) transpose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...packing import Packed, empty_gated, empty_pair, interleaved, split_pair
from ..activations import act_of
from ..arch.tile import ADAPTED, finer, unboxed
from ..epilogues import store_bwd, store_fwd, sums_rows
from ..pick import LAST, pick_splits, pick_tile
from ..plans import noted
from ..skinny import NO_ADAPTERS, Adapters, adapted, launch_split
from ..stacked import Stacked, run, stacked_of
from ..tiles import (
    add_low_rank,
    column_parts,
    fit_of,
    gemm_options,
    grid_of,
    low_rank_of,
    multiply,
    multiply_stacked,
    pair_of,
    precision,
    rows_of,
    tile_at,
    unweave,
    weight_of,
)


@triton.jit
def _fwd_kernel(
    x,
    w_gate,
    w_up,
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
    stride_gate_h,
    stride_gate_d,
    stride_up_h,
    stride_up_d,
    stride_hm,
    stride_gm,
    stride_bg: tl.constexpr,
    stride_bu: tl.constexpr,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    t_gate=None,
    t_up=None,
    low_gate=None,
    low_up=None,
    sizes_gate=None,
    sizes_up=None,
):
    # t_gate low_gate', t_up low_up': what adapters add. Without them nothing is compiled for them.
    ADAPTED: tl.constexpr = t_gate is not None or t_up is not None
    GATED: tl.constexpr = STACKED or INTERLEAVED or w_up is not None
    # INTERLEAVED: w_gate holds both, and the accumulator the columns of g and u in turn.
    TURNS: tl.constexpr = 2 if INTERLEAVED else 1
    # Flattened into one loop, the next tile's loads run under this one's epilogue. With two
    # accumulators ptxas then waits after every wgmma (kernels/README.md).
    FLATTEN: tl.constexpr = TMA and w_up is None and not ADAPTED
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        if STACKED:
            acc_g, acc_u = multiply_stacked(
                x, w_gate, m0, n0, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            if UP_FIRST:
                acc_g, acc_u = acc_u, acc_g
        else:
            acc_g, acc_u = multiply(
                x, stride_xm, stride_xd,
                w_gate, stride_gate_h, stride_gate_d,
                w_up, stride_up_h, stride_up_d,
                m0, TURNS * n0, 0, D, M, TURNS * H, D, BLOCK_M, TURNS * BLOCK_N, BLOCK_K,
                TMA, GATE_K_MAJOR, UP_K_MAJOR, MASK_K, PRECISION,
            )  # fmt: skip
        PART: tl.constexpr = BLOCK_N // SUBTILES
        parts_g = column_parts(acc_g, BLOCK_M, TURNS * BLOCK_N, SUBTILES)
        parts_u = column_parts(acc_u, BLOCK_M, TURNS * BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            part_g, part_u = parts_g[i], parts_u[i]
            if INTERLEAVED:
                part_g, part_u = unweave(part_g, BLOCK_M, PART)
            part_g = add_low_rank(
                part_g, t_gate, low_gate, sizes_gate, m0, n0 + i * PART, M, H,
                BLOCK_M, PART, PRECISION,
            )  # fmt: skip
            if GATED:
                part_u = add_low_rank(
                    part_u, t_up, low_up, sizes_up, m0, n0 + i * PART, M, H,
                    BLOCK_M, PART, PRECISION,
                )  # fmt: skip
            store_fwd(
                part_g, part_u, b_gate_ptr, b_up_ptr, h, g, u, m0, n0 + i * PART, M, H,
                stride_hm, stride_gm, stride_bg, stride_bu, scalars, ACT, UP,
                BLOCK_M, PART, TMA, GATED,
            )  # fmt: skip


@triton.jit
def _bwd_kernel(
    dy,
    w_down,
    g,
    u,
    dg,
    du,
    h,
    sums_ptr,
    M,
    H,
    D,
    stride_dym,
    stride_dyd,
    stride_down_h,
    stride_down_d,
    stride_gm,
    stride_gh,
    stride_dgm,
    stride_hm,
    scalars,
    ACT: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    TMA: tl.constexpr,
    GATED: tl.constexpr,
    DOWN_K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    t=None,
    low=None,
    sizes=None,
):
    FLATTEN: tl.constexpr = TMA and t is None
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(H, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        dh, _ = multiply(
            dy, stride_dym, stride_dyd,
            w_down, stride_down_h, stride_down_d,
            None, 0, 0,
            m0, n0, 0, D, M, H, D,
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, DOWN_K_MAJOR, True, MASK_K, PRECISION,
            LEFT,
        )  # fmt: skip
        store_bwd(
            dh, g, u, dg, du, h, sums_ptr, tile_m, tiles_m, m0, n0, M, H,
            stride_gm, stride_gh, stride_dgm, stride_hm, scalars, ACT, UP,
            BLOCK_M, BLOCK_N, SUBTILES, TMA, GATED, LEFT, PRECISION, t, low, sizes,
        )  # fmt: skip


def launch_fwd(
    kernel: str,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    activation: str,
    adapters: Adapters = NO_ADAPTERS,
) -> None:
    """Fill whichever of h, g, u (M, H) are given. `kernel` names the row of tiles."""
    M, D = x.shape
    H = w_gate.shape[0]
    if M == 0 or H == 0:
        return
    turns = interleaved(w_gate, w_up, 0)
    if turns is not None:
        w_gate, w_up = turns, None
    of_adapters = adapted(adapters)
    fit = fit_of(x, h, g, u, weights=(w_gate, w_up))
    row = f"{kernel}{ADAPTED}" if of_adapters else kernel
    tile = LAST[row] = pick_tile(row, x, M, H, fit)
    # Strides of whatever is there; u is laid out as g is.
    strides = tuple(0 if t is None else t.stride(0) for t in (h, g, b_gate, b_up))
    if tile.skinny and (splits := pick_splits(tile, x, H, D)) > 1:
        launch_split(
            tile, splits, x, w_gate, w_up, turns is not None, b_gate, b_up, h, g, u, strides,
            activation, of_adapters,
        )  # fmt: skip
        return
    block_n = tile.block_n
    if turns is not None:
        tile, block_n = finer(tile), 2 * block_n
    gate, *gate_strides, gate_k_major = weight_of(w_gate, block_n, tile.block_k, tile.tma)
    up, *up_strides, up_k_major = weight_of(w_up, tile.block_n, tile.block_k, tile.tma)
    block_out = tile.block_n // tile.subtiles
    options = gemm_options(tile, D % tile.block_k != 0, precision(x.dtype))

    def launch(both: Stacked | None) -> None:
        weights = (gate, up) if both is None else (both.descriptor, None)
        noted(_fwd_kernel)[grid_of(tile, x, M, H)](
            rows_of(x, tile.block_m, tile.block_k, tile.tma), *weights, b_gate, b_up,
            *(rows_of(t, tile.block_m, block_out, tile.tma) for t in (h, g, u)),
            M, H, D, *x.stride(), *gate_strides, *up_strides, *strides,
            **act_of(activation), GATE_K_MAJOR=gate_k_major, UP_K_MAJOR=up_k_major,
            STACKED=both is not None, UP_FIRST=both is not None and both.second_first,
            INTERLEAVED=turns is not None, **options, **of_adapters,
        )  # fmt: skip

    both = None
    if tile.tma and w_up is not None:
        both = stacked_of(w_gate, w_up, tile.block_n, tile.block_k)
    run(both, launch)


def launch_bwd(
    kernel: str,
    dy: Tensor,
    w_down: Tensor,
    gu: Tensor,
    dg: Tensor,
    du: Tensor | None,
    h: Tensor | None,
    want_db: bool,
    activation: str,
    t: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """Fill dg, du and, if given, h (M, H); returns the column sums of dg and du (1 or 2 or 0, H).
    gu: g and u as one (2, M, H), or g alone, (M, H). With u, but du None, dg (M, 2H) takes both,
    interleaved. dh gains t low', t (M, r)."""
    M, D = dy.shape
    H = w_down.shape[1]
    gated = gu.dim() == 3
    halves = 2 if gated else 1
    if M == 0 or H == 0:
        return dy.new_zeros((halves if want_db else 0, H))
    fit = fit_of(dy, gu, dg, du, h, weights=(w_down,))
    row = kernel if t is None else f"{kernel}{ADAPTED}"
    tile = LAST[row] = pick_tile(row, dy, M, H, fit)
    act = act_of(activation)
    of_both = act["UP"] is not None
    if of_both:
        tile = unboxed(tile)
    crowded = not tile.tma or (of_both and t is not None)
    # An adapter is multiplied part by part, and 8 columns are no wgmma's (bench/gate/hazards.py).
    wide = t is None or tile.block_n // tile.subtiles > 16
    if crowded and wide and (of_both or dg.shape[1] != H):
        tile = finer(tile)
    sums = dy.new_empty((halves, sums_rows(tile, M), H), dtype=torch.float32) if want_db else None
    down, *down_strides, k_major = weight_of(w_down.t(), tile.block_n, tile.block_k, tile.tma)
    part_m, part_n = tile.part
    read = *tile.box_shape, tile.tma
    g_in, u_in = pair_of(gu, *read) if gated else (rows_of(gu, *read), None)
    du_out, h_out = (rows_of(t, part_m, part_n, tile.tma) for t in (du, h))
    dg_out = rows_of(dg, part_m, part_n * dg.shape[1] // H, tile.tma)
    options = gemm_options(tile, D % tile.block_k != 0, precision(dy.dtype))
    of_adapter = {} if t is None else {"t": t, "low": low, "sizes": low_rank_of(t, low)}
    noted(_bwd_kernel)[grid_of(tile, dy, M, H)](
        rows_of(dy, tile.block_m, tile.block_k, tile.tma), down,
        g_in, u_in, dg_out, du_out, h_out, sums,
        M, H, D, *dy.stride(), *down_strides, *gu.stride()[-2:], dg.stride(0), H,
        **act, GATED=gated, DOWN_K_MAJOR=k_major, LEFT=tile.weight_left, **options, **of_adapter,
    )  # fmt: skip
    return dy.new_empty((0, H)) if sums is None else sums.sum(1).to(dy.dtype)


def gated_linear_fwd(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
    t_gate: Tensor | None = None,
    t_up: Tensor | None = None,
    low_gate: Tensor | None = None,
    low_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, gu = empty_gated(x, x.shape[0], w_gate.shape[0], want_h, want_gu)
    g, u = split_pair(gu, None) if want_gu else (None, None)
    launch_fwd(
        "gated_linear_fwd", x, w_gate, w_up, b_gate, b_up, h if want_h else None, g, u, activation,
        (t_gate, t_up, low_gate, low_up),
    )  # fmt: skip
    return h, gu


def gated_linear_grads(
    dy: Tensor, w_down: Tensor, packed: Packed | None, want_h: bool
) -> tuple[Tensor, Tensor]:
    """Memory for dgu, and for h (M, or 0 if not wanted, H)."""
    M, H = dy.shape[0], w_down.shape[1]
    return empty_pair(dy, M, H, packed), dy.new_empty((M if want_h else 0, H))


def gated_linear_bwd(
    dy: Tensor,
    w_down: Tensor,
    gu: Tensor,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_db: bool,
    t: Tensor | None = None,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dgu, h = gated_linear_grads(dy, w_down, packed, want_h)
    dg, du = (dgu, None) if packed == "interleaved" else split_pair(dgu, packed)
    rows = (gu, dg, du, h if want_h else None)
    db = launch_bwd("gated_linear_bwd", dy, w_down, *rows, want_db, activation, t, low)
    return dgu, h, db
