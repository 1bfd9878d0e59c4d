"""Which TMA descriptors (CUDA's tensor maps) a driver can be trusted to make."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .device import arch_of

# Below so many bytes drivers may make a map of Blackwell wrongly, see csrc/tensor_map.cpp.
_SMALL = 128 << 10


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    wanted = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride != wanted:
            return False
        wanted *= size
    return True


def small_with_gaps(shape: Sequence[int], strides: Sequence[int], element: int) -> bool:
    """Is the memory of such a tensor, of elements of so many bytes, small and not dense?"""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return (last + 1) * element < _SMALL and not _dense(shape, strides)


def doubtful(*tensors: Tensor | None) -> bool:
    """May a map of one of these, as it lies or transposed, be one that drivers of Blackwell make
    wrongly? Triton 3.6 does nothing about it and newer ones only for drivers up to CUDA 13.1, so
    that no kernel of Triton's is given such a map, whatever the versions."""
    small = [t for t in tensors if t is not None and t.numel() < _SMALL]
    if not small or arch_of(small[0].device).mma != "tcgen05":
        return False
    return any(
        all(small_with_gaps(v.shape, v.stride(), v.element_size()) for v in (t, t.mT))
        for t in small
    )
