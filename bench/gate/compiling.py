"""A job's launches, compiled without a GPU; and whether Triton's tools know one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from ...dry.driver import Launched, compile_only
from ...kernels.arch import Arch
from .jobs import Job


def captured(job: Job) -> list[Launched]:
    """The job's launches, of each compiled kernel one, however often a call launches it; its grid
    is as long in each dimension as any of them."""
    arch = job.arch
    if job.key is not None and job.tile is not None:
        arch = dataclasses.replace(arch, tiles={job.key: (job.tile,)})
    with compile_only(arch) as compiled:
        job.call()
    found: dict[int, Launched] = {}
    for made in compiled:
        largest = found.setdefault(id(made.kernel), made).grid
        grid = tuple(map(max, itertools.zip_longest(largest, made.grid, fillvalue=1)))
        found[id(made.kernel)] = made._replace(grid=grid)
    return list(found.values())


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
