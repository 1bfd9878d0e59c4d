"""E parameters of one shape as one tensor (E, ...), without a copy where they lie one after
another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Whole(Function):
    """The tensor that `weights` are consecutive parts of."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        w = weights[0]
        size, stride = (len(weights), *w.shape), (w.numel(), *w.stride())
        return w.as_strided(size, stride, w.storage_offset())

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        return d.unbind()


def _consecutive(weights: Sequence[Tensor]) -> bool:
    first = weights[0]
    step, start = first.numel() * first.itemsize, first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    return not first.is_meta and all(
        type(w) is type(first)
        and w.is_contiguous()
        and w.untyped_storage().data_ptr() == storage
        and w.data_ptr() == start + i * step
        for i, w in enumerate(weights)
    )


def lie_together(weights: Sequence[Tensor]) -> None:
    """Move the values of `weights` into one storage, one after another. Each stays the Parameter it
    was; its old memory is given back."""
    if not _consecutive(weights):
        for w, part in zip(weights, torch.stack([w.data for w in weights]).unbind(), strict=True):
            w.data = part


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """(E, ...), with gradients to each. A view where they lie together; under torch.compile, and
    where .to(), FSDP or the like has moved them apart, a copy."""
    if torch.compiler.is_compiling() or not _consecutive(weights):
        return torch.stack(tuple(weights))
    return _Whole.apply(*weights)
