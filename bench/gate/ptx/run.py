"""Loading a kernel into the machine and running it."""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .finding import Finding
from .library import machine
from .lower import Lowered, lower
from .memory import Regions
from .text import Instruction, parse

__all__ = ["Order", "Program", "Run", "load"]

WHEN = ("late", "once", "seed")
SUMS = ("forwards", "backwards", "exactly")


@dataclass(frozen=True)
class Order:
    """What the hardware leaves open, chosen.

    when: asynchronous operations come "late" (not before they are waited for), at "once", or by
    "seed"; warps and blocks run forwards, backwards, or by seed with it. sums: products are summed
    "forwards", "backwards", or a step's "exactly" before one addition. noise: from -1 to 1, where
    in its stated bound an approximate function lies.
    """

    when: str = "late"
    seed: int = 0
    sums: str = "forwards"
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (("when", self.when, WHEN), ("sums", self.sums, SUMS)):
            if value not in known:
                raise ValueError(f"Order: {name} is one of {known}, got {value!r}")
        if not -1 <= self.noise <= 1:
            raise ValueError(f"Order: noise is from -1 to 1, got {self.noise}")


IN_ORDER = Order()


class _Options(ctypes.Structure):
    _fields_ = [
        ("when", ctypes.c_int32), ("seed", ctypes.c_uint32), ("races", ctypes.c_int32),
        ("strict", ctypes.c_int32), ("sums", ctypes.c_int32),
        ("noise", ctypes.c_float), ("budget", ctypes.c_int64),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("cluster", ctypes.c_uint32 * 3),
        ("warps", ctypes.c_int32), ("shared", ctypes.c_int32), ("granule", ctypes.c_uint32),
        ("global_granule", ctypes.c_uint32), ("options", _Options),
    ]  # fmt: skip


class _Result(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * 2048), ("line", ctypes.c_int32), ("warp", ctypes.c_int32),
        ("ctaid", ctypes.c_uint32 * 3), ("count", ctypes.c_uint64),
    ]  # fmt: skip


def _pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


@dataclass
class Run:
    """One launch that ran. instructions: of warps. seconds: of the machine."""

    kernel: str
    grid: tuple[int, int, int]
    instructions: int
    seconds: float


@dataclass
class Program:
    """A kernel in the machine. constants: its initialised global variables. counts: by row, how
    often warps have carried it out."""

    lowered: Lowered
    handle: int
    constants: Regions
    seconds: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint64))
    _kept: list[Any] = field(default_factory=list)

    def __del__(self) -> None:
        if self.handle:
            machine().ptx_free(self.handle)

    def run(
        self,
        grid: Sequence[int],
        params: Sequence[bytes],
        regions: Regions,
        *,
        threads: int = 0,
        cluster: tuple[int, int, int] | None = None,
        shared: int = 0,
        order: Order = IN_ORDER,
        elements: int = 16,
        strict: bool = False,
        races: bool = True,
        budget: int = 1 << 40,
    ) -> Run:
        """Run a launch, or raise Finding.

        params: bytes of each parameter. shared: bytes of dynamic shared memory, beside what the
        PTX declares. elements: bytes of the narrowest element that a TMA store writes.
        strict: to the letter, where Triton 3.9 relies on ptxas: what a tcgen05.ld fills may not be
        read before its wait, nor an accumulator be moved to after a wgmma.fence. budget: warp
        instructions of a cluster.
        """
        k = self.lowered.kernel
        sizes = [len(p) for p in params]
        if sizes != k.param_sizes:
            raise ValueError(f"{k.name}: parameters of {k.param_sizes} bytes, got {sizes}")
        buffer = np.zeros(max(k.param_bytes, 8), np.uint8)
        for offset, p in zip(k.params.values(), params, strict=True):
            buffer[offset : offset + len(p)] = np.frombuffer(p, np.uint8)
        rows = [*regions.array()[: len(regions.names)], *self._constant_rows(len(regions.names))]
        array = (type(regions.array()[0]) * max(len(rows), 1))(*rows)
        granule, global_granule = self.lowered.granules
        if self.lowered.stores_boxes:
            global_granule = min(global_granule, elements)
        options = _Options(
            WHEN.index(order.when), order.seed, races, strict, SUMS.index(order.sums),
            order.noise, budget,
        )  # fmt: skip
        threads = threads or k.threads
        if threads <= 0 or threads % 32:
            raise ValueError(f"{k.name}: whole warps are asked for, got {threads} threads")
        x, y, z = (*map(int, grid), 1, 1)[:3]
        call = _Call(
            (ctypes.c_uint32 * 3)(x, y, z), (ctypes.c_uint32 * 3)(*(cluster or k.cluster)),
            threads // 32, self.lowered.shared + shared, granule,
            global_granule, options,
        )  # fmt: skip
        result = _Result()
        start = time.perf_counter()
        failed = machine().ptx_run(
            ctypes.c_void_p(self.handle), ctypes.byref(call), _pointer(buffer), len(buffer),
            ctypes.byref(array), len(rows), _pointer(self.counts), ctypes.byref(result),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if failed:
            raise self._finding(result, [*regions.names, *self.constants.names])
        return Run(k.name, (x, y, z), int(result.count), seconds)

    def never(self) -> list[Instruction]:
        """Instructions that no run of this program has carried out so far."""
        lines = self.lowered.rows[:, 6]
        done = {int(line) for line in lines[self.counts > 0]}
        code = self.lowered.kernel.instructions
        return [i for k, i in enumerate(code) if k not in done]

    def _constant_rows(self, first: int) -> list[Any]:
        rows = self.constants.array()[: len(self.constants.names)]
        for k, row in enumerate(rows):
            row.name = first + k
        return list(rows)

    def _finding(self, result: _Result, names: Sequence[str]) -> Finding:
        k = self.lowered.kernel
        what = result.message.decode(errors="replace")
        for n in reversed(range(len(names))):
            what = what.replace(f"argument {n}", names[n])
        lines = [i.line for i in k.instructions]
        what = re.sub(r"\bline (\d+)", lambda m: f"PTX line {[*lines, 'end'][int(m[1])]}", what)
        x, y, z = result.ctaid
        if result.line >= len(k.instructions):
            return Finding(k.name, what, line=-1, text="the end", block=(x, y, z), warp=result.warp)
        i = k.instructions[max(result.line, 0)]
        return Finding(k.name, what, i.source, i.line, i.text, (x, y, z), result.warp)


# Below every tensor, and so near each other that hundreds stay below.
_CONSTANTS, _CONSTANTS_APART = 1 << 38, 1 << 30


@functools.lru_cache(128)  # a job's kernels, in all orders; a program takes megabytes
def load(text: str, name: str | None = None) -> Program:
    """The kernel `name` of a PTX file, or its only one. Raises Unknown for what has no model."""
    start = time.perf_counter()
    kernel = parse(text, name)
    constants = Regions(first=_CONSTANTS, apart=_CONSTANTS_APART)
    symbols = {
        variable: constants.data(variable, v.data)
        for variable, v in kernel.variables.items()
        if v.space in ("global", "const")
    }
    low = lower(kernel, symbols)
    names = (ctypes.c_char_p * len(low.names))(*low.names)
    block = np.frombuffer(low.constants or bytes(64), np.uint8).copy()
    handle = machine().ptx_load(
        len(low.names), names, _pointer(low.rows), _pointer(low.ops), len(low.ops),
        _pointer(low.imms), len(low.imms), _pointer(block), len(low.constants),
        low.register_bytes, low.local, _pointer(low.special),
    )  # fmt: skip
    counts = np.zeros(len(low.names), np.uint64)
    return Program(low, handle, constants, time.perf_counter() - start, counts)
