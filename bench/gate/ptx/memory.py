"""Where tensors lie for the machine: every argument has an address range of its own.

The ranges are far apart, so that an access past the end of one tensor lands in nothing, never in
another argument. The low bits of an address are the real ones: alignment is as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Fresh", "GivenRegion", "Regions"]

_FIRST = 1 << 40
_APART = 1 << 36
_LOW = (1 << 12) - 1
_INTEGER = 0xA5  # the bytes of fresh integers


class GivenRegion(ctypes.Structure):
    """As machine.cpp has it."""

    _fields_ = [(n, ctypes.c_uint64) for n in ("begin", "end", "host", "written")]
    _fields_ += [("name", ctypes.c_int64)]


class Fresh:
    """Memory that was allocated and that nothing has written: by byte, 1 where something has."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []  # so that no address is used twice
        self.storages: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def note(self, t: Tensor) -> None:
        """A tensor that torch.empty or its like has just made."""
        if t.device.type != "cpu" or not t.numel():
            return
        if not t.is_floating_point():
            _bytes(t.data_ptr(), t.numel() * t.element_size())[:] = _INTEGER
        storage = t.untyped_storage()
        size = storage.nbytes()
        now = _bytes(storage.data_ptr(), size)
        self.kept.append(t)
        self.storages[storage.data_ptr()] = (np.zeros(size, np.uint8), now.copy())

    def written(self, t: Tensor) -> int:
        """Address of the marks of t's first byte; 0 where t is not fresh. What PyTorch wrote in
        the meantime differs from what the memory held at first."""
        storage = t.untyped_storage()
        found = self.storages.get(storage.data_ptr())
        if found is None:
            return 0
        marks, first = found
        differs = (_bytes(storage.data_ptr(), storage.nbytes()) != first).view(np.uint8)
        size = t.element_size()
        if differs.size % size == 0:  # one byte of an element says it of all
            differs = differs.reshape(-1, size).max(1).repeat(size)
        np.maximum(marks, differs, out=marks)
        return int(marks.ctypes.data + t.storage_offset() * size)


def _bytes(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _extent(shape: Sequence[int], strides: Sequence[int], size: int) -> int:
    """Bytes from the first to behind the last that a tensor can reach."""
    if 0 in tuple(shape):
        return 0
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return (int(reach) + 1) * size


@dataclass
class Regions:
    """The tensors of one launch. names: of the arguments, which findings speak of by number. first:
    the lowest address; apart: from one range to the next."""

    fresh: Fresh | None = None
    first: int = _FIRST
    apart: int = _APART
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def tensor(
        self,
        name: str,
        t: Tensor,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> int:
        """The address of t for the machine. shape and strides: what is reached from its start, if
        not t's own."""
        extent = _extent(shape or t.shape, strides or t.stride(), t.element_size())
        written = 0 if self.fresh is None or not extent else self.fresh.written(t)
        return self.add(name, t.data_ptr(), extent, written)

    def data(self, name: str, data: bytes) -> int:
        """The address of constants."""
        array = np.zeros(len(data) + 128, np.uint8)
        skip = -array.ctypes.data % 128
        array[skip : skip + len(data)] = np.frombuffer(data, np.uint8)
        self.kept.append(array)
        return self.add(name, array.ctypes.data + skip, len(data))

    def add(self, name: str, host: int, size: int, written: int = 0) -> int:
        begin = self.first + len(self.names) * self.apart + (host & _LOW)
        self.rows.append((begin, begin + size, host, written))
        self.names.append(name)
        return begin

    def array(self) -> Any:
        rows = [(*row, k) for k, row in enumerate(self.rows)]
        return (GivenRegion * max(len(rows), 1))(*(GivenRegion(*row) for row in rows))


def scratch(size: int) -> Tensor:
    return torch.full((size,), 0xFF, dtype=torch.uint8)
