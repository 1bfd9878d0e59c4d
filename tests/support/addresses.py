"""Every address that a kernel touches in Triton's interpreter lies in a tensor that it was given,
between the first element and the last, and is a multiple of what is read there. What is read beside
a row and masked afterwards changes no result; a GPU faults far outside at best, and where a word is
not aligned."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


def _extents(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The address of each tensor's first element, and that behind its last."""
    for t in arguments:
        if isinstance(t, tuple):
            yield from _extents(t)
            continue
        base = getattr(t, "base", t)  # a TensorDescriptor, which may span two tensors
        if isinstance(base, torch.Tensor) and 0 not in t.shape:
            strides = t.stride() if t is base else t.strides
            last = sum((size - 1) * step for size, step in zip(t.shape, strides, strict=True))
            yield base.data_ptr(), base.data_ptr() + (last + 1) * base.element_size()


class _Launch:
    def __init__(self, kernel: str, arguments: Iterable[Any]) -> None:
        self.kernel = kernel
        extents = sorted(set(_extents(arguments)))
        self.begins = np.array([begin for begin, _ in extents], np.int64)
        # Where views overlap, the widest that began before.
        self.ends = np.maximum.accumulate(np.array([end for _, end in extents], np.int64))

    def check(self, pointers, mask, size: int) -> None:
        used = np.asarray(pointers)[np.asarray(mask)].astype(np.int64)
        if not used.size:
            return
        if (used % size).any():
            raise AssertionError(f"{self.kernel}: {size} bytes read or written from between them")
        lowest, highest = int(used.min()), int(used.max())
        place = int(np.searchsorted(self.begins, lowest, "right")) - 1
        if place >= 0 and highest + size <= self.ends[place]:
            return  # all in one tensor, which nearly every access is
        place = np.searchsorted(self.begins, used, "right") - 1
        outside = (place < 0) | (used + size > self.ends[np.maximum(place, 0)])
        if outside.any():
            address = int(used[outside][0])
            past = [int(address - end) for end in self.ends if end <= address]
            where = f"{min(past)} bytes past the end of one" if past else "before all"
            raise AssertionError(f"{self.kernel}: an address in none of its tensors, {where}")


@contextmanager
def checked() -> Iterator[None]:
    """Kernels that are launched inside raise AssertionError at an address outside their tensors, or
    one that is not aligned."""
    from triton.runtime import interpreter

    launches: list[_Launch] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, load, store = (
        executor.__call__, builder.create_masked_load, builder.create_masked_store
    )  # fmt: skip

    def call(self, *args, **kwargs):
        launches.append(_Launch(self.fn.__name__, (*args, *kwargs.values())))
        try:
            return run(self, *args, **kwargs)
        finally:
            launches.pop()

    def check(pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        launches[-1].check(pointers.data, mask.data, size)

    def masked_load(self, ptrs, mask, *args, **kwargs):
        check(ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def masked_store(self, ptrs, value, mask, *args, **kwargs):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    with (
        mock.patch.object(executor, "__call__", call),
        mock.patch.object(builder, "create_masked_load", masked_load),
        mock.patch.object(builder, "create_masked_store", masked_store),
    ):
        yield
