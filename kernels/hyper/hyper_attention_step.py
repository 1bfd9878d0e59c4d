"""One step of decoding with hyper_attention: the row of the newest token, whose sources are split
into parts of `chunk`, a block each.

| kernel | computes of each part | from |
|---|---|---|
| _scores_kernel | S = q k', its share of h1 = S u1 | k, u1 |
| _gate_kernel | A, its share of h2 = A u2 and of the sum of P1^2 | S, d1, vt1, u2 |
| _values_kernel | its share of n (Y v) | A, d2, vt2, v |
| _sum_kernel | the sum of the shares | |

Every cache and parameter byte is read once; S and A lie in float32 between the kernels. The grids
follow from the cache's length alone: how many tokens it holds only the GPU knows, and parts past
them do nothing. Shares are summed in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...invariance import invariant
from ..arch.tile import Tile, cdiv
from ..device import multiprocessors
from ..pick import LAST, hyper_tile
from ..plans import noted
from ..tiles import compiler_options, rounded
from .band import fresh, gate_of, rows_of, slots_of
from .hyper_attention import norm_of
from .plan import Core, block_of, mix_of, rows

# Parts of one row: more would make every block sum more shares than it has sources.
MOST_PARTS = 128


@dataclass(frozen=True)
class StepPlan:
    """Constants of a step's launches. rank1, rank2: 0 without that mixing. rows, rows_qk, rows_v:
    sources at once in each kernel. parts: at least as many as there are."""

    glu: bool
    normed: bool
    heads: int
    sub_heads: int
    width_qk: int
    width_v: int
    rank1: int
    rank2: int
    short1: bool
    short2: bool
    rows: int
    rows_qk: int
    rows_v: int
    block_d: int
    block_v: int
    block_r1: int
    block_r2: int
    parts: int


@triton.jit
def _part(position_ptr, N, chunk):
    """(t, how many sources there are, first and end of this part's)."""
    t = tl.load(position_ptr).to(tl.int32)
    seen = tl.minimum(t + 1, N)
    first = tl.program_id(2) * chunk
    return t, seen, first, tl.minimum(first + chunk, seen)


@triton.jit
def _row_of(r, b, h, d0, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a (B, heads, 1, width), in float32."""
    offs = d0 + tl.arange(0, BLOCK)
    base = r.ptr + tl.cast(b, tl.int64) * r.stride_b + tl.cast(h, tl.int64) * r.stride_h
    return tl.load(base + offs * r.stride_d, mask=offs < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _shares(ptr, row, part, parts, d0, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers and mask of one part's share in a contiguous (rows, parts, WIDTH)."""
    offs = d0 + tl.arange(0, BLOCK)
    return ptr + (tl.cast(row, tl.int64) * parts + part) * WIDTH + offs, offs < WIDTH


@triton.jit
def _total(
    ptr, row, used, parts, d0, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of the `used` shares of a contiguous (rows, parts, WIDTH)."""
    offs_p = tl.arange(0, PARTS)[:, None]
    offs = d0 + tl.arange(0, BLOCK)[None, :]
    base = ptr + tl.cast(row, tl.int64) * parts * WIDTH
    mask = (offs_p < used) & (offs < WIDTH)
    return tl.sum(tl.load(base + offs_p * WIDTH + offs, mask=mask, other=0.0), 0)


@triton.jit
def _mixed(
    X, z, mix, head, p0, L, SHORT: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One mixing of BLOCK entries of a row, the first of which has slot p0. Past the newest token
    there is no slot: what is 0 there stays 0."""
    if RANK == 0:
        out = X
    else:
        offs_p = p0 + tl.arange(0, BLOCK)
        factor = 1.0 if SHORT else 0.0
        if mix.d.ptr is not None:
            base = mix.d.ptr + tl.cast(head, tl.int64) * mix.d.stride_h
            mask = (offs_p >= 0) & (offs_p < L)
            d = tl.load(base + offs_p.to(tl.int64) * mix.d.stride_p, mask=mask, other=0.0)
            factor = factor + d.to(tl.float32)
        vt = slots_of(mix.vt, head, p0, L, RANK, BLOCK, BLOCK_R).to(tl.float32)
        out = X * factor + tl.sum(vt * z[None, :], 1)
    return out


@triton.jit
def _scores_kernel(
    core, position_ptr, s_ptr, h_ptr, N, L, chunk, parts, P: tl.constexpr,
):  # fmt: skip
    core = fresh(core)
    BLOCK: tl.constexpr = P.rows_qk
    BLOCK_D: tl.constexpr = P.block_d
    BLOCK_R: tl.constexpr = P.block_r1
    WIDTH: tl.constexpr = P.width_qk
    RANK: tl.constexpr = P.rank1
    b = tl.program_id(0)
    a = tl.program_id(1)
    row = b * P.sub_heads + a
    t, _, first, end = _part(position_ptr, N, chunk)
    h = tl.zeros((BLOCK_R,), tl.float32)
    for s0 in tl.range(first, end, BLOCK):
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for d0 in tl.range(0, WIDTH, BLOCK_D):
            q = _row_of(core.q, b, a, d0, WIDTH, BLOCK_D)
            k = rows_of(core.k, b, a, s0, d0, end, WIDTH, BLOCK, BLOCK_D)
            acc += k.to(tl.float32) * q[None, :]
        S = tl.sum(acc, 1)
        offs_s = s0 + tl.arange(0, BLOCK)
        tl.store(s_ptr + tl.cast(row, tl.int64) * N + offs_s, S, mask=offs_s < end)
        if RANK > 0:
            u = slots_of(core.first.u, a, L - 1 - t + s0, L, RANK, BLOCK, BLOCK_R)
            h += tl.sum(u.to(tl.float32) * S[:, None], 0)
    if RANK > 0:
        at, mask = _shares(h_ptr, row, tl.program_id(2), parts, 0, RANK, BLOCK_R)
        tl.store(at, h, mask=mask)


@triton.jit
def _load_row(ptr, row, s0, end, N, BLOCK: tl.constexpr):
    offs_s = s0 + tl.arange(0, BLOCK)
    return tl.load(ptr + tl.cast(row, tl.int64) * N + offs_s, mask=offs_s < end, other=0.0)


@triton.jit
def _first_z(h_ptr, c, b, a, used, parts, P: tl.constexpr):
    """z of the first mixing; without it what nothing reads."""
    RANK: tl.constexpr = P.rank1
    BLOCK_R: tl.constexpr = P.block_r1
    PARTS: tl.constexpr = P.parts
    z = 0.0
    if RANK > 0:
        h = _total(h_ptr, b * P.sub_heads + a, used, parts, 0, RANK, PARTS, BLOCK_R)
        z = h * _row_of(c, b, a, 0, RANK, BLOCK_R)
    return z


@triton.jit
def _gate_kernel(
    core, c, position_ptr, s_ptr, h1_ptr, a_ptr, h2_ptr, square_ptr, N, L, chunk, parts,
    P: tl.constexpr,
):  # fmt: skip
    core = fresh(core)
    c = fresh(c)
    BLOCK: tl.constexpr = P.rows
    RANK1: tl.constexpr = P.rank1
    RANK2: tl.constexpr = P.rank2
    BLOCK_R1: tl.constexpr = P.block_r1
    BLOCK_R2: tl.constexpr = P.block_r2
    SHORT: tl.constexpr = P.short1
    HEADS: tl.constexpr = P.heads
    GLU: tl.constexpr = P.glu
    b = tl.program_id(0)
    i = tl.program_id(1)
    row = b * HEADS + i
    one = b * P.sub_heads + i
    t, seen, first, end = _part(position_ptr, N, chunk)
    used = tl.cdiv(seen, chunk)
    z1 = _first_z(h1_ptr, c, b, i, used, parts, P)
    z2 = z1
    if GLU:
        z2 = _first_z(h1_ptr, c, b, i + HEADS, used, parts, P)
    h = tl.zeros((BLOCK_R2,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for s0 in tl.range(first, end, BLOCK):
        p0 = L - 1 - t + s0
        S = _load_row(s_ptr, one, s0, end, N, BLOCK)
        P1 = _mixed(S, z1, core.first, i, p0, L, SHORT, RANK1, BLOCK, BLOCK_R1)
        P2 = P1
        if GLU:
            S = _load_row(s_ptr, one + HEADS, s0, end, N, BLOCK)
            P2 = _mixed(S, z2, core.first, i + HEADS, p0, L, SHORT, RANK1, BLOCK, BLOCK_R1)
        A = gate_of(P1, P2, GLU)
        square += P1 * P1
        offs_s = s0 + tl.arange(0, BLOCK)
        tl.store(a_ptr + tl.cast(row, tl.int64) * N + offs_s, A, mask=offs_s < end)
        if RANK2 > 0:
            u = slots_of(core.second.u, i, p0, L, RANK2, BLOCK, BLOCK_R2)
            h += tl.sum(u.to(tl.float32) * A[:, None], 0)
    if RANK2 > 0:
        at, mask = _shares(h2_ptr, row, tl.program_id(2), parts, 0, RANK2, BLOCK_R2)
        tl.store(at, h, mask=mask)
    tl.store(square_ptr + row * parts + tl.program_id(2), tl.sum(square, 0))


@triton.jit
def _values_kernel(
    core, c, position_ptr, a_ptr, h_ptr, square_ptr, out_ptr, N, L, chunk, parts, eps,
    P: tl.constexpr,
):  # fmt: skip
    core = fresh(core)
    c = fresh(c)
    BLOCK: tl.constexpr = P.rows_v
    BLOCK_V: tl.constexpr = P.block_v
    BLOCK_R: tl.constexpr = P.block_r2
    WIDTH: tl.constexpr = P.width_v
    RANK: tl.constexpr = P.rank2
    SHORT: tl.constexpr = P.short2
    PARTS: tl.constexpr = P.parts
    b = tl.program_id(0)
    i = tl.program_id(1) % P.heads
    d0 = tl.program_id(1) // P.heads * BLOCK_V
    row = b * P.heads + i
    t, seen, first, end = _part(position_ptr, N, chunk)
    used = tl.cdiv(seen, chunk)
    z = 0.0
    if RANK > 0:
        z = _total(h_ptr, row, used, parts, 0, RANK, PARTS, BLOCK_R)
        z = z * _row_of(c, b, i, 0, RANK, BLOCK_R)
    acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for s0 in tl.range(first, end, BLOCK):
        A = _load_row(a_ptr, row, s0, end, N, BLOCK)
        Y = _mixed(A, z, core.second, i, L - 1 - t + s0, L, SHORT, RANK, BLOCK, BLOCK_R)
        v = rows_of(core.v, b, i, s0, d0, end, WIDTH, BLOCK, BLOCK_V)
        acc += v.to(tl.float32) * Y[:, None]
    total = tl.sum(acc, 0)
    if P.normed:
        offs_p = tl.arange(0, PARTS)
        squares = tl.load(square_ptr + row * parts + offs_p, mask=offs_p < used, other=0.0)
        total = total * norm_of(tl.sum(squares, 0), eps)
    at, mask = _shares(out_ptr, row, tl.program_id(2), parts, d0, WIDTH, BLOCK_V)
    tl.store(at, total, mask=mask)


@triton.jit
def _sum_kernel(share_ptr, out_ptr, position_ptr, N, chunk, parts, P: tl.constexpr):
    BLOCK_V: tl.constexpr = P.block_v
    WIDTH: tl.constexpr = P.width_v
    PARTS: tl.constexpr = P.parts
    row = tl.program_id(0)
    d0 = tl.program_id(1) * BLOCK_V
    _, seen, _, _ = _part(position_ptr, N, chunk)
    total = _total(share_ptr, row, tl.cdiv(seen, chunk), parts, d0, WIDTH, PARTS, BLOCK_V)
    at, mask = _shares(out_ptr, row, 0, 1, d0, WIDTH, BLOCK_V)
    tl.store(at, rounded(total, out_ptr.dtype.element_ty), mask=mask)


def _plan(
    q: Tensor,
    v: Tensor,
    tile: Tile,
    ranks: tuple[int, int],
    shorts: tuple[bool, bool],
    normed: bool,
) -> tuple[StepPlan, int, int]:
    """(constants, sources of a part, parts): four blocks a multiprocessor, if there are sources."""
    (_, Q, dq), (B, H, N, dv) = q.shape, v.shape
    steps = 1 if invariant() else B
    wanted = min(cdiv(4 * multiprocessors(q.device), steps * H), MOST_PARTS)
    chunk = block_of(cdiv(N, wanted), tile.block_m)
    parts = cdiv(N, chunk)
    block_d, block_v = (min(block_of(width, 8), tile.block_n) for width in (dq, dv))
    at_once = tile.block_m * tile.block_k
    plan = StepPlan(
        glu=Q == 2 * H, normed=normed, heads=H, sub_heads=Q, width_qk=dq, width_v=dv,
        rank1=ranks[0], rank2=ranks[1], short1=shorts[0], short2=shorts[1],
        rows=tile.block_m, rows_qk=min(chunk, at_once // block_d),
        rows_v=min(chunk, at_once // block_v), block_d=block_d, block_v=block_v,
        block_r1=block_of(max(ranks[0], 1), 8), block_r2=block_of(max(ranks[1], 1), 8),
        parts=block_of(parts, 1),
    )  # fmt: skip
    return plan, chunk, parts


def step_result(q: Tensor, v: Tensor) -> Tensor:
    """Memory for out (B, H, dv)."""
    return q.new_empty((q.shape[0], v.shape[1], v.shape[3]))


def hyper_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
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
) -> Tensor:
    (B, Q, dq), (_, H, N, dv) = q.shape, v.shape
    out = step_result(q, v)
    if not out.numel():
        return out
    if not N:
        return out.zero_()
    ranks = (0 if c1 is None else c1.shape[-1], 0 if c2 is None else c2.shape[-1])
    L = next((u.shape[1] for u in (u1, u2) if u is not None), N)
    tile = LAST["hyper_attention_step"] = hyper_tile("hyper_attention_step", q)
    plan, chunk, parts = _plan(q, v, tile, ranks, (shortcut1, shortcut2), normed)
    options = {
        "P": plan, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        **compiler_options(tile),
    }  # fmt: skip

    def wide(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    S, A, square = wide(B, Q, N), wide(B, H, N), wide(B, H, parts)
    h1, h2, shares = (
        wide(B, heads, parts, width)
        for heads, width in ((Q, ranks[0]), (H, ranks[1]), (H, dv))
    )  # fmt: skip
    core = Core(
        rows(q.unsqueeze(2)), rows(k), rows(v), mix_of(u1, vt1, d1), mix_of(u2, vt2, d2), None,
        dq, dv,
    )  # fmt: skip
    c1_rows, c2_rows = (rows(None if c is None else c.unsqueeze(2)) for c in (c1, c2))
    columns = cdiv(dv, plan.block_v)
    noted(_scores_kernel)[B, Q, parts](core, position, S, h1, N, L, chunk, parts, **options)
    noted(_gate_kernel)[B, H, parts](
        core, c1_rows, position, S, h1, A, h2, square, N, L, chunk, parts, **options
    )
    noted(_values_kernel)[B, H * columns, parts](
        core, c2_rows, position, A, h2, square, shares, N, L, chunk, parts, eps, **options
    )
    noted(_sum_kernel)[B * H, columns](shares, out, position, N, chunk, parts, **options)
    return out
