"""A GPU that is not there: Triton compiles for it, and what it compiled runs on CPU tensors.

Triton's own way of launching is kept; only its driver is another one, whose binaries are PTX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ....kernels.arch import Arch
from ....kernels.device import pretend
from ....testing.memory import poison
from .finding import Finding
from .memory import Fresh, Regions, scratch
from .run import Order, Run, load
from .tensor_map import TensorMap

__all__ = ["Call", "Emulated", "emulate", "label"]

_INTEGERS = {
    "i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8,
}  # fmt: skip
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"}
IN_ORDER = Order()
Edit = Callable[[str, str], str]


@dataclass(frozen=True)
class Call:
    """One launch as a driver gets it; params: the bytes of each parameter of the PTX."""

    kernel: str
    ptx: str
    grid: tuple[int, int, int]
    shared: int
    params: tuple[bytes, ...]


@dataclass
class Emulated:
    """As much of a Triton driver as compiling and launching need.

    order: how launches run from now on. edit: (kernel, PTX) -> PTX, to plant a fault. runs: what
    was launched. calls: where it is a list, launches are noted there and do not run.
    """

    arch: Arch
    order: Order = field(default_factory=Order)
    edit: Edit | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fresh: Fresh = field(default_factory=Fresh)
    runs: list[Run] = field(default_factory=list)
    calls: list[Call] | None = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch.capability, 32)

    def get_current_device(self) -> int:
        return self.arch.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    # ---- what Triton asks of a driver when it loads and launches

    @property
    def utils(self) -> Emulated:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.arch.shared_memory}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, threads)"""
        return name, ptx.decode(), 0, 0, 1024

    def unload_module(self, module: object) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(
            x: int, y: int, z: int, stream: object, text: str, packed: object, noted: object,
            enter: object, leave: object, *arguments: Any,
        ) -> None:  # fmt: skip
            now = driver.active
            assert isinstance(now, Emulated)  # a kernel outlives the machine that loaded it
            now.launch(source, metadata, (x, y, z), text, arguments)

        return launch

    def packed(
        self, source: Any, metadata: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]
    ) -> _Arguments:
        """The parameters of a launch; Finding where the driver would refuse a tensor map."""
        call = _Arguments(Regions(self.fresh), list(metadata.tensordesc_meta or ()))
        for (parameter, kind), value in zip(source.signature.items(), arguments, strict=True):
            call.add(parameter, kind, value)
        size = grid[0] * grid[1] * grid[2] * metadata.global_scratch_size
        memory = scratch(size)
        call.params.append(_bytes(call.regions.tensor("scratch", memory) if size else 0, 8))
        call.params.append(bytes(8))  # of the profiler
        if call.refusals:
            why = "; ".join(call.refusals)
            raise Finding(label(source.fn), f"cuTensorMapEncodeTiled would refuse {why}")
        return call

    def launch(
        self,
        source: Any,
        metadata: Any,
        grid: tuple[int, int, int],
        text: str,
        arguments: tuple[Any, ...],
    ) -> None:
        name = label(source.fn)
        if self.edit:
            text = self.edit(name, text)
        call = self.packed(source, metadata, grid, arguments)
        if self.calls is not None:
            self.calls.append(Call(name, text, grid, metadata.shared, tuple(call.params)))
            return
        run = load(text).run(
            grid, call.params, call.regions, shared=metadata.shared, order=self.order,
            elements=min(call.elements, default=16), **self.options,
        )  # fmt: skip
        self.runs.append(dataclasses.replace(run, kernel=name))


def label(fn: JITFunction[Any]) -> str:
    """A kernel by its file and its name, which alone is not the only one of its kind."""
    return f"{fn.fn.__module__.rpartition('.')[2]}.{fn.fn.__name__}"


def _bytes(value: int, size: int) -> bytes:
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


@dataclass
class _Arguments:
    """Parameters of a launch as Triton lays them out, and the memory that each may touch."""

    regions: Regions
    metas: list[Any]
    params: list[bytes] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)

    def add(self, name: str, kind: Any, value: Any) -> None:
        if kind == "constexpr":
            return
        if isinstance(kind, tuple):
            for k, v in zip(kind, value, strict=True):
                self.add(name, k, v)
        elif kind.startswith("tensordesc"):
            self._descriptor(name, value)
        elif kind.startswith("*"):
            address = 0 if value is None else self.regions.tensor(name, value)
            self.params.append(_bytes(address, 8))
        elif kind in _INTEGERS:
            self.params.append(_bytes(value, _INTEGERS[kind]))
        else:
            self.params.append(struct.pack(_FLOATS[kind], value))

    def _descriptor(self, name: str, value: Any) -> None:
        t, sizes, strides = value.base, list(value.shape), list(value.strides)
        address = self.regions.tensor(name, t, sizes, strides)
        ints = [_bytes(n, 4) for n in sizes]
        longs = [_bytes(n, 8) for n in strides]
        if not self.metas:  # without TMA the kernel computes addresses
            wide = [_bytes(n, 8) for n in (*sizes, *strides)]
            flags = [_bytes(value.padding == "nan", 1)]
            if hasattr(value, "round_f32_to_tf32"):
                flags.append(_bytes(value.round_f32_to_tf32, 1))
            self.params += [_bytes(address, 8), *wide, *flags, *ints, *longs]
            return
        meta = self.metas.pop(0)
        element = meta["elem_size"]
        tensor = TensorMap(
            address, sizes[::-1], [s * element for s in strides[::-1][1:]],
            list(meta["block_size"])[::-1], element, meta["swizzle"], value.padding == "nan",
            t.is_floating_point(),
        )  # fmt: skip
        self.refusals += [f"{name}: {why}" for why in tensor.refusals()]
        self.elements.append(element)
        self.params += [tensor.encoded(), *ints, *longs]


def _ptx_is_the_binary(
    backend: Any = None,
    stages: Any = None,
    options: Any = None,
    language: Any = None,
    capability: Any = None,
) -> tuple[str, str] | None:
    """Triton's hook for other stages of compilation. Asked without arguments it names itself, so
    that its results have cache entries of their own."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
        return None
    return "fusedmlp-ptx", "fusedmlp-ptx"


@contextlib.contextmanager
def emulate(
    arch: Arch,
    order: Order = IN_ORDER,
    *,
    multiprocessors: int = 3,
    edit: Edit | None = None,
    calls: list[Call] | None = None,
    **options: Any,
) -> Iterator[Emulated]:
    """Inside, Triton kernels on CPU tensors are compiled for `arch` and run in the machine.

    multiprocessors: few, so that persistent loops do loop. calls: a list that takes each launch in
    the machine's place, so that no kernel runs. options: of Program.run. Raises Finding where the
    machine finds a fault and Unknown at an instruction that it has no model of.
    """
    emulated = Emulated(arch, order, edit, options, calls=calls)
    previous = driver._active
    knobs = triton.knobs
    driver.set_active(emulated)
    try:
        with (
            knobs.runtime.scope(), knobs.compilation.scope(), pretend(arch, multiprocessors),
            poison(emulated.fresh.note),
        ):  # fmt: skip
            knobs.runtime.add_stages_inspection_hook = _ptx_is_the_binary
            knobs.compilation.store_binary_only = True  # nobody reads what comes before the PTX
            yield emulated
    finally:
        driver._active = previous
