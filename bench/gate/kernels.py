"""The ahead-of-time gate: compile every Triton kernel for every architecture, with no GPU, and look
inside.

    python -m fusedmlp.bench.gate.kernels [--arch NAME ...] [--brief] [--json FILE]

The real launchers run on CPU tensors of real model sizes under a driver that only compiles, so each
kernel is specialised just as it would be on the GPU. Of each machine-code file the gate reads
registers, stack (spills), shared memory and the opcode that multiplies, and fails on a spill, on
shared memory that the GPU does not have, and on a matrix kernel without its tensor-core or TMA
instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...kernels.arch import ARCHES
from ...kernels.device import pretend
from ...reference.activations import ACTIVATIONS
from . import (
    binary as aot_binary,
    hyper as aot_hyper,
    jobs as aot_jobs,
    masked as aot_masked,
    moe as aot_moe,
)
from .jobs import Job

FAMILIES = (aot_jobs, aot_masked, aot_moe, aot_hyper, aot_binary)
MULTIPROCESSORS = 132
# sm_86 is left out: it has the tiles of sm_80 and the shared memory of sm_120.
ARCHES_COMPILED = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One machine-code file and what was found in it."""

    kernel: str
    arch: str
    dtype: str
    tile: str
    variant: str
    registers: int
    stack: int
    shared: int
    opcodes: tuple[str, ...]
    faults: tuple[str, ...]


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


def _captured(job: Job) -> list[tuple[str, Any]]:
    """(kernel name, compiled kernel) of every launch that the job's call would make."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    arch = job.arch
    if job.key is not None and job.tile is not None:
        arch = dataclasses.replace(arch, tiles={job.key: (job.tile,)})
    driver.set_active(_CompileOnly(arch.capability))
    JITFunction.run = compile_only
    try:
        with pretend(arch, MULTIPROCESSORS):
            job.call()
    finally:
        JITFunction.run = run
    return compiled


def _tool(name: str, cubin: str, *flags: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *flags, cubin], capture_output=True, text=True, check=True).stdout


# What multiplies 16-bit tiles on each architecture; skinny tiles and sm_80's kin use mma.sync.
_MATRIX_OPCODE = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
_GEMMS = (
    "_fwd_kernel", "_bwd_kernel", "_partial_kernel",
    "_up_kernel", "_down_kernel", "_dh_kernel", "_wgrad_kernel", "_dx_kernel", "_dw_kernel",
    "_ds_kernel",
)  # fmt: skip
_OPCODES = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG")


def _inspect(job: Job, name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", file.name, "-res-usage")
        sass = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    opcodes = tuple(op for op in _OPCODES if re.search(rf"\b{op}\b", sass))
    shared = kernel.metadata.shared
    faults = []
    if stack or re.search(r"\b(LDL|STL)\b", sass):
        faults.append(f"spills ({stack} bytes of stack)")
    if shared > job.arch.shared_memory:
        faults.append(f"shared memory {shared} > {job.arch.shared_memory}")
    is_gemm = name in _GEMMS and job.key is not None
    if is_gemm and job.dtype != torch.float32 and job.tile is not None:
        # wgmma and tcgen05 multiply no fewer than 64 rows.
        few = job.tile.block_m < 64
        wanted = "HMMA" if few else _MATRIX_OPCODE.get(job.arch.name, "HMMA")
        if wanted not in opcodes:
            faults.append(f"no {wanted}")
        if job.tile.tma and "UTMALDG" not in opcodes:
            faults.append("no UTMALDG")
        # One wait a K step and some between tiles; as many as products means one after each.
        waits = sass.count("WARPGROUP.DEPBAR")
        if job.tile.tma and waits and waits >= sass.count("HGMMA."):
            faults.append("serialised wgmma")
    stem = job.key[0] if job.key else kernel.src.fn.__module__.rpartition(".")[2]
    return Compiled(
        kernel=f"{stem}:{name}",
        arch=job.arch.name,
        dtype=str(job.dtype).removeprefix("torch."),
        tile=str(job.tile) if job.tile else "as picked" if job.key else "elementwise",
        variant=job.variant,
        registers=registers,
        stack=stack,
        shared=shared,
        opcodes=opcodes,
        faults=tuple(faults),
    )


def brief_of(jobs: Iterable[Job]) -> Iterator[Job]:
    """The bfloat16 jobs, one of each kind: of a kernel's tiles the first that loads in one way,
    and of calls without a tile a launcher's first."""
    seen = set()
    for job in jobs:
        if job.dtype != torch.bfloat16 or (job.key and not job.tile):
            continue
        tile = job.tile
        # Calls without a tile are told apart by their launcher, those with one by its key.
        launcher = job.key or getattr(job.call, "func", None)
        kind = (launcher, *((tile.loads, tile.skinny, job.variant) if tile else ()))
        if kind not in seen:
            seen.add(kind)
            yield job


def gate(
    arches: Sequence[str],
    every_activation: bool = False,
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    brief: bool = False,
) -> Iterator[Compiled]:
    """Compile and inspect kernels for `arches`, one result at a time: all, `brief_of` all, or the
    training launches of some GEMM `kernels` in some `dtypes`."""
    # Silu is in every job; gelu's erf needs the most registers.
    activations = [a for a in ACTIVATIONS if a != "silu"] if every_activation else ["gelu"]
    for name in arches:
        arch = ARCHES[name]
        jobs = tuple(job for family in FAMILIES for job in family.jobs_of(arch, activations))
        if brief:
            jobs = tuple(brief_of(jobs))
        if kernels:
            wanted = [getattr(torch, d) for d in dtypes]
            jobs = tuple(
                job
                for job in jobs
                if job.key and job.key[0] in kernels and job.variant == "train"
                if not wanted or job.dtype in wanted
            )
        for job in jobs:
            for kernel_name, kernel in _captured(job):
                yield _inspect(job, kernel_name, kernel)


def _row(c: Compiled) -> str:
    return (
        f"{c.arch:7} {c.kernel:34} {c.dtype:9} {c.variant:11} {c.tile:44} "
        f"{c.registers:4} {c.stack:5} {c.shared:7}  {' '.join(c.opcodes):30} {'; '.join(c.faults)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=ARCHES_COMPILED)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--every-activation", action="store_true", help="compile matrix kernels with each of them"
    )
    extent.add_argument("--brief", action="store_true", help="one job of each kind of launch")
    parser.add_argument(
        "--kernel", nargs="+", default=(), help="only the training launches of these GEMM kernels"
    )
    parser.add_argument("--dtype", nargs="+", default=(), help="with --kernel: in these dtypes")
    parser.add_argument("--json", metavar="FILE", help="also write every row to FILE")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    print(f"triton {triton.__version__}")
    print(
        f"{'arch':7} {'kernel':34} {'dtype':9} {'variant':11} {'tile':44} "
        f"{'regs':>4} {'stack':>5} {'shared':>7}  {'opcodes':30} faults"
    )
    rows = []
    for compiled in gate(args.arch, args.every_activation, args.kernel, args.dtype, args.brief):
        rows.append(compiled)
        print(_row(compiled), flush=True)
    faulty = [c for c in rows if c.faults]
    print(f"{len(rows)} kernels compiled, {len(faulty)} with faults")
    if args.json:
        with open(args.json, "w") as file:
            json.dump([dataclasses.asdict(c) for c in rows], file, indent=1)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
