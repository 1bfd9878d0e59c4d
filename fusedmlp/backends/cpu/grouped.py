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

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import define_for_cpu
from .eager import needs_grad, readable

# What PyTorch's grouped product takes. It walks all experts; few rows are faster in a loop.
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
# From this size on malloc asks the system for each block anew, whose pages of 4 KiB are made one
# by one as they are written: 16 ms for 32 MiB. Huge ones take 0.8 ms.
_FROM_SYSTEM = 32 << 20
# A huge page costs what two of malloc's, which are warm, do: 80 us beside 40 to 60.
_PAGE = 2 << 20


def busy(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, its first row, the row behind its last) of the experts in use."""
    row = 0
    while row < ends[-2]:
        e = bisect_right(ends, row) - 1
        yield e, row, ends[e + 1]
        row = ends[e + 1]


def _fits(t: Tensor) -> bool:
    """Whether the grouped product takes its strides: matrices of rows or columns that lie 16 bytes
    or a multiple apart."""
    unit, other = (-2, -1) if 1 == t.stride(-2) <= t.size(-2) <= t.stride(-1) else (-1, -2)
    apart = t.stride(other)
    return t.stride(unit) == 1 and apart >= t.size(unit) and apart * t.element_size() % 16 == 0


def _by_groups(experts: int, rows: int, a: Tensor, b: Tensor) -> bool:
    # It pads the rows of its result to 16 bytes, which would not be what the fake says.
    whole = b.shape[-1] * b.element_size() % 16 == 0
    return a.dtype in _GROUPED and rows >= 2 * experts and whole and _fits(a) and _fits(b)


def _fresh(like: Tensor, *shape: int) -> Tensor:
    """Zeros from the system, whose memory costs nothing until it is written to. Its storage cannot
    be resized."""
    pages = mmap.mmap(
        -1, prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def product_of(a: Tensor, w: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    """`product` without a gradient, of the values of offsets; a may end where kept rows do."""
    kept, rows = ends[-2], a.shape[0]
    if not kept:
        return a.new_zeros(rows, w.shape[1])
    if _by_groups(w.shape[0], kept, a, w.mT):
        made = F.grouped_mm(a[:kept], w.mT, offs=offsets[1:-1])
    else:
        made = torch.cat([F.linear(a[start:end], w[e]) for e, start, end in busy(ends)])
    return made if kept == rows else F.pad(made, (0, 0, 0, rows - kept))


def _from_system(E: int, used: int, one: int) -> bool:
    """Whether zeros of the system are to hold E parts of `one` byte each, of which `used` are not
    0."""
    touched = used * (one // _PAGE + 1)
    return E * one >= _FROM_SYSTEM or 2 * touched * _PAGE < E * one


def _idle_zeros(like: Tensor, E: int, used: Sequence[int], *shape: int) -> Tensor:
    """(E, *shape): 0 for experts that are not in use; parts of the others are to be written."""
    if _from_system(E, len(used), prod(shape) * like.element_size()):
        return _fresh(like, E, *shape)
    out, idle = like.new_empty(E, *shape), 0
    for e in (*used, E):
        if idle < e:
            out[idle:e].zero_()
        idle = e + 1
    return out


def outer_of(a: Tensor, b: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    """`outer` in the same way."""
    E, kept, K, N, parts = len(ends) - 2, ends[-2], a.shape[1], b.shape[1], list(busy(ends))
    if not _from_system(E, len(parts), K * N * a.element_size()) and _by_groups(E, kept, a.t(), b):
        return F.grouped_mm(a[:kept].t(), b[:kept], offs=offsets[1:-1])
    out = _idle_zeros(a, E, [e for e, _, _ in parts], K, N)
    for e, start, end in parts:
        torch.mm(a[start:end].t(), b[start:end], out=out[e])
    return out


def stacked(like: Tensor, used: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """The parts of experts in use, 0 for the others, laid out as `like` (E, ...) is."""
    if like.dim() == 3 and like.stride(1) < like.stride(2):
        return stacked(like.mT, used, [part.mT for part in parts]).mT
    out = _idle_zeros(like, like.shape[0], used, *like.shape[1:])
    for e, part in zip(used, parts, strict=True):
        out[e].copy_(part)
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
    lambda a, w, offsets: product_of(a, w, offsets, offsets.tolist()),
    lambda a, w, offsets: a.new_empty(a.shape[0], w.shape[1]),
    lambda a, w, offsets, **_: 2 * a[0] * prod(w[1:]),
    _product_backward,
)
outer_op = define_for_cpu(
    "experts_outer(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    lambda a, b, offsets: outer_of(a, b, offsets, offsets.tolist()),
    lambda a, b, offsets: a.new_empty(offsets.shape[0] - 2, a.shape[1], b.shape[1]),
    lambda a, b, offsets, **_: 2 * a[0] * a[1] * b[1],
    _outer_backward,
)


def product(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """a[r] w[e]' for the rows r of every expert e, 0 for rows of none; with all derivatives."""
    if readable(offsets) and not needs_grad(a, w):
        return product_of(a, w, offsets, offsets.tolist())
    return product_op(a, w, offsets)
