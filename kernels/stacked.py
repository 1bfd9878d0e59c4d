"""Two weights under one TMA descriptor, so that gate and up are one product twice as wide."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import arch_of
from .maps import small_with_gaps
from .tiles import descriptor_of

# How Triton's launcher (3.6 to 3.9) says that the driver has refused to encode a descriptor.
_REFUSAL = "Failed to create tensor map descriptor"
# Keys of what the driver has refused: it is not asked again.
_refused: set[Any] = set()


class Stacked(NamedTuple):
    """One descriptor over both; second_first: whether the second weight has the lower address.
    key: shape and strides of a weight, bytes of its element, and the box."""

    descriptor: TensorDescriptor
    second_first: bool
    key: Any


def stacked_of(w1: Tensor, w2: Tensor, block_n: int, block_k: int) -> Stacked | None:
    """Two aligned weights (N, K), or of experts (E, N, K), as one descriptor over both: its outer
    stride is their distance in memory, whether they are halves of one tensor or two tensors.

    None where TMA cannot: K not contiguous, strides that differ, or what cuda.h excludes, which is
    a distance of 0, of 2^40 bytes or more or not a multiple of 16, and a stride of fewer bytes than
    the dimension that it steps over has elements; where the driver has refused one of that shape;
    and where `maps.doubtful` would not trust it.
    """
    size, shape, strides = w1.element_size(), w1.shape, w1.stride()
    step = w2.data_ptr() - w1.data_ptr()
    distance = abs(step)
    if strides[-1] != 1 or w2.stride() != strides:
        return None
    if not 0 < distance < 1 << 40 or distance % 16 or distance < shape[0]:
        return None
    if len(shape) == 3 and strides[0] * size < shape[1]:
        return None
    key = (shape, strides, size, block_n, block_k)
    if _refused and key in _refused:
        return None
    both, apart = (2, *shape), (distance // size, *strides)
    if arch_of(w1.device).mma == "tcgen05" and small_with_gaps(both, apart, size):
        return None
    block = [2, block_n, block_k] if len(shape) == 2 else [2, 1, block_n, block_k]
    low = w1 if step > 0 else w2
    return Stacked(descriptor_of(low, block, both, apart), step < 0, key)


def run(both: Stacked | None, launch: Callable[[Stacked | None], None]) -> None:
    """launch(both), or launch(None) where the driver makes no such descriptor, which is said once
    and remembered for the shape."""
    if both is None:
        launch(None)
        return
    try:
        launch(both)
    except RuntimeError as error:
        if _REFUSAL not in str(error):
            raise
        _refused.add(both.key)
        warnings.warn(
            f"fusedmlp: the driver makes no TMA descriptor over two weights of shape "
            f"{tuple(both.descriptor.shape[1:])} at this distance in memory; they are multiplied "
            "apart, which is slower. Halves of one tensor lie at the usual distance.",
            stacklevel=2,
        )
        launch(None)
