"""What a plan will launch of our Triton kernels: pieces of work by step, without their rivals."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

from .. import check, cli
from ..check_sizes import ON_GPU
from ..timing import command as timing
from ..timing.calls import checked
from ..timing.session import plan
from ..variants import DEFAULT
from ..work import Work, activations_of, case_of
from .questions import HALVES
from .steps import COMMAND, Step
from .worker import SMALL


@dataclasses.dataclass(frozen=True)
class Launched:
    """phases: of `work`, as in bench/work.py."""

    work: Work
    phases: tuple[str, ...]


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


def launched(step: Step) -> Iterator[Launched]:
    """What `step` launches; nothing for one that builds, tests, or searches among tiles."""
    module, *rest = step.argv[2:]
    if module == COMMAND and rest[0] in ("check", "time"):
        args = cli.parser().parse_args(rest)
        yield from (_check if rest[0] == "check" else _time)(args)
    elif rest[0] == "sanitize" and rest[3:] == ["triton"]:
        yield from _case(rest[2], SMALL)
    elif rest == ["ask", "narrow-halves"]:
        yield from _case("hyper_attention", HALVES)


def all_launched(steps: Sequence[Step]) -> list[Launched]:
    """Each once."""
    return list(dict.fromkeys(one for step in steps for one in launched(step)))
