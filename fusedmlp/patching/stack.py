"""E parameters of one shape as one tensor (E, ...), without a copy where they lie together.

`lie_together` gives them one memory, of which each parameter has a storage of its own: an alias, by
DLPack, which keeps the memory alive. Who tells shared tensors by their storages (torch.save,
safetensors, accelerate) sees E parameters that share nothing. Views of one storage would be taken
for tied; a second, stacked copy would double the memory and be stale after a step; stacking on
every call reads and writes all experts, of which a token needs one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.dlpack import from_dlpack

from ..transforms import transformed


class Together:
    """What `lie_together` made of E parameters: their memory as one tensor, for as long as they lie
    in it. A copy or a pickle of it is empty, since its parameters lie elsewhere."""

    def __init__(self, whole: Tensor | None = None, weights: Sequence[nn.Parameter] = ()) -> None:
        self._whole = whole
        self._weights = [weakref.ref(w) for w in weights]

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()

    def of(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The whole where `weights` are the parameters that lie in it. They are not where
        functional_call or FSDP puts others in their place for a call."""
        if self._whole is None:
            return None
        if len(self._inside()) < len(self._weights):
            self._whole = None  # .to() or the like has moved them: their old memory is given back
            return None
        same = (w is ref() for w, ref in zip(weights, self._weights, strict=True))
        return self._whole if all(same) else None

    def end(self) -> None:
        """Give each parameter a memory of its own again."""
        for w in self._inside():
            w.data = w.data.clone()
        self._whole = None

    def _inside(self) -> list[nn.Parameter]:
        """The parameters that lie where they were put."""
        whole = self._whole
        if whole is None:
            return []
        start, step = whole.data_ptr(), whole[0].numel() * whole.itemsize
        return [
            w
            for i, ref in enumerate(self._weights)
            if (w := ref()) is not None
            and w.data_ptr() == start + i * step
            and (w.dtype, w.shape, w.stride()) == (whole.dtype, whole.shape[1:], whole.stride()[1:])
        ]


class _Whole(Function):
    """`whole`, with gradients to the parameters that lie in it."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *weights: Tensor) -> Tensor:
        # Backward then raises where one of them was written meanwhile, which the whole cannot see.
        ctx.save_for_backward(*weights)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        return None, *d.unbind()


def lie_together(weights: Sequence[nn.Parameter]) -> Together:
    """Move the values of `weights` into one memory, one after another. Each stays the Parameter it
    was, and what it held before is given back. On a device of another kind than CPU and CUDA, meta
    too, nothing moves."""
    first = weights[0]
    alike = all((w.device, w.dtype) == (first.device, first.dtype) for w in weights)
    if first.device.type not in ("cpu", "cuda") or not alike or not first.numel():
        return Together()
    whole = torch.stack([w.detach() for w in weights])
    for w, part in zip(weights, whole.unbind(), strict=True):
        # As bytes, since DLPack has no name for some dtypes.
        w.data = from_dlpack(part.view(torch.uint8)).view(part.dtype)
    return Together(whole, weights)


def stacked(together: Together, weights: Sequence[Tensor]) -> Tensor:
    """(E, ...), with gradients to each. What `lie_together` made where they lie in it; under
    torch.compile and torch.func, and where .to(), FSDP or the like has moved them apart, a copy."""
    apart = torch.compiler.is_compiling() or transformed()
    whole = None if apart else together.of(weights)
    return torch.stack(tuple(weights)) if whole is None else _Whole.apply(whole, *weights)
