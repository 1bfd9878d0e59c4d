"""Launches as a driver gets them: what Triton compiles for a GPU, with the bytes of its
parameters."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from triton.runtime.driver import driver

from ....kernels.arch import Arch
from ....kernels.device import pretend
from ..inspecting import tool
from ..ptx.driver import Emulated, label
from ..ptx.memory import Regions
from .cubin import Layout, layouts
from .loops import Loop, loops_of
from .sass import FLAGS, Code, parse
from .values import Unreadable
from .walk import Launched

_MAP = 0x707478766D746D61  # how ptx/tensor_map.py marks its own 128 bytes


@dataclass(frozen=True)
class Binary:
    """One kernel's machine code, read once."""

    code: Code
    layout: Layout
    loops: tuple[Loop, ...]


@functools.cache
def binaries(cubin: bytes) -> dict[str, Binary]:
    """Every kernel of a machine-code file, by its mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = tool("nvdisasm", file.name, *FLAGS)
    places = layouts(cubin)
    return {
        code.name: Binary(code, places[code.name], tuple(loops_of(code)))
        for code in parse(text)
        if code.name in places
    }


def binary(cubin: bytes) -> Binary:
    """The one kernel of a file that Triton made."""
    (found,) = binaries(cubin).values()
    return found


@dataclass(frozen=True)
class Caught:
    """One launch. parameters as bytes; regions: where they point to; kept: the tensors there."""

    kernel: str
    cubin: bytes
    grid: tuple[int, int, int]
    warps: int
    shared: int
    tensor_memory: int
    parameters: tuple[bytes, ...]
    regions: Regions
    kept: tuple[Any, ...] = ()

    def launched(self) -> Launched:
        layout = binary(self.cubin).layout
        if len(layout.parameters) > len(self.parameters):
            raise Unreadable(
                f"the code has {len(layout.parameters)} parameters, got {len(self.parameters)}"
            )
        # The last ones, of scratch and of the profiler, may be left out of the code.
        given = self.parameters[: len(layout.parameters)]
        boxes = {
            offset: size
            for (offset, _), data in zip(layout.parameters, given, strict=True)
            if (size := _box(data))
        }
        return Launched(layout, given, self.grid, 32 * self.warps, self._load, boxes)

    def _load(self, address: int, size: int) -> int | None:
        for begin, end, host, _ in self.regions.rows:
            if begin <= address and address + size <= end:
                data = ctypes.string_at(host + address - begin, size)
                return int.from_bytes(data, "little")
        return None


def _box(data: bytes) -> int:
    """The bytes of a tensor map's box; 0 of another parameter."""
    if len(data) != 128 or struct.unpack_from("<Q", data)[0] != _MAP:
        return 0
    fields = struct.unpack_from("<QQ5Q4Q5I4B", data)
    box, (rank, element) = fields[11:16], fields[16:18]
    size = element
    for n in box[:rank]:
        size *= n
    return size


@dataclass
class _Recorder(Emulated):
    """A driver whose binaries are Triton's own and whose launches are noted."""

    caught: list[Caught] = field(default_factory=list)

    def load_binary(self, name: str, cubin: Any, shared: int, device: int) -> tuple[Any, ...]:
        return name, cubin, 0, 0, 1024

    def launch(
        self, source: Any, metadata: Any, grid: tuple[int, int, int], text: Any,
        arguments: tuple[Any, ...],
    ) -> None:  # fmt: skip
        call = self.packed(source, metadata, grid, arguments)
        self.caught.append(
            Caught(
                label(source.fn), text, grid, metadata.num_warps, metadata.shared,
                metadata.tmem_size or 0, tuple(call.params), call.regions, arguments,
            )
        )  # fmt: skip


@contextlib.contextmanager
def recording(arch: Arch, multiprocessors: int) -> Iterator[list[Caught]]:
    """Inside, Triton kernels on CPU tensors are compiled for `arch`, and launches are noted."""
    recorder = _Recorder(arch)
    previous = driver._active
    driver.set_active(recorder)
    try:
        with pretend(arch, multiprocessors):
            yield recorder.caught
    finally:
        driver._active = previous


def caught(
    arch: Arch, multiprocessors: int, call: Callable[[], object], **row: Any
) -> list[Caught]:
    """What `call` launches on such a GPU; row: fields of `arch` to replace."""
    with recording(dataclasses.replace(arch, **row), multiprocessors) as launches:
        call()
    return launches


__all__ = ["Binary", "Caught", "binary", "caught", "recording"]
