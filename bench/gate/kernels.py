"""The ahead-of-time gate: compile every Triton kernel for every architecture, with no GPU, and look
inside.

    python -m fusedmlp.bench.gate.kernels [--arch NAME ...] [--brief] [--json FILE]

The real launchers run on CPU tensors of real model sizes under a driver that only compiles, so each
kernel is specialised just as it would be on the GPU. Of each machine-code file the gate reads
registers, stack (spills), shared and tensor memory and the opcode that multiplies, and fails on a
spill, on memory that the GPU does not have, on a matrix kernel without its tensor-core or TMA
instructions, on a grid that no GPU launches, and on instructions that are known to go wrong
(hazards.py).

Every row of kernels/arch is compiled for. --brief leaves out a row that resembles an older one: the
same tiles, instructions and family; the older one's kernels must then fit its shared memory too.
--arch names any row. A row that the installed Triton cannot compile for is left out in one line, or
refused where --arch names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import torch
import triton

from ...kernels.arch import ARCHES, Arch
from ...reference.activations import ACTIVATIONS
from ..options import INTERRUPTED, Refusal, activation, writable, write_text
from ..render import width_of
from ..work import DTYPES
from .compiling import captured, unknown
from .inspecting import Compiled, inspect
from .jobs import Job, jobs_of


def distinct(arches: Iterable[Arch]) -> Iterator[Arch]:
    """The oldest of rows that resemble each other, with the least shared memory of them all."""
    left = sorted(arches, key=lambda arch: arch.capability)
    while left:
        first = left[0]
        alike = [arch for arch in left if arch.resembles(first)]
        left = [arch for arch in left if not arch.resembles(first)]
        yield dataclasses.replace(first, shared_memory=min(arch.shared_memory for arch in alike))


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
        kind = (launcher, *((tile.loads, tile.skinny, tile.few, job.variant) if tile else ()))
        if kind not in seen:
            seen.add(kind)
            yield job


def gate(
    arches: Iterable[Arch],
    activations: Sequence[str] = ("gelu", "situ"),
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    brief: bool = False,
) -> Iterator[Compiled]:
    """Compile and inspect kernels for `arches`, one result at a time: all, `brief_of` all, or the
    training launches of some `kernels` in some `dtypes` (of one without any, all its launches).
    activations: what the first tiles are compiled with beside silu, which is in every job: gelu's
    erf and situ's two tanh need the most registers."""
    for arch in arches:
        jobs = tuple(jobs_of(arch, list(activations)))
        if brief:
            jobs = tuple(brief_of(jobs))
        if kernels:
            names = dict.fromkeys(job.name for job in jobs)
            if strangers := [name for name in kernels if name not in names]:
                raise Refusal(f"--kernel must be of {', '.join(names)}; got {', '.join(strangers)}")
            wanted = [getattr(torch, d) for d in dtypes]
            asked = [j for j in jobs if j.name in kernels and (not wanted or j.dtype in wanted)]
            trained = {job.name for job in asked if job.variant == "train"}
            jobs = tuple(j for j in asked if j.variant == "train" or j.name not in trained)
        for job in jobs:
            for launched in captured(job):
                yield inspect(job, *launched)


def _row(c: Compiled) -> str:
    return (
        f"{c.arch:7} {c.kernel:34} {c.dtype:9} {c.variant:11} {c.tile:44} "
        f"{c.registers:4} {c.stack:5} {c.shared:7}  {' '.join(c.opcodes):30} {'; '.join(c.faults)}"
    )


def _fitting(row: str) -> str:
    """A row that a terminal breaks nowhere but between two fields."""
    width = width_of(sys.stdout)
    return (
        "\n    ".join(textwrap.wrap(" ".join(row.split()), width - 4)) if len(row) > width else row
    )


def chosen(names: Sequence[str] | None, brief: bool) -> list[Arch]:
    """The rows to compile for. Refusal where `names` has one that Triton's tools do not know."""
    if names:
        for name in names:
            if why := unknown(ARCHES[name]):
                raise Refusal(f"{why}: use a newer Triton, or another --arch")
        return [ARCHES[name] for name in names]
    able = []
    for arch in ARCHES.values():
        if why := unknown(arch):
            print(f"{arch.name} is not compiled: {why}")
        else:
            able.append(arch)
    if not brief:
        return able
    firsts = list(distinct(able))
    for first in firsts:
        alike = [a.name for a in able if a.resembles(first) and a.name != first.name]
        if alike:
            print(f"{first.name} stands for {', '.join(alike)} too")
    return firsts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="default: as said above")
    parser.add_argument(
        "--activation", nargs="+", metavar="NAME", type=activation, default=("gelu", "situ"),
        help="compile matrix kernels with these beside silu, or with all; default: gelu and situ",
    )  # fmt: skip
    parser.add_argument("--brief", action="store_true", help="one job of each kind of launch")
    parser.add_argument(
        "--kernel", nargs="+", default=(), help="only the training launches of these kernels"
    )
    parser.add_argument("--dtype", nargs="+", default=(), choices=DTYPES,
                        help="with --kernel: in these dtypes")  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write every row to FILE"
    )


def run(args: argparse.Namespace) -> int:
    """Compile, inspect and print; 1 where a kernel has a fault."""
    if triton.knobs.runtime.interpret:
        raise Refusal("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    print(f"triton {triton.__version__}")
    arches = chosen(args.arch, args.brief)
    print(
        _fitting(
            f"{'arch':7} {'kernel':34} {'dtype':9} {'variant':11} {'tile':44} "
            f"{'regs':>4} {'stack':>5} {'shared':>7}  {'opcodes':30} faults"
        )
    )
    rows = []
    asked = ACTIVATIONS if "all" in args.activation else args.activation
    beside = [name for name in asked if name != "silu"]
    interrupted = False
    try:
        for compiled in gate(arches, beside, args.kernel, args.dtype, args.brief):
            rows.append(compiled)
            print(_fitting(_row(compiled)), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    faulty = [c for c in rows if c.faults]
    print(f"{len(rows)} kernels compiled, {len(faulty)} with faults")
    if args.json:
        text = json.dumps([dataclasses.asdict(c) for c in rows], indent=1)
        write_text(args.json, text + "\n")
    if interrupted:
        print("Interrupted: the rest was not compiled; --arch and --kernel choose a part.")
        return INTERRUPTED
    return 1 if faulty else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except Refusal as refusal:
        print(f"fusedmlp.bench.gate.kernels: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
