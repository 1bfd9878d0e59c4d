"""Execute every compiled Triton kernel on the PTX machine, without a GPU, and judge its numbers.

    python -m fusedmlp.bench gate execute [--brief] [--arch NAME ...] [--match REGEX]
        [--json FILE [--resume]]

Each tile of each row of kernels/arch is run by its launcher, and each Case by its public function,
forward and backward, on CPU tensors: Triton compiles for the GPU, and the PTX runs in several
orders of what the hardware leaves open (bench/gate/ptx/README.md). A row fails where the machine
finds a fault, where an error passes the tolerance rule's bound, and where two orders give other
bits.

--brief takes one architecture of each instruction that multiplies, bfloat16, one tile of each kind,
and of the Cases one size on the architecture that the tiles are made for. Without it everything is
run, and a tile or a kernel that nothing executed is a failure too.

--json FILE has the rows as they come, also where the command is stopped. With --resume it goes on
from FILE: jobs that passed there, in all orders that are asked for now, are not executed again, and
the verdict is of all rows. Rows of other code, Triton or PyTorch are refused. --brief has fewer
orders, so that its rows do not count in a whole run. Rows of other --arch and --match stay in FILE:
a whole run can be made of parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import triton

from ....kernels.arch import ARCHES, Arch
from ...options import INTERRUPTED, Refusal, writable
from ...process import end_on_sigterm
from ..ptx import Order
from ..ptx.library import MachineError, machine
from . import coverage, kept
from .executing import ORDERS, Executed, execute
from .jobs import Job, jobs_of, rows_with_tensor_cores
from .processes import side_by_side

__all__ = ["add_arguments", "run"]

# Late, by seed, and with other sums: "once" differs from these in no wait.
BRIEF_ORDERS = (ORDERS[0], ORDERS[2], ORDERS[3])
WRITE_S = 2.0  # from one writing of --json to the next


@functools.cache
def _jobs(arch: str) -> tuple[Job, ...]:
    return tuple(jobs_of(ARCHES[arch]))


def _work(asked: tuple[str, int, bool]) -> list[Executed]:
    """One job in any process: each enumerates them alike."""
    arch, index, brief = asked
    torch.set_num_threads(1)
    return execute(_jobs(arch)[index], _orders(brief))


def _orders(brief: bool) -> tuple[Order, ...]:
    return BRIEF_ORDERS if brief else ORDERS


def chosen(names: Sequence[str] | None, brief: bool) -> list[Arch]:
    if names:
        return [ARCHES[name] for name in names]
    rows = rows_with_tensor_cores()
    if not brief:
        return rows
    return list({row.mma: row for row in reversed(rows)}.values())[::-1]


def wanted(arches: Sequence[Arch], brief: bool, match: str) -> dict[str, tuple[str, int, bool]]:
    """Name of a job -> what `_work` takes."""
    found = {
        job.name: (arch.name, index, brief)
        for arch in arches
        for index, job in enumerate(_jobs(arch.name))
        if (job.brief or not brief) and re.search(match, job.name)
    }
    if not found:
        raise Refusal(f"no job matches {match!r}: it is searched in names like {_example(arches)}")
    return found


def executed(asked: Iterable[tuple[str, int, bool]], processes: int) -> Iterator[list[Executed]]:
    """Rows as they are done."""
    if processes == 1:
        yield from map(_work, asked)
        return

    def shared(one: tuple[str, int, bool]) -> tuple[object, ...]:
        job = _jobs(one[0])[one[1]]
        return one[0], job.covers[0][0], job.what == "tile"

    # Jobs of one kernel or Case launch much the same kernels: one process compiles them once.
    groups = [list(group) for _, group in itertools.groupby(asked, shared)]
    yield from side_by_side(groups, processes, _work)


@dataclasses.dataclass
class Rows:
    """Rows by their job, of earlier runs too. orders: those of this run, in which a row must have
    run to be judged."""

    orders: frozenset[str]
    by_job: dict[str, list[Executed]] = dataclasses.field(default_factory=dict)

    def add(self, rows: Iterable[Executed]) -> None:
        """Rows of whole jobs, which take the place of what there was of them."""
        for name, own in itertools.groupby(rows, lambda row: row.job):
            self.by_job[name] = list(own)

    def of(self, jobs: Iterable[str]) -> list[Executed]:
        found = (row for name in jobs for row in self.by_job.get(name, ()))
        return [row for row in found if self.orders <= set(row.orders)]

    def passed(self, job: str) -> bool:
        own = self.of([job])
        return bool(own) and all(row.passed for row in own)

    def write(self, path: str, arches: Sequence[Arch], asked: Iterable[str]) -> None:
        every = itertools.chain.from_iterable(self.by_job.values())
        kept.write(path, every, coverage.missing(arches, self.of(asked)))


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


def _replaceable(text: str) -> str:
    """The path of a file that os.replace may put another in the place of."""
    path = os.path.realpath(writable(text))
    if (os.path.exists(path) and not os.path.isfile(path)) or not os.access(
        os.path.dirname(path), os.W_OK
    ):
        raise argparse.ArgumentTypeError(f"must be a file that can be replaced; got {text!r}")
    return path


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
    parser.add_argument(
        "--json", metavar="FILE", type=_replaceable, help="also write records to FILE, as they come"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what passed in the FILE of --json"
    )


def run(args: argparse.Namespace) -> int:
    """Execute, print and write; 1 where a row has a finding or something was not covered."""
    if triton.knobs.runtime.interpret:
        raise Refusal("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    if args.resume and not args.json:
        raise Refusal("--resume goes on from the FILE of --json, which is not given")
    try:
        machine()
    except MachineError as error:
        raise Refusal(str(error)) from None
    end_on_sigterm()
    start = time.perf_counter()
    arches = chosen(args.arch, args.brief)
    asked = wanted(arches, args.brief, args.match)
    rows = Rows(frozenset(map(str, _orders(args.brief))))
    if args.resume:
        rows.add(kept.read(args.json))
    left = [one for name, one in asked.items() if not rows.passed(name)]
    print(f"triton {triton.__version__}, {', '.join(arch.name for arch in arches)}")
    if args.resume:
        print(f"{len(asked) - len(left)} of {len(asked)} jobs passed in {args.json} before")
    print(
        f"{'':5} {'arch':7} {'kernel':36} {'dtype':9} {'what':10} {'tile':44} "
        f"{'nearest':12} {'share':>5} {'warp instr':>10} {'run':>7}"
    )
    interrupted = False
    written = start
    try:
        for some in executed(left, max(1, args.processes)):
            rows.add(some)
            print("\n".join(map(_line, some)), flush=True)
            if args.json and time.perf_counter() - written > WRITE_S:
                rows.write(args.json, arches, asked)
                written = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    finally:  # whatever ends it
        if args.json:
            rows.write(args.json, arches, asked)
    judged = rows.of(asked)
    whole = not (args.brief or args.match)
    uncovered = coverage.missing(arches, judged)
    faulty = [row for row in judged if not row.passed]
    for line in uncovered if whole and not interrupted else ():
        print(f"not executed: {line}")
    print(
        f"{len(judged)} rows executed, {len(faulty)} with findings, "
        f"{len(uncovered)} tiles and kernels not among them, {time.perf_counter() - start:.0f} s"
    )
    if interrupted:
        print("interrupted" + (f": --resume goes on from {args.json}" if args.json else ""))
        return INTERRUPTED
    return 1 if faulty or (whole and uncovered) else 0
