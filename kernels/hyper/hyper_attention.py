"""The forward of hyper_attention: scores are made twice from q and k, a tile at a time.

| kernel | computes | for |
|---|---|---|
| _h1_kernel | h1 = S u1 | each sub-head and row tile; only with the first mixing |
| _out_kernel | h2 = A u2, n = 1 / row norm of P1, then n (Y v) | each head and row tile |

All but the scores and the values meets a tile by lag (lag.py). A block of _out_kernel walks over
the tiles of its rows to make A, which it keeps in a scratch of its own; over that, to make Y of it;
and over Y and v, once for each part of v's width that an accumulator holds. Nothing quadratic is
stored: a call leaves h1, h2 and n beside its result, and a scratch is one row of tiles for each of
two blocks a multiprocessor. Work is handed out by rows, the longest first, to blocks that stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..device import multiprocessors
from ..pick import hyper_tile
from ..plans import noted
from ..tiles import dot, rounded
from .band import (
    fresh,
    gate_of,
    place,
    products,
    rows_of,
    store_conditioned,
    store_rows,
    turned,
)
from .lag import (
    RING,
    by_lag,
    by_source,
    keep_tile,
    kept,
    kept_tile,
    low_rank,
    put,
    seen,
    summed,
    summed_across,
)
from .plan import Core, HyperCall, heads_last, mix_of, plan_launch, rows
from .row_tiles import row_factor, row_operands, second_rows


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
    ring = scratch_ptr + tl.program_id(0).to(tl.int64) * (RING * BLOCK * BLOCK)
    tiles = tl.cdiv(T, BLOCK)
    for index in tl.range(
        tl.program_id(0), tiles * batch * HEADS, tl.num_programs(0), disable_licm=True
    ):
        order, b, a, _ = place(index, batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        q0 = rows_of(core.q, b, a, m0, 0, T, WIDTH, BLOCK, BLOCK_D)
        acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        put(ring, BLOCK, tl.zeros((BLOCK, BLOCK), tl.float32), BLOCK)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            k0 = rows_of(core.k, b, a, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
            S = products(q0, k0, core.q, core.k, b, a, m0, n0, T, core.width_qk, P, WIDTH)
            put(ring, n0, S, BLOCK)
            tl.debug_barrier()
            banded = by_lag(ring, n0, BLOCK)
            p0 = L - BLOCK - (m0 - n0)
            acc = summed(acc, banded, core.first.u, a, p0, L, RANK, BLOCK, BLOCK_R, PRECISION)
            tl.debug_barrier()
        store_conditioned(h_ptr, c, core.first.z_ptr, b, a, m0, T, acc, HEADS, RANK, BLOCK, BLOCK_R)


@triton.jit
def put_scores(ring1, ring2, q1, q2, core, b, i, m0, n0, T, P: tl.constexpr):
    """The scores of both sub-heads, by source, into their rings."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    WIDTH: tl.constexpr = P.width_qk
    HEADS: tl.constexpr = P.heads
    k1 = rows_of(core.k, b, i, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
    S1 = products(q1, k1, core.q, core.k, b, i, m0, n0, T, core.width_qk, P, WIDTH)
    put(ring1, n0, S1, BLOCK)
    if P.glu:
        k2 = rows_of(core.k, b, i + HEADS, n0, 0, T, WIDTH, BLOCK, BLOCK_D)
        S2 = products(q2, k2, core.q, core.k, b, i + HEADS, m0, n0, T, core.width_qk, P, WIDTH)
        put(ring2, n0, S2, BLOCK)


@triton.jit
def mixed(S, z, core, a, m0, n0, L, P: tl.constexpr):
    """P of a sub-head's tile by lag, or of columns of it from n0, of its scores."""
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r1
    RANK: tl.constexpr = P.rank1
    PRECISION: tl.constexpr = P.precision
    out = S.to(tl.float32)
    if P.rank1 > 0:
        COLUMNS: tl.constexpr = S.shape[1]
        p0 = L - BLOCK - (m0 - n0)
        out = kept(out, core.first.d, a, p0, L, P.short1, COLUMNS)
        out = low_rank(out, z, core.first.vt, a, p0, L, RANK, COLUMNS, BLOCK_R, PRECISION)
    return out


@triton.jit
def only_seen(P1, n0, BLOCK: tl.constexpr):
    """P1 of a tile by lag, 0 where there is no source. The gate and its gradients are 0 then, and
    P2 needs no mask, which would spill under Triton 3.6."""
    if n0 < BLOCK:
        tl.debug_barrier()  # else the compiler makes of the branch what each tile runs through
        P1 = tl.where(seen(n0, BLOCK, P1.shape[1]), P1, 0.0)
    return P1


@triton.jit
def lag_mixed(ring1, ring2, z1, z2, core, i, m0, n0, L, P: tl.constexpr):
    """P1 and P2 of a head's tile by lag, behind put_scores and a barrier."""
    BLOCK: tl.constexpr = P.block
    HEADS: tl.constexpr = P.heads
    P1 = mixed(by_lag(ring1, n0, BLOCK), z1, core, i, m0, n0, L, P)
    P2 = P1
    if P.glu:
        P2 = mixed(by_lag(ring2, n0, BLOCK), z2, core, i + HEADS, m0, n0, L, P)
    return only_seen(P1, n0, BLOCK), P2


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
def _out_kernel(core, c, h_ptr, out, scratch_ptr, batch, T, L, eps, parts, room, P: tl.constexpr):
    core = fresh(core)
    c = fresh(c)
    out = fresh(out)
    BLOCK: tl.constexpr = P.block
    BLOCK_R: tl.constexpr = P.block_r2
    BLOCK_V: tl.constexpr = P.block_v
    WIDTH_V: tl.constexpr = P.width_v
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    RANK2: tl.constexpr = P.rank2
    PRECISION: tl.constexpr = P.precision
    SQUARE: tl.constexpr = BLOCK * BLOCK
    # What passes through registers on its way to the product.
    STEP: tl.constexpr = BLOCK // 4 if BLOCK >= 64 and BLOCK_V > 128 else BLOCK
    DTYPE: tl.constexpr = core.v.ptr.dtype.element_ty
    SHORT: tl.constexpr = P.short2
    QUICK: tl.constexpr = P.quick
    ring1 = scratch_ptr + tl.program_id(0).to(tl.int64) * room
    ring2 = ring1 + RING * SQUARE
    length = tl.cdiv(T, BLOCK) * BLOCK + BLOCK
    weights = ring2 + RING * SQUARE
    zeros = tl.zeros((BLOCK, BLOCK), tl.float32)
    tiles = tl.cdiv(T, BLOCK)
    work = tiles * batch * HEADS
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        order, b, i, _ = place(turned(index, work), batch, HEADS, 1)
        m0 = (tiles - 1 - order) * BLOCK
        q1, q2, z1, z2 = row_operands(core, b, i, m0, T, P)
        acc_h = tl.zeros((BLOCK_R, BLOCK), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        put(ring1, BLOCK, zeros, BLOCK)
        if GLU:
            put(ring2, BLOCK, zeros, BLOCK)
        for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
            put_scores(ring1, ring2, q1, q2, core, b, i, m0, n0, T, P)
            tl.debug_barrier()
            P1, P2 = lag_mixed(ring1, ring2, z1, z2, core, i, m0, n0, L, P)
            tl.debug_barrier()
            square += tl.sum(P1 * P1, 1)
            A = gate_of(P1, P2, GLU, QUICK)
            p0 = L - BLOCK - (m0 - n0)
            if RANK2 > 0:
                u = core.second.u
                acc_h = summed_across(
                    acc_h, rounded(A, DTYPE), u, i, p0, L, RANK2, BLOCK, BLOCK_R, PRECISION
                )
            keep_tile(weights, n0, length, A, BLOCK)
        # Lags below 0.
        keep_tile(weights, m0 + BLOCK, length, zeros, BLOCK)
        if P.normed:
            _store_norm(core.n_ptr, b, i, m0, T, norm_of(square, eps), HEADS, BLOCK)
        if RANK2 > 0:
            store_conditioned(
                h_ptr, c, core.second.z_ptr, b, i, m0, T, acc_h.T, HEADS, RANK2, BLOCK, BLOCK_R
            )
            tl.debug_barrier()
            z3 = second_rows(core.second.z_ptr, b, i, m0, T, P)
            for n0 in tl.range(0, m0 + BLOCK, BLOCK, disable_licm=True):
                p0 = L - BLOCK - (m0 - n0)
                vt = core.second.vt
                # Here, not before A is kept, where registers are few.
                Y = kept(
                    kept_tile(weights, n0, length, BLOCK), core.second.d, i, p0, L, SHORT, BLOCK
                )
                Y = low_rank(Y, z3, vt, i, p0, L, RANK2, BLOCK, BLOCK_R, PRECISION)
                keep_tile(weights, n0, length, Y, BLOCK)
        tl.debug_barrier()
        for part in tl.range(0, parts, disable_licm=True):
            acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
            for n0 in tl.range(0, m0 + BLOCK, STEP, disable_licm=True):
                v = rows_of(core.v, b, i, n0, part * BLOCK_V, T, WIDTH_V, STEP, BLOCK_V)
                acc = dot(by_source(weights, n0, length, BLOCK, STEP), v, acc, PRECISION)
            # Read again: kept, it would spill.
            acc = acc * row_factor(core, b, i, m0, T, P)[:, None]
            store_rows(out, b, i, m0, part * BLOCK_V, T, acc, WIDTH_V, BLOCK, BLOCK_V)
        tl.debug_barrier()


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
        launch = plan_launch("hyper_attention_h1", call, width=q.shape[-1], count=B * Q * tiles)
        noted(_h1_kernel)[launch.programs,](
            core, rows(c1), h1, launch.rings(q), B, T, L, **launch.options
        )
    launch = plan_launch("hyper_attention_out", call, width=q.shape[-1])
    plan = launch.plan
    # As many as a multiprocessor holds: each has two rings, and a row of weights with a tile of
    # zeros.
    programs = min(launch.programs, 2 * multiprocessors(q.device))
    room = (2 * RING.value + cdiv(T, plan.block) + 1) * plan.block**2
    noted(_out_kernel)[programs,](
        core, rows(c2), h2, rows(out), q.new_empty(programs * room), B, T, L, eps,
        cdiv(dv, plan.block_v), room, **launch.options,
    )  # fmt: skip
    return out, h1, h2, n
