"""The forward of hyper_attention: three passes over the visible tiles of scores, which are made
again from q and k in each.

| kernel | computes | for |
|---|---|---|
| _h1_kernel | h1 = S u1 | each sub-head and row tile; only with the first mixing |
| _h2_kernel | h2 = A u2, n = 1 / row norm of P1 | each head and row tile; only with the second |
| _out_kernel | n (Y v) | each head, row tile and part of v's width |

Nothing quadratic is stored: beside the result a call leaves h1, h2 and n. Work is handed out by
rows, the longest first, to blocks that stay and keep their scratch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..pick import hyper_tile
from ..plans import noted
from ..tiles import dot, rounded
from .band import (
    clear,
    fresh,
    gate_of,
    place,
    products,
    reduce,
    row_values,
    rows_of,
    spread,
    store_conditioned,
    store_packed,
    store_rows,
    visible,
)
from .plan import Core, HyperCall, heads_last, mix_of, plan_launch, rows
from .scores import both_mixed, expand_first, expand_values, row_operands, second_rows, weights


@triton.jit
def _h1_kernel(core, c, h_ptr, scratch_ptr, batch, T, L, P: tl.constexpr):
    core = fresh(core)
    c = fresh(c)
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r1
    WIDTH: tl.constexpr = P.width_qk
    RANK: tl.constexpr = P.rank1
    HEADS: tl.constexpr = P.sub_heads
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * REGION)
    clear(region, 2, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS, tl.num_programs(0), disable_licm=True
    ):
        order, b, a, _ = place(index, batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        q0 = rows_of(core.q, b, a, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
        acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            k0 = rows_of(core.k, b, a, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
            S = products(q0, k0, core.q, core.k, b, a, m0, n0, T, core.width_qk, P, WIDTH)
            # Two bands in turn: one barrier a tile.
            side = region + n0 // BLOCK % 2 * REGION
            spread(side, tl.where(visible(m0, n0, BLOCK), S, 0.0), BLOCK)
            tl.debug_barrier()
            u = core.first.u
            acc = reduce(acc, side, u, a, m0, n0, L, RANK, BLOCK, BLOCK_R, PRECISION)
        tl.debug_barrier()
        store_conditioned(h_ptr, c, core.first.z_ptr, b, a, m0, T, acc, HEADS, RANK, BLOCK, BLOCK_R)


@triton.jit
def norm_of(square, eps):
    rho = tl.sqrt(square)
    # A row of zeros stays zero by any factor; see fusedmlp/reference/hyper.py.
    return tl.where(rho == 0, 0.0, 1 / tl.where(rho < eps, eps, rho))


@triton.jit
def _store_norm(n_ptr, b, i, m0, T, n, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    offs_t = m0 + tl.arange(0, BLOCK)
    tl.store(n_ptr + (tl.cast(b, tl.int64) * HEADS + i) * T + offs_t, n, mask=offs_t < T)


@triton.jit
def _h2_kernel(core, c, h_ptr, scratch_ptr, batch, T, L, eps, P: tl.constexpr):
    core = fresh(core)
    c = fresh(c)
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r2
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    RANK2: tl.constexpr = P.rank2
    PRECISION: tl.constexpr = P.precision
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (4 * REGION)
    # Both out here: in the loop the second would cost the register that this pass has left.
    low1 = region + 2 * REGION
    low2 = region + 3 * REGION
    clear(region, 2, BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, _ = place(index, batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
        acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            expand_first(low1, low2, z1, z2, core, i, m0, n0, L, P)
            if P.rank1 > 0:
                tl.debug_barrier()
            P1, P2 = both_mixed(q1, q2, low1, low2, core, b, i, m0, n0, T, L, P)
            square += tl.sum(P1 * P1, 1)
            side = region + n0 // BLOCK % 2 * REGION
            spread(side, gate_of(P1, P2, GLU), BLOCK)
            tl.debug_barrier()
            acc = reduce(acc, side, core.second.u, i, m0, n0, L, RANK2, BLOCK, BLOCK_R, PRECISION)
        tl.debug_barrier()
        store_packed(h_ptr, b, i, m0, T, acc, HEADS, RANK2, BLOCK, BLOCK_R)
        z = acc * rows_of(c, b, i, m0, 0, T, RANK2, BLOCK, BLOCK_R).to(tl.float32)
        if P.normed:
            n = norm_of(square, eps)
            _store_norm(core.n_ptr, b, i, m0, T, n, HEADS, BLOCK)
            z = z * n[:, None]
        store_packed(core.second.z_ptr, b, i, m0, T, z, HEADS, RANK2, BLOCK, BLOCK_R)


@triton.jit
def _out_kernel(core, out, scratch_ptr, batch, T, L, eps, parts, P: tl.constexpr):
    core = fresh(core)
    out = fresh(out)
    BLOCK: tl.constexpr = P.block
    BLOCK_V: tl.constexpr = P.block_v
    WIDTH_V: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    PRECISION: tl.constexpr = P.precision
    # The second mixing's pass has made n; else it is made here and applied last.
    READY: tl.constexpr = P.normed and P.rank2 > 0
    LATE: tl.constexpr = P.normed and P.rank2 == 0
    REGION: tl.constexpr = 2 * BLOCK * BLOCK
    region = scratch_ptr + tl.program_id(0).to(tl.int64) * (6 * REGION)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS * parts, tl.num_programs(0), disable_licm=True
    ):
        order, b, i, part = place(index, batch, HEADS, parts)
        m0 = (tiles - 1 - order) * BLOCK
        n = tl.full((BLOCK,), 1.0, tl.float32)
        if READY:
            n = row_values(core.n_ptr, b, i, m0, T, HEADS, BLOCK)
        q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
        z3 = second_rows(core.second.z_ptr, b, i, m0, T, P)
        acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            low = region + n0 // BLOCK % 2 * (3 * REGION)
            expand_values(low, z1, z2, z3, core, i, m0, n0, L, P)
            P1, P2 = both_mixed(q1, q2, low, low + REGION, core, b, i, m0, n0, T, L, P)
            A = gate_of(P1, P2, GLU)
            if READY:
                A = A * n[:, None]
            if LATE:
                square += tl.sum(P1 * P1, 1)
            Y = weights(A, low + 2 * REGION, core, i, m0, n0, L, P)
            v = rows_of(core.v, b, i, n0, part * BLOCK_V, T, WIDTH_V, BLOCK, BLOCK_V)
            acc = dot(rounded(Y, v.dtype), v, acc, PRECISION)
        tl.debug_barrier()
        if LATE:
            n = norm_of(square, eps)
            acc = acc * n[:, None]
            if part == 0:
                _store_norm(core.n_ptr, b, i, m0, T, n, HEADS, BLOCK)
        store_rows(out, b, i, m0, part * BLOCK_V, T, acc, WIDTH_V, BLOCK, BLOCK_V)


def hyper_attention_results(
    q: Tensor, v: Tensor, c1: Tensor | None, c2: Tensor | None, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for out (B, H, T, dv), and in float32 for h1 (B, Q, T, r1), h2 (B, H, T, r2) and
    n (B, H, T), or (B, H, 0) where nothing is normed."""
    (B, Q, T, _), H = q.shape, v.shape[1]
    wide = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    r1, r2 = (0 if c is None else c.shape[-1] for c in (c1, c2))
    n = wide(B, H, T if normed else 0)
    return heads_last(v), wide(B, Q, T, r1), wide(B, H, T, r2), n


def hyper_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c1: Tensor | None,
    u1: Tensor | None,
    vt1: Tensor | None,
    d1: Tensor | None,
    c2: Tensor | None,
    u2: Tensor | None,
    vt2: Tensor | None,
    d2: Tensor | None,
    normed: bool,
    shortcut1: bool,
    shortcut2: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, Q, T, _), dv = q.shape, v.shape[-1]
    ranks = (0 if c1 is None else c1.shape[-1], 0 if c2 is None else c2.shape[-1])
    L = next((u.shape[1] for u in (u1, u2) if u is not None), T)
    out, h1, h2, n = hyper_attention_results(q, v, c1, c2, normed)
    if not out.numel():
        return out, h1, h2, n.zero_()
    z1, z2 = (q.new_empty(h.shape) for h in (h1, h2))
    core = Core(
        rows(q), rows(k), rows(v), mix_of(u1, vt1, d1, z1), mix_of(u2, vt2, d2, z2), n,
        q.shape[-1], dv,
    )  # fmt: skip
    call = HyperCall(q, v, ranks, (shortcut1, shortcut2), normed)
    if c1 is not None:
        tiles = cdiv(T, hyper_tile("hyper_attention_h1", q).block_m)
        launch = plan_launch("hyper_attention_h1", call, count=B * Q * tiles)
        noted(_h1_kernel)[launch.programs,](
            core, rows(c1), h1, launch.scratch(q, 2), B, T, L, **launch.options
        )
    if c2 is not None:
        launch = plan_launch("hyper_attention_h2", call)
        noted(_h2_kernel)[launch.programs,](
            core, rows(c2), h2, launch.scratch(q, 4), B, T, L, eps, **launch.options
        )
    parts = cdiv(dv, min(hyper_tile("hyper_attention_out", q).block_n, dv))
    launch = plan_launch("hyper_attention_out", call, parts=parts)
    noted(_out_kernel)[launch.programs,](
        core, rows(out), launch.scratch(q, 6), B, T, L, eps, parts, **launch.options
    )
    return out, h1, h2, n
