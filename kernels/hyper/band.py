"""What the kernels of hyper_attention share: rows of operands, slots, the gate."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..exponentials import exp2, reciprocal
from ..tiles import INTERPRETED, dot, load_tile, rounded


def _fresh(operands: Any, _semantic: Any = None) -> Any:
    """`operands` with the types of its values. Triton 3.6 copies a tuple by its type when a loop
    begins, and the type of a kernel's argument has lost the sizes that were compiled in."""
    if not isinstance(operands, tl.tuple):
        return operands
    values = [_fresh(value) for value in operands.values]
    return tl.tuple(values, tl.tuple_type([v.type for v in values], operands.type.fields))


if INTERPRETED:

    @triton.jit
    def fresh(operands):
        return operands

else:
    fresh = tl.core.builtin(_fresh)


@triton.jit
def rows_of(r, b, h, t0, d0, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A (BLOCK, BLOCK_D) tile; zeros past the edges."""
    base = r.ptr + tl.cast(b, tl.int64) * r.stride_b + tl.cast(h, tl.int64) * r.stride_h
    MASKED: tl.constexpr = WIDTH % BLOCK_D != 0
    return load_tile(base, r.stride_t, r.stride_d, t0, d0, T, WIDTH, BLOCK, BLOCK_D, False, MASKED)


@triton.jit
def store_rows(
    r, b, h, t0, d0, T, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    base = r.ptr + tl.cast(b, tl.int64) * r.stride_b + tl.cast(h, tl.int64) * r.stride_h
    offs_t = t0 + tl.arange(0, BLOCK)
    offs_d = d0 + tl.arange(0, BLOCK_D)
    mask = (offs_t[:, None] < T) & (offs_d[None, :] < WIDTH)
    pointers = base + offs_t.to(tl.int64)[:, None] * r.stride_t + offs_d[None, :] * r.stride_d
    tl.store(pointers, rounded(value, r.ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_values(ptr, b, h, t0, T, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK values of a contiguous (B, HEADS, T)."""
    offs_t = t0 + tl.arange(0, BLOCK)
    base = ptr + (tl.cast(b, tl.int64) * HEADS + h) * T
    return tl.load(base + offs_t, mask=offs_t < T, other=0.0)


@triton.jit
def _packed(
    ptr, b, h, t0, T, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a row tile of a contiguous (B, HEADS, T, RANK)."""
    offs_t = tl.arange(0, BLOCK)
    offs_r = tl.arange(0, BLOCK_R)
    base = ptr + ((tl.cast(b, tl.int64) * HEADS + h) * T + t0) * RANK
    mask = (offs_t[:, None] < T - t0) & (offs_r[None, :] < RANK)
    return base + offs_t[:, None] * RANK + offs_r[None, :], mask


@triton.jit
def load_packed(
    ptr, b, h, t0, T, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    pointers, mask = _packed(ptr, b, h, t0, T, HEADS, RANK, BLOCK, BLOCK_R)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_packed(
    ptr, b, h, t0, T, value, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    pointers, mask = _packed(ptr, b, h, t0, T, HEADS, RANK, BLOCK, BLOCK_R)
    tl.store(pointers, rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def turned(index, total):
    """The piece that a block takes for its index-th, every second turn of all blocks from its end:
    where pieces fall in length, the block that began with the longest goes on with the shortest."""
    programs = tl.num_programs(0)
    first = index // programs * programs
    last = tl.minimum(first + programs, total) - 1
    return tl.where(index // programs % 2 == 1, first + last - index, index)


@triton.jit
def place(index, batch, HEADS: tl.constexpr, parts):
    """(order, b, head, part) of the index-th piece of work; order counts row or column tiles."""
    part = index % parts
    head = index // parts % HEADS
    count = index // parts // HEADS
    return count // batch, count % batch, head, part


@triton.jit
def products(a0, b0, a, b, batch, head, m0, n0, T, width, P: tl.constexpr, WIDTH: tl.constexpr):
    """One tile of a b' over WIDTH columns, of which the first of a and b are at hand."""
    BLOCK: tl.constexpr = P.block
    BLOCK_D: tl.constexpr = P.block_d
    PRECISION: tl.constexpr = P.precision
    acc = dot(a0, b0.T, tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    if WIDTH > BLOCK_D:
        for d in tl.range(BLOCK_D, width, BLOCK_D, disable_licm=True):
            ad = rows_of(a, batch, head, m0, d, T, WIDTH, BLOCK, BLOCK_D)
            bd = rows_of(b, batch, head, n0, d, T, WIDTH, BLOCK, BLOCK_D)
            acc = dot(ad, bd.T, acc, PRECISION)
    return acc


@triton.jit
def slots_of(s, head, p0, L, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    """(ROWS, BLOCK_R) slots from p0 on; 0 for lags that do not exist."""
    offs_p = p0 + tl.arange(0, ROWS)
    offs_r = tl.arange(0, BLOCK_R)
    mask = ((offs_p >= 0) & (offs_p < L))[:, None] & (offs_r < RANK)[None, :]
    base = s.ptr + tl.cast(head, tl.int64) * s.stride_h
    pointers = base + offs_p.to(tl.int64)[:, None] * s.stride_p + offs_r[None, :] * s.stride_r
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_conditioned(
    raw_ptr, c, out_ptr, b, head, m0, T, value, HEADS: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write a row tile of h or dz, and as an operand its product with the control."""
    store_packed(raw_ptr, b, head, m0, T, value, HEADS, RANK, BLOCK, BLOCK_R)
    value = value * rows_of(c, b, head, m0, 0, T, RANK, BLOCK, BLOCK_R).to(tl.float32)
    store_packed(out_ptr, b, head, m0, T, value, HEADS, RANK, BLOCK, BLOCK_R)


@triton.jit
def _log2(x, QUICK: tl.constexpr):
    """log2(x) for x from 1 to 2; QUICK: to 2^-22, by 1 instruction for 20."""
    if INTERPRETED or not QUICK:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def softplus(x, QUICK: tl.constexpr = False):
    # What maximum() makes of a NaN is added to one.
    return tl.maximum(x, 0.0) + 0.6931471805599453 * _log2(
        1 + exp2(-1.4426950408889634 * tl.abs(x)), QUICK
    )


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gate_of(P1, P2, GLU: tl.constexpr, QUICK: tl.constexpr = False):
    A = relu(P1)
    if GLU:
        A = A * softplus(P2, QUICK)
    return A


@triton.jit
def gate_slopes(P1, P2, GLU: tl.constexpr, QUICK: tl.constexpr = False):
    """A and its slopes by P1 and P2. Softplus and its slope, the sigmoid, share an exponential."""
    R = relu(P1)
    if GLU:
        e = exp2(-1.4426950408889634 * tl.abs(P2))
        soft = tl.maximum(P2, 0.0) + 0.6931471805599453 * _log2(1 + e, QUICK)
        slope = tl.where(P2 < 0, e, 1.0) * reciprocal(1 + e)
        A = R * soft
        to_P1 = tl.where(P1 > 0, soft, 0.0)
        to_P2 = R * slope
    else:
        A = R
        to_P1 = tl.where(P1 > 0, 1.0, 0.0)
        to_P2 = to_P1
    return A, to_P1, to_P2
