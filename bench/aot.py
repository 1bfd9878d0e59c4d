"""The ahead-of-time gate: compile every Triton kernel for every architecture, with no GPU, and look
inside.

    python -m fusedmlp.bench.aot [--arch sm_90 ...] [--every-activation] [--json FILE]

The real launchers run on CPU tensors of real model sizes under a driver that only compiles, so each
kernel is specialised just as it would be on the GPU. Of each machine-code file the gate reads
registers, stack (spills), shared memory and the opcode that multiplies, and fails on a spill, on
shared memory that the GPU does not have, and on a matrix kernel without its tensor-core or TMA
instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..kernels import gated_act, gated_linear, linear_act
from ..kernels.activations import ACTIVATIONS
from ..kernels.arch import ARCHES, SKINNY_M, Arch, Tile, pretend

# Llama-3-8B's MLP; the ragged sizes keep no 16-byte alignment, so they take masked pointer loads.
M, D, H = 4096, 4096, 14336
RAGGED = 4093, 4093, 1021
MULTIPROCESSORS = 132
# sm_86 is left out: it has the tiles of sm_80 and the shared memory of sm_120.
ARCHES_COMPILED = ("sm_80", "sm_90", "sm_100", "sm_120")
THOROUGH = "sm_90"  # compiled in more variants: the GPU that the tiles are made for


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


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a launcher, planned for one tile of one architecture."""

    arch: Arch
    dtype: torch.dtype
    variant: str
    call: Callable[[], Any]
    key: tuple[str, int] | None = None
    tile: Tile | None = None


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


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)  # never touched, so it costs no memory


def _gemm_call(
    kernel: str, dtype: torch.dtype, m: int, d: int, h: int, activation: str, full: bool
) -> Callable[[], Any]:
    """A launcher's call. full: with biases and everything that training stores; else inference."""
    x, b = _empty(m, d, dtype=dtype), _empty(h, dtype=dtype)
    w, w_up = _empty(2 * h, d, dtype=dtype).chunk(2)
    down, pair, z = (
        _empty(d, h, dtype=dtype),
        _empty(2, m, h, dtype=dtype),
        _empty(m, h, dtype=dtype),
    )
    bias = b if full else None
    calls: dict[str, Callable[[], Any]] = {
        "gated_linear_fwd": lambda: gated_linear.gated_linear_fwd(
            x, w, w_up, bias, bias, activation, True, full
        ),
        "linear_act_fwd": lambda: linear_act.linear_act_fwd(x, w, bias, activation, True, full),
        "gated_linear_bwd": lambda: gated_linear.gated_linear_bwd(
            x, down, pair, activation, None, True, full
        ),
        "linear_act_bwd": lambda: linear_act.linear_act_bwd(x, down, z, activation, True, full),
    }
    return calls[kernel]


def _gemm_jobs(arch: Arch, activations: list[str]) -> Iterator[Job]:
    for key, tiles in arch.tiles.items():
        kernel, size = key
        for tile in tiles:
            m, d, h = (M, D, H) if tile.loads != "element" else RAGGED
            m = SKINNY_M if tile.skinny else m
            dtype = torch.bfloat16 if size == 2 else torch.float32

            def job(variant: str, activation: str, dtype: torch.dtype, full: bool) -> Job:
                call = _gemm_call(kernel, dtype, m, d, h, activation, full)  # noqa: B023
                return Job(arch, dtype, variant, call, key, tile)  # noqa: B023

            yield job("train", "silu", dtype, True)
            if tile == tiles[0] and arch.name == THOROUGH:
                yield job("infer", "silu", dtype, False)
                if size == 2:
                    yield job("train", "silu", torch.float16, True)
            if tile == tiles[0] and size == 2:
                for name in activations:
                    yield job(name, name, dtype, True)


def _odd_jobs(arch: Arch) -> Iterator[Job]:
    """What only some calls meet: sizes of 1, which Triton compiles in; weights contiguous along
    either dimension; packed gradients; g and u alone."""
    bf16 = torch.bfloat16
    for kernel in ("gated_linear_fwd", "linear_act_fwd", "gated_linear_bwd", "linear_act_bwd"):
        for size in ((1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)):
            call = _gemm_call(kernel, bf16, *size, "silu", True)
            yield Job(arch, bf16, "x".join(map(str, size)), call, (kernel, 2))
    x, w, wt = _empty(M, D, dtype=bf16), _empty(H, D, dtype=bf16), _empty(D, H, dtype=bf16)
    pair, halves = _empty(2, M, H, dtype=bf16), _empty(2 * H, D, dtype=bf16).chunk(2)
    fwd, bwd = gated_linear.gated_linear_fwd, gated_linear.gated_linear_bwd
    calls: dict[str, tuple[Any, ...]] = {
        "transposed": (fwd, x, wt.t(), w, None, None, "silu", True, True),
        "two boxes": (fwd, x, w, w, None, None, "silu", True, True),
        "g and u": (fwd, x, *halves, None, None, "silu", False, True),
        "transposed down": (bwd, x, w.t(), pair, "silu", None, True, True),
        "packed dgu": (bwd, x, wt, pair, "silu", "up_gate", False, True),
    }
    for variant, (launcher, *args) in calls.items():
        key = (launcher.__name__, 2)
        yield Job(arch, bf16, variant, functools.partial(launcher, *args), key)


def _elementwise_jobs(arch: Arch) -> Iterator[Job]:
    bwd, fwd = gated_act.gated_act_bwd, gated_act.gated_act_fwd
    for dtype in (torch.bfloat16, torch.float32):
        g = _empty(M, H, dtype=dtype)
        gate, up = _empty(M, 2 * H, dtype=dtype).chunk(2, 1)
        calls: dict[str, tuple[Any, ...]] = {
            "packed": (bwd, gate, gate, up, "silu", "up_gate"),
            "forward": (fwd, g, g, "silu"),
            "plain h": (linear_act.linear_act_h, g, "silu"),
            "plain dz": (linear_act.linear_act_dz, g, g, "silu"),
        }
        # Cheap to compile, and the same on every architecture: all activations on one.
        everywhere = dtype == torch.bfloat16 and arch.name == THOROUGH
        for name in ACTIVATIONS if everywhere else ("silu",):
            calls[name] = (bwd, g, g, g, name, None)
        for variant, (launcher, *args) in calls.items():
            yield Job(arch, dtype, variant, functools.partial(launcher, *args))


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
    is_gemm = name in ("_fwd_kernel", "_bwd_kernel", "_partial_kernel") and job.key is not None
    if is_gemm and job.dtype != torch.float32 and job.tile is not None:
        wanted = "HMMA" if job.tile.skinny else _MATRIX_OPCODE.get(job.arch.name, "HMMA")
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


def gate(
    arches: Sequence[str],
    every_activation: bool = False,
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> Iterator[Compiled]:
    """Compile and inspect kernels for `arches`, one result at a time: all, or the training launches
    of some GEMM `kernels` in some `dtypes`."""
    # Silu is in every job; gelu's erf needs the most registers.
    activations = [a for a in ACTIVATIONS if a != "silu"] if every_activation else ["gelu"]
    for name in arches:
        arch = ARCHES[name]
        jobs = (*_gemm_jobs(arch, activations), *_elementwise_jobs(arch))
        if name == THOROUGH:
            jobs += (*_odd_jobs(arch),)
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
    parser.add_argument(
        "--every-activation", action="store_true", help="compile matrix kernels with each of them"
    )
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
    for compiled in gate(args.arch, args.every_activation, args.kernel, args.dtype):
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
