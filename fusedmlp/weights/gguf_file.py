"""Where the tensors of a GGUF file lie: its header alone, and nothing that the file does not hold.

    "GGUF" | version | counts | metadata | tensor infos | padding | the tensors' bytes

Whoever made the file may have lied in it. So every count and length is held against the bytes that
are left before anything is read or made, arrays may nest a few levels only, and no two tensors
share a byte: time and memory are bounded by a small multiple of the file's size.

Source: ggml's docs/gguf.md; the types and their sizes: ggml.h of llama.cpp, read 2026-11.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

VERSIONS = (2, 3)

# Number of a tensor's type: (name, elements of a block, bytes of a block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Number of a metadata value's type: its bytes. A string and an array say their own length.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# The fewest bytes that one can take.
_LEAST = {**_SCALARS, _STRING: 8, _ARRAY: 12}
_LEAST_ENTRY, _LEAST_INFO = 8 + 4 + 1, 8 + 4 + 4 + 8
_NESTING = 4
_DIMS = 4
_ALIGNMENT = 32
# The longest key or name of a tensor.
_NAME_BYTES = 65535


class Info(NamedTuple):
    """One tensor: the number of its type, its shape with rows first, and where its bytes lie.

    `size` is 0 where the type is none of TENSOR_TYPES.
    """

    type: int
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def type_name(self) -> str | None:
        """None: newer than TENSOR_TYPES."""
        return TENSOR_TYPES[self.type][0] if self.type in TENSOR_TYPES else None


class GGUFFile(NamedTuple):
    tensors: dict[str, Info]
    data: mmap.mmap

    def read(self, info: Info) -> bytes:
        return self.data[info.start : info.start + info.size]


@contextmanager
def opened(op: str, path: str | os.PathLike[str]) -> Iterator[GGUFFile]:
    """The tensors of the file at `path` by name, for the length of a with block.

    Raises OSError for a file that cannot be opened, ValueError for one that is no whole GGUF.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:  # which cannot be mapped
            raise ValueError(f"{op}: {os.fspath(path)} must be a whole GGUF file, got an empty one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield GGUFFile(_Header(op, path, data).tensors(), data)


class _Header:
    def __init__(self, op: str, path: str | os.PathLike[str], data: mmap.mmap) -> None:
        self.op, self.path, self.data = op, os.fspath(path), data
        self.at, self.end = 0, len(data)

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.op}: {self.path} must be a whole GGUF file, got {reason}")

    def need(self, size: int, what: str) -> None:
        if size > self.end - self.at:
            self.refuse(
                f"one cut short or corrupt: {what} takes at least {size} bytes at byte {self.at} "
                f"of {self.end}"
            )

    def take(self, form: str, what: str) -> tuple[Any, ...]:
        """Numbers from here on, little-endian."""
        size = struct.calcsize(form)
        self.need(size, what)
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def string(self, what: str) -> str:
        (size,) = self.take("<Q", what)
        self.need(size, what)
        if size > _NAME_BYTES:
            self.refuse(f"{what} of {size} bytes; at most {_NAME_BYTES} are allowed")
        raw = self.data[self.at : self.at + size]
        self.at += size
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse(f"{what} that is no UTF-8: {error.reason}")

    def tensors(self) -> dict[str, Info]:
        tensors, entries = self.counts()
        alignment = self.metadata(entries)
        infos = self.infos(tensors)
        start = -(-self.at // alignment) * alignment
        placed = {name: self.placed(name, t, start, alignment) for name, t in infos.items()}
        self.apart(placed)
        return placed

    def counts(self) -> tuple[int, int]:
        """How many tensors and metadata entries follow."""
        if (magic := self.data[:4]) != b"GGUF":
            self.refuse(f"one that begins with {magic!r}")
        self.at = 4
        (version,) = self.take("<I", "its version")
        if version not in VERSIONS:
            what = f"version {version}, newer than"
            if not version & 0xFFFF:
                what = "big-endian numbers, unlike"
            elif version < min(VERSIONS):
                what = f"version {version}, older than"
            known = " and ".join(map(str, VERSIONS))
            self.refuse(f"{what} what is read here: versions {known}, little-endian")
        tensors, entries = self.take("<QQ", "its counts")
        least = entries * _LEAST_ENTRY + tensors * _LEAST_INFO
        self.need(least, f"{entries} metadata entries and {tensors} tensors")
        return tensors, entries

    def metadata(self, entries: int) -> int:
        """Passes it by but for the alignment, which it gives."""
        alignment, seen = _ALIGNMENT, set()
        for _ in range(entries):
            key = self.string("a metadata key")
            if key in seen:
                self.refuse(f"the metadata key {key!r} twice")
            seen.add(key)
            (kind,) = self.take("<I", f"the type of {key!r}")
            if key != "general.alignment":
                self.skip(kind, 1, f"the value of {key!r}")
                continue
            alignment = self.take("<I", key)[0] if kind == _UINT32 else 0
            if alignment.bit_count() != 1:
                self.refuse(f"{key} of type {kind} that is no 32-bit power of two: {alignment}")
        return alignment

    def skip(self, kind: int, count: int, what: str, depth: int = 0) -> None:
        """Past `count` metadata values of one type."""
        if kind not in _LEAST:
            self.refuse(f"{what} of the unknown type {kind}; types up to {max(_LEAST)} are known")
        self.need(count * _LEAST[kind], what)
        if kind in _SCALARS:
            self.at += count * _SCALARS[kind]
        elif kind == _STRING:
            self.skip_strings(count, what)
        elif depth == _NESTING:
            self.refuse(f"arrays nested more than {_NESTING} deep in {what}")
        else:
            for _ in range(count):
                inner, values = self.take("<IQ", what)
                self.skip(inner, values, what, depth + 1)

    def skip_strings(self, count: int, what: str) -> None:
        """A tokenizer has hundreds of thousands."""
        size = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.at > self.end - 8:
                self.need(8, what)  # which refuses
            self.at += 8 + size(self.data, self.at)[0]
        self.need(0, what)

    def infos(self, count: int) -> dict[str, Info]:
        """As they stand in the file: offsets from the first tensor's byte, no sizes."""
        infos: dict[str, Info] = {}
        for _ in range(count):
            name = self.string("the name of a tensor")
            if name in infos:
                self.refuse(f"two tensors named {name!r}")
            (dims,) = self.take("<I", f"the dimensions of {name!r}")
            if dims > _DIMS:
                self.refuse(f"{name!r} of {dims} dimensions; at most {_DIMS} are known")
            *shape, kind, offset = self.take(f"<{dims}QIQ", f"the tensor {name!r}")
            infos[name] = Info(kind, tuple(reversed(shape)), offset, 0)
        return infos

    def placed(self, name: str, t: Info, data: int, alignment: int) -> Info:
        start = data + t.start
        if t.start % alignment:
            self.refuse(f"{name!r} at offset {t.start}, no multiple of the alignment {alignment}")
        if start > self.end:
            self.refuse(f"one cut short or corrupt: {name!r} begins at byte {start} of {self.end}")
        if math.prod(max(n, 1) for n in t.shape) >= 1 << 63:
            self.refuse(f"{name!r} of more elements than 2^63: {t.shape}")
        if t.type not in TENSOR_TYPES:
            return t._replace(start=start)
        type_name, elements, size = TENSOR_TYPES[t.type]
        row = t.shape[-1] if t.shape else 1
        if row % elements:
            self.refuse(f"{name!r} with rows of {row}; blocks of {type_name} hold {elements}")
        size = math.prod(t.shape) // elements * size
        if start + size > self.end:
            self.refuse(
                f"one cut short or corrupt: {name!r}, {type_name} of shape {t.shape}, ends at byte "
                f"{start + size} of {self.end}"
            )
        return t._replace(start=start, size=size)

    def apart(self, tensors: dict[str, Info]) -> None:
        """Else a small file could stand for any number of large tensors."""
        parts = sorted((t.start, t.start + t.size, name) for name, t in tensors.items())
        for (_, end, first), (start, _, second) in pairwise(parts):
            if start < end:
                self.refuse(f"{first!r} and {second!r} in the same bytes")
