"""What a plan will launch of our Triton kernels: pieces of work by step, without their rivals, the
tiles that a search times first, and the tests that need a GPU."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ...dry.driver import MULTIPROCESSORS
from ...kernels.arch import Arch
from ...kernels.arch.tile import Tile
from ...kernels.device import pretend
from .. import check, cli
from ..check_sizes import ON_GPU
from ..timing import command as timing, tune
from ..timing.calls import checked
from ..timing.candidates import neighbours
from ..timing.session import plan
from ..variants import DEFAULT
from ..work import DTYPES, Work, activations_of, case_of
from .questions import HALVES
from .steps import COMMAND, Step
from .worker import SMALL, gpu_tests


@dataclasses.dataclass(frozen=True)
class Launched:
    """phases: of `work`, as in bench/work.py."""

    work: Work
    phases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Searched:
    """One tile of a search, and the shapes that it is timed at."""

    kernel: str
    dtype: str
    tile: Tile
    shapes: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the tests that need a GPU launch; pytest's selection of them."""

    selection: tuple[str, ...]


One = Launched | Searched | Tested


def _whole(work: Work) -> tuple[str, ...]:
    return ("forward",) if work.case.forward_only else ("both",)


def _check(args: argparse.Namespace) -> Iterator[Launched]:
    if args.backend == "cuda":
        return
    for work in check.plan(check.options_of(args), ON_GPU):
        yield Launched(work, ("forward",) if args.forward_only else _whole(work))


def _time(args: argparse.Namespace) -> Iterator[Launched]:
    if args.provider and DEFAULT not in args.provider:
        return
    for work in plan(timing.options_of(args)):
        yield Launched(checked(work), _whole(work))
        yield Launched(work, tuple(args.phase))


def _case(name: str, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Launched]:
    case = case_of(name)
    for size in sizes:
        work = Work(case, activations_of(case, None)[0], "bfloat16", *size)
        yield Launched(work, _whole(work))


def _tune(args: argparse.Namespace, arch: Arch) -> Iterator[Searched]:
    """The table's tiles and their neighbours, as far as the search's limit: what it times before
    its results lead it on."""
    options = tune.options_of(args)
    with pretend(arch, MULTIPROCESSORS):
        for kernel in options.kernels:
            for name in options.dtypes:
                shapes = tune.shapes_of(options, kernel)
                for row in tune.rows_of(kernel, DTYPES[name], shapes, torch.device("cpu")):
                    around = neighbours(row.tile, arch, kernel, row.dtype.itemsize)
                    for tile in (row.tile, *around)[: options.limit]:
                        yield Searched(kernel, name, tile, row.shapes)


def launched(step: Step, arch: Arch) -> Iterator[One]:
    """What `step` launches on a GPU of `arch`; nothing for one that builds."""
    module, *rest = step.argv[2:]
    if module == COMMAND and rest[0] == "tune":
        yield from _tune(cli.parser().parse_args(rest), arch)
    if module == COMMAND and rest[0] in ("check", "time"):
        args = cli.parser().parse_args(rest)
        yield from (_check if rest[0] == "check" else _time)(args)
    elif rest[0] == "sanitize" and rest[3:] == ["triton"]:
        yield from _case(rest[2], SMALL)
    elif rest == ["ask", "narrow-halves"]:
        yield from _case("hyper_attention", HALVES)
    elif rest[0] == "tests":
        yield Tested(gpu_tests(*rest[1:]))


def all_launched(steps: Sequence[Step], arch: Arch) -> list[One]:
    """Each once."""
    return list(dict.fromkeys(one for step in steps for one in launched(step, arch)))
