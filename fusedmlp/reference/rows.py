"""Products and activations as formulas take them: PyTorch's own, and inside batch_invariant() by
parts, so that a row is computed alike in any batch.

On CPUs PyTorch chooses a product's loops by the number of rows and, in float64, by addresses: there
it is made in blocks of one size, whose rows begin on 64 bytes. What is elementwise goes by vectors,
but for the last elements of each thread: it is made in chunks of whole vectors, for one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..invariance import invariant

ROWS = 32  # of a block
_BYTES = 64
_VECTORS, _CHUNK = 64, 1 << 14  # elements; PyTorch gives threads 2^15 or more each


def _aligned(t: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros whose rows begin on 64 bytes."""
    step = _BYTES // t.element_size()
    return t.new_zeros((rows, max(1, -(-columns // step)) * step))[:, :columns]


def _blocks(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    (M, K), N = x.shape, w.shape[0]
    read, made = (_aligned(x, -(-M // ROWS) * ROWS, n) for n in (K, N))
    read[:M] = x
    for rows, out in zip(read.split(ROWS), made.split(ROWS), strict=True):
        if b is None:
            torch.mm(rows, w.t(), out=out)
        else:
            torch.addmm(b, rows, w.t(), out=out)
    return made[:M].contiguous()


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _blocks(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        dx = _Linear.apply(dy, w.t(), None) if need_x else None
        return dx, dy.t() @ x if need_w else None, dy.sum(0) if need_b else None


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w' + b."""
    if not invariant():
        return F.linear(x, w, b)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), w, b)
    return y.view(*x.shape[:-1], w.shape[0])


def elementwise(formula: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """formula(t)."""
    if not invariant():
        return formula(t)
    flat = F.pad(t.reshape(-1), (0, -t.numel() % _VECTORS))
    made = torch.cat([formula(chunk) for chunk in flat.split(_CHUNK)])
    return made[: t.numel()].view(t.shape)
