"""What a machine-code file says of its kernel, and what is wrong with it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...kernels.arch.assembler import assembler
from . import hazards
from .jobs import Job


@dataclass(frozen=True)
class Compiled:
    """One machine-code file and what was found in it. tensor_memory: columns."""

    kernel: str
    arch: str
    dtype: str
    tile: str
    variant: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    opcodes: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Code:
    """waits: for wgmma; products: of wgmma; hazards: whatever it is."""

    registers: int
    stack: int
    spills: bool
    waits: int
    products: int
    opcodes: tuple[str, ...]
    hazards: tuple[str, ...]


# What multiplies 16-bit tiles; skinny tiles use mma.sync everywhere.
OPCODE = {"mma.sync": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTCHMMA"}
_OPCODES = (*OPCODE.values(), "FFMA", "UTMALDG", "UTMASTG")
_GEMMS = (
    "_fwd_kernel", "_bwd_kernel", "_partial_kernel",
    "_up_kernel", "_down_kernel", "_dh_kernel", "_wgrad_kernel", "_dx_kernel", "_dw_kernel",
    "_ds_kernel",
)  # fmt: skip


def tool(name: str, cubin: str, *flags: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *flags, cubin], capture_output=True, text=True, check=True).stdout


@functools.cache
def _read(cubin: bytes, ptxas: str) -> _Code:
    """Each distinct machine code is disassembled once: its instructions alone, without line tables
    and without the flow of control, which is half the work."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", file.name, "-res-usage")
        sass = tool("nvdisasm", file.name, "--print-code", "--no-dataflow")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    words = set(re.findall(r"\b[A-Z]+\b", sass))
    return _Code(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=not words.isdisjoint(("LDL", "STL")),
        waits=sass.count("WARPGROUP.DEPBAR"),
        products=sass.count("HGMMA."),
        opcodes=tuple(op for op in _OPCODES if op in words),
        hazards=tuple(hazards.in_code(sass, ptxas)),
    )


def _matrix_faults(job: Job, code: _Code) -> list[str]:
    """Which of the architecture's own instructions a kernel of 16-bit products lacks."""
    assert job.tile is not None
    faults = []
    # wgmma and tcgen05 multiply no fewer than 64 rows.
    wanted = OPCODE["mma.sync" if job.tile.block_m < 64 else job.arch.mma]
    if wanted not in code.opcodes:
        faults.append(f"no {wanted}")
    if job.tile.tma and "UTMALDG" not in code.opcodes:
        faults.append("no UTMALDG")
    # One wait a K step and some between tiles; as many as products means one after each.
    if job.tile.tma and code.waits and code.waits >= code.products:
        faults.append("serialised wgmma")
    return faults


def inspect(job: Job, name: str, kernel: Any, grid: Sequence[int] = ()) -> Compiled:
    """What was found in the PTX and in the machine code of one kernel that `job` launches over
    `grid`."""
    arch, ptxas = job.arch, assembler(job.arch.capability)
    code = _read(kernel.asm["cubin"], ptxas)
    shared, columns = kernel.metadata.shared, kernel.metadata.tmem_size or 0
    known = (*hazards.in_code(kernel.asm["ptx"], ptxas), *code.hazards)
    faults = list(dict.fromkeys(known)) + hazards.in_grid(grid)
    if code.stack or code.spills:
        faults.append(f"spills ({code.stack} bytes of stack)")
    if shared > arch.shared_memory:
        faults.append(f"shared memory {shared} > {arch.shared_memory}")
    if columns > arch.tensor_memory:
        faults.append(f"tensor memory {columns} > {arch.tensor_memory}")
    is_gemm = name in _GEMMS and job.key is not None
    if is_gemm and job.dtype != torch.float32 and job.tile is not None:
        faults += _matrix_faults(job, code)
    stem = job.key[0] if job.key else kernel.src.fn.__module__.rpartition(".")[2]
    return Compiled(
        kernel=f"{stem}:{name}",
        arch=arch.name,
        dtype=str(job.dtype).removeprefix("torch."),
        tile=str(job.tile) if job.tile else "as picked" if job.key else "elementwise",
        variant=job.variant,
        registers=code.registers,
        stack=code.stack,
        shared=shared,
        tensor_memory=columns,
        opcodes=code.opcodes,
        faults=tuple(faults),
    )
