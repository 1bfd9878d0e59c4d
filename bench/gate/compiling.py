"""Compiling without a GPU: a job's launches, caught and compiled under a driver that only
compiles."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...kernels.arch import Arch
from ...kernels.device import pretend
from .jobs import Job

MULTIPROCESSORS = 132


class _CompileOnly:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Launched(NamedTuple):
    """One launch: its kernel's name, the compiled kernel, its grid."""

    name: str
    kernel: Any
    grid: tuple[int, ...]


@contextmanager
def compile_only(arch: Arch) -> Iterator[list[Launched]]:
    """Inside, tensors lie on a GPU of `arch` and launches compile and do nothing else; the list
    gets each of them."""
    compiled: list[Launched] = []
    run = JITFunction.run

    def compile_it(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Launched(self.fn.__name__, kernel, tuple(grid)))
        return kernel

    driver.set_active(_CompileOnly(arch.capability))
    JITFunction.run = compile_it
    try:
        with pretend(arch, MULTIPROCESSORS):
            yield compiled
    finally:
        JITFunction.run = run


def captured(job: Job) -> list[Launched]:
    """Every launch that the job's call would make."""
    arch = job.arch
    if job.key is not None and job.tile is not None:
        arch = dataclasses.replace(arch, tiles={job.key: (job.tile,)})
    with compile_only(arch) as compiled:
        job.call()
    return compiled


@functools.cache
def _known(tool: str) -> str:
    """What a tool says of itself, in lower case; it lists the GPUs that it knows."""
    done = subprocess.run([tool, "--help"], capture_output=True, text=True, check=True)
    return done.stdout.lower()


def unknown(arch: Arch) -> str | None:
    """Why the installed Triton's tools cannot compile for `arch` or read what they compiled, or
    None where they can."""
    target = sm_arch_from_capability(arch.capability)
    nvidia = triton.knobs.nvidia
    tools = get_ptxas(arch.capability), nvidia.cuobjdump, nvidia.nvdisasm
    for name, tool in zip(("ptxas", "cuobjdump", "nvdisasm"), tools, strict=True):
        # ptxas and cuobjdump write 'sm_90a', nvdisasm 'SM90a'.
        if not re.search(rf"'sm_?{target.removeprefix('sm_')}'", _known(tool.path)):
            return f"Triton {triton.__version__}'s {name} does not know {target}"
    return None
