"""Execute every compiled Triton kernel on the PTX machine, without a GPU, and judge its numbers.

    python -m fusedmlp.bench gate execute [--brief] [--arch NAME ...] [--match REGEX] [--json FILE]

Each tile of each row of kernels/arch is run by its launcher, and each Case by its public function,
forward and backward, on CPU tensors: Triton compiles for the GPU, and the PTX runs in several
orders of what the hardware leaves open (bench/gate/ptx/README.md). A row fails where the machine
finds a fault, where an error passes the tolerance rule's bound, and where two orders give other
bits.

--brief takes one architecture of each instruction that multiplies, bfloat16, one tile of each kind,
and of the Cases one size on the architecture that the tiles are made for. Without it everything is
run, and a tile or a kernel that nothing executed is a failure too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import triton

from ....kernels.arch import ARCHES, Arch
from ...options import Refusal, writable
from ..ptx.library import MachineError, machine
from . import coverage
from .executing import ORDERS, Executed, execute
from .jobs import Job, jobs_of, rows_with_tensor_cores

__all__ = ["add_arguments", "run"]

# Late, by seed, and with other sums: "once" differs from these in no wait.
BRIEF_ORDERS = (ORDERS[0], ORDERS[2], ORDERS[3])


@functools.cache
def _jobs(arch: str) -> tuple[Job, ...]:
    return tuple(jobs_of(ARCHES[arch]))


def _work(arch: str, index: int, brief: bool) -> list[Executed]:
    """One job in a process of the pool, which enumerates them as this one does."""
    torch.set_num_threads(1)
    return execute(_jobs(arch)[index], BRIEF_ORDERS if brief else ORDERS)


def chosen(names: Sequence[str] | None, brief: bool) -> list[Arch]:
    if names:
        return [ARCHES[name] for name in names]
    rows = rows_with_tensor_cores()
    if not brief:
        return rows
    return list({row.mma: row for row in reversed(rows)}.values())[::-1]


def executed(
    arches: Sequence[Arch], brief: bool, match: str, processes: int
) -> Iterator[list[Executed]]:
    """Rows as they are done."""
    wanted = [
        (arch.name, index)
        for arch in arches
        for index, job in enumerate(_jobs(arch.name))
        if (job.brief or not brief) and re.search(match, job.name)
    ]
    if not wanted:
        raise Refusal(f"no job matches {match!r}: it is searched in names like {_example(arches)}")
    if processes == 1:
        for name, index in wanted:
            yield _work(name, index, brief)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        for done in as_completed(pool.submit(_work, *one, brief) for one in wanted):
            yield done.result()


def _example(arches: Sequence[Arch]) -> str:
    return repr(_jobs(arches[0].name)[-1].name)


def _line(row: Executed) -> str:
    share = row.error / row.bound if row.bound else 0.0
    verdict = "ok" if row.passed else "FAULT"
    return (
        f"{verdict:5} {row.arch:7} {row.kernel:36} {row.dtype:9} {row.what:10} {row.tile:44} "
        f"{row.result:12} {share:5.2f} {row.instructions:10} {row.run_s:7.2f} s"
        + "".join(f"\n      {line}" for line in row.findings)
    )


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression: {error}") from None
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--brief", action="store_true", help="one job of each kind")
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="default: as said above")
    parser.add_argument(
        "--match", metavar="REGEX", type=_pattern, default="", help="only jobs whose name it finds"
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="how many run side by side; default: one for each core",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=writable, help="also write records to FILE")


def run(args: argparse.Namespace) -> int:
    """Execute, print and write; 1 where a row has a finding or something was not covered."""
    if triton.knobs.runtime.interpret:
        raise Refusal("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    try:
        machine()
    except MachineError as error:
        raise Refusal(str(error)) from None
    start = time.perf_counter()
    arches = chosen(args.arch, args.brief)
    print(f"triton {triton.__version__}, {', '.join(arch.name for arch in arches)}")
    print(
        f"{'':5} {'arch':7} {'kernel':36} {'dtype':9} {'what':10} {'tile':44} "
        f"{'nearest':12} {'share':>5} {'warp instr':>10} {'run':>7}"
    )
    rows: list[Executed] = []
    for some in executed(arches, args.brief, args.match, max(1, args.processes)):
        rows += some
        print("\n".join(map(_line, some)), flush=True)
    whole = not (args.brief or args.match)
    uncovered = coverage.missing(arches, rows)
    faulty = [row for row in rows if not row.passed]
    for line in uncovered if whole else ():
        print(f"not executed: {line}")
    print(
        f"{len(rows)} rows executed, {len(faulty)} with findings, "
        f"{len(uncovered)} tiles and kernels not among them, {time.perf_counter() - start:.0f} s"
    )
    if args.json:
        records = [dataclasses.asdict(row) for row in rows]
        content = {"triton": triton.__version__, "records": records, "not_executed": uncovered}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
    return 1 if faulty or (whole and uncovered) else 0
