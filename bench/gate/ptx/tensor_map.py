"""Tensor maps: what cuTensorMapEncodeTiled would refuse, and the machine's own 128 bytes.

The rules are those of the CUDA Driver API's page of cuTensorMapEncodeTiled (CUDA 13.0).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["TensorMap"]

_MAGIC = 0x707478766D746D61
SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """A tensor as TMA sees it, the innermost dimension first.

    strides: bytes, of all dimensions but the innermost. element: bytes of one. swizzle: 0 none, 1,
    2, 3: 32, 64, 128 bytes. nan: what lies outside reads as NaN, not 0.
    """

    base: int
    sizes: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    element: int
    swizzle: int = 0
    nan: bool = False
    floating: bool = True

    def refusals(self) -> list[str]:
        """Why the driver would not encode it."""
        rank = len(self.sizes)
        if not 1 <= rank <= 5:
            return [f"its rank is {rank}, not 1 to 5"]
        if len(self.strides) != rank - 1 or len(self.box) != rank:
            return ["sizes, strides and box are of different ranks"]
        why, row = [], self.box[0] * self.element
        if self.element not in (1, 2, 4, 8):
            why.append(f"no data type has {self.element} bytes")
        if self.base % 16:
            why.append("its base is not aligned to 16 bytes")
        why += [f"a size of {n} is not in 1 to 2^32" for n in self.sizes if not 0 < n <= 1 << 32]
        for n in self.strides:
            if n % 16 or not 0 <= n < 1 << 40:
                why.append(f"a stride of {n} bytes is no multiple of 16 below 2^40")
        why += [f"a box of {n} elements is not in 1 to 256" for n in self.box if not 0 < n <= 256]
        if row % 16:
            why.append(f"a box row of {row} bytes is no multiple of 16")
        limit = SWIZZLE_BYTES.get(self.swizzle)
        if limit is None:
            why.append(f"swizzle mode {self.swizzle} is unknown")
        elif limit and row > limit:
            why.append(f"a box row of {row} bytes is wider than its swizzle of {limit}")
        if self.nan and not self.floating:
            why.append("NaN is asked for outside of a tensor of integers")
        return why

    def encoded(self) -> bytes:
        """As machine/copies.h reads it."""

        def five(values: Sequence[int], n: int = 5) -> list[int]:
            return [*values, *[0] * (n - len(values))]

        return struct.pack(
            "<QQ5Q4Q5I4B", _MAGIC, self.base, *five(self.sizes), *five(self.strides, 4),
            *five(self.box), len(self.sizes), self.element, self.swizzle, int(self.nan),
        ).ljust(128, b"\0")  # fmt: skip
