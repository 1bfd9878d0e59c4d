"""Products of the experts in use, each once, in one operation that torch.compile does not open.

| | | |
|---|---|---|
| product | row r of expert e: a[r] w[e]' | 0 for rows that no expert takes |
| outer | expert e: sum over its rows r of a[r]' b[r] | 0 for an expert without rows |

| tensor | shape | |
|---|---|---|
| a, b | (R, K), (R, N) | rows in expert order |
| w | (E, N, K) | any strides |
| offsets | (E + 2,) | of `fusedmlp.Routing` |

The derivatives of either are the other and itself, so that any order of them costs no more than its
products. An expert without rows costs nothing but its part of a gradient.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import define_for_cpu
from . import memory
from .eager import needs_grad, readable

# What PyTorch's grouped product takes. It walks all experts; few rows are faster in a loop.
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
# Gradients from here on have memory of memory.py, which what it cannot keep gets anew.
_LENT = 1 << 20
# A huge page costs what two of those that are warm do: 80 us beside 40 to 60.
_PAGE = 2 << 20
# Outer products of up to so many rows, so wide, cost less one by one: for two rows 40 to 85 % of
# what MKL's product takes. They are rounded in between, which few dtypes bear.
_ONE_BY_ONE, _WIDE, _BEAR_IT = 4, 512, (torch.float32, torch.float64)


Parts = list[tuple[int, int, int]]


def busy(ends: list[int]) -> Parts:
    """(expert, its first row, the row behind its last) of the experts in use, whose offsets are
    these."""
    parts, row = [], 0
    while row < ends[-2]:
        e = bisect_right(ends, row) - 1
        parts.append((e, row, ends[e + 1]))
        row = ends[e + 1]
    return parts


def _fits(t: Tensor) -> bool:
    """Whether the grouped product takes its strides: matrices of rows or columns that lie 16 bytes
    or a multiple apart."""
    unit, other = (-2, -1) if 1 == t.stride(-2) <= t.size(-2) <= t.stride(-1) else (-1, -2)
    apart = t.stride(other)
    return t.stride(unit) == 1 and apart >= t.size(unit) and apart * t.element_size() % 16 == 0


def _by_groups(experts: int, rows: int, a: Tensor, b: Tensor) -> bool:
    if rows < 2 * experts:
        return False
    # It pads the rows of its result to 16 bytes, which would not be what the fake says.
    whole = b.shape[-1] * b.element_size() % 16 == 0
    return a.dtype in _GROUPED and whole and _fits(a) and _fits(b)


def product_of(a: Tensor, w: Tensor, offsets: Tensor, parts: Parts) -> Tensor:
    """`product` without a gradient, of the experts in use; a may end where kept rows do."""
    rows = a.shape[0]
    if not parts:
        return a.new_zeros(rows, w.shape[1])
    kept = parts[-1][2]
    if _by_groups(w.shape[0], kept, a, w.mT):
        made = F.grouped_mm(a[:kept], w.mT, offs=offsets[1:-1])
    elif len(parts) == 1:
        made = F.linear(a[:kept], w[parts[0][0]])
    else:
        made = torch.cat([F.linear(a[start:end], w[e]) for e, start, end in parts])
    return made if kept == rows else F.pad(made, (0, 0, 0, rows - kept))


def _from_system(E: int, used: int, one: int) -> bool:
    """Whether zeros of the system are to hold E parts of `one` byte each, of which `used` are not
    0."""
    touched = used * (one // _PAGE + 1)
    return E * one >= memory.MOST or 2 * touched * _PAGE < E * one


def _idle_zeros(like: Tensor, E: int, parts: Parts, *shape: int) -> Tensor:
    """(E, *shape): 0 for experts that are not in use; parts of the others are to be written."""
    one = prod(shape) * like.element_size()
    if _from_system(E, len(parts), one):
        return memory.zeros(like, E, *shape)
    if E * one < _LENT:
        out = like.new_empty(E, *shape)
    else:
        out, new = memory.lent(like, E, *shape)
        if new:
            return out
    idle = 0
    for e in (*(e for e, _, _ in parts), E):
        if idle < e:
            out[idle:e].zero_()
        idle = e + 1
    return out


def _one_by_one(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, of few columns and rows."""
    (own, row), *rest = zip(a.T.unsqueeze(2), b, strict=True)
    torch.mul(own, row, out=out)
    for own, row in rest:
        out.addcmul_(own, row)


def outer_of(a: Tensor, b: Tensor, offsets: Tensor, parts: Parts) -> Tensor:
    """`outer` in the same way."""
    E, kept, K, N = len(offsets) - 2, parts[-1][2] if parts else 0, a.shape[1], b.shape[1]
    small = E * K * N * a.element_size() < _LENT
    if small and _by_groups(E, kept, a.t(), b):  # which cannot write to memory of ours
        return F.grouped_mm(a[:kept].t(), b[:kept], offs=offsets[1:-1])
    out = _idle_zeros(a, E, parts, K, N)
    few = _ONE_BY_ONE if N >= _WIDE and a.dtype in _BEAR_IT else 1
    sizes = [end - start for _, start, end in parts]
    each = zip(parts, a[:kept].t().split(sizes, 1), b[:kept].split(sizes), strict=True)
    own_of = out.unbind() if 4 * len(parts) > E else out  # all views at once cost less than most
    for (e, start, end), own, rows in each:
        if end - start > few:
            torch.mm(own, rows, out=own_of[e])
        else:
            _one_by_one(own, rows, own_of[e])
    return out


def weight_grad(
    dy: Tensor, a: Tensor, w: Tensor, outer: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The gradient of w where a w[e]' has dy. Laid out as w is: autograd copies another layout into
    a parameter's own."""
    return outer(a, dy).mT if w.stride(1) < w.stride(2) else outer(dy, a)


def _product_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, w, offsets = ctx.saved_tensors
    da = product_op(dy, w.mT, offsets) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return da, None, None
    return da, weight_grad(dy, a, w, lambda a, b: outer_op(a, b, offsets)), None


def _outer_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b, offsets = ctx.saved_tensors
    da = product_op(b, dw, offsets) if ctx.needs_input_grad[0] else None
    db = product_op(a, dw.mT, offsets) if ctx.needs_input_grad[1] else None
    return da, db, None


product_op = define_for_cpu(
    "experts_product(Tensor a, Tensor w, Tensor offsets) -> Tensor",
    lambda a, w, offsets: product_of(a, w, offsets, busy(offsets.tolist())),
    lambda a, w, offsets: a.new_empty(a.shape[0], w.shape[1]),
    lambda a, w, offsets, **_: 2 * a[0] * prod(w[1:]),
    _product_backward,
)
outer_op = define_for_cpu(
    "experts_outer(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    lambda a, b, offsets: outer_of(a, b, offsets, busy(offsets.tolist())),
    lambda a, b, offsets: a.new_empty(offsets.shape[0] - 2, a.shape[1], b.shape[1]),
    lambda a, b, offsets, **_: 2 * a[0] * a[1] * b[1],
    _outer_backward,
)


def product(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """a[r] w[e]' for the rows r of every expert e, 0 for rows of none; with all derivatives."""
    if readable(offsets) and not needs_grad(a, w):
        return product_of(a, w, offsets, busy(offsets.tolist()))
    return product_op(a, w, offsets)
