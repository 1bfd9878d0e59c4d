"""`time`: forward, backward, both, and peak memory, of this library, eager, torch.compile and every
baseline found.

What makes two numbers comparable here: one process, one GPU, the same random values, buffers
rotated past the L2 cache, CUDA graphs for short calls, rounds that interleave everyone and cuBLAS,
clocks on record. An op whose check fails on this device gets no speed; neither does a baseline that
computes something else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ...backends import choice
from ...progress import Progress
from ...testing import CASES
from .. import machine, rooms
from ..check import inputs_of
from ..lost import DeviceLost
from ..options import (
    INTERRUPTED,
    PROG,
    Emit,
    Record,
    Refusal,
    add_selection,
    chosen_activations,
    collecting,
    count,
    subparser,
    write_json,
)
from ..render import number, percent, say, say_command, size, table
from ..rivals import RIVALS
from ..work import DGLU, PHASES
from .clock import CudaTimer, Timer, clock_range
from .session import PLAIN_CASES, Options, Session, plan

# What a narrow terminal does without, the least needed first.
DROP = ("activation", "GB/s", "20-80%", "of copy", "peak memory", "dtype", "TFLOP/s", "of cuBLAS")


class NothingTimed(Refusal):
    """There is no GPU to time on."""


def require_gpu() -> None:
    """Raise NothingTimed where no time could mean anything."""
    if choice.INTERPRETED:
        raise NothingTimed(
            "nothing was timed: TRITON_INTERPRET is set, and an interpreter has no speed"
        )
    if not torch.cuda.is_available():
        raise NothingTimed(
            f"nothing was timed: torch finds no GPU; {PROG} predict computes what it can"
        )


def run(options: Options, emit: Emit, timer: Timer | None = None) -> list[int]:
    """Time everything, one record each as it is ready; returns the SM clocks seen in between.

    Raises NothingTimed without a GPU, and DeviceLost once all records are emitted if some say that
    they were not run.
    """
    if timer is None:
        require_gpu()
        timer = CudaTimer()
    session = Session(options, emit, timer)
    works = plan(options)
    with timer.session(), Progress("time", len(works)) as progress:
        session.time_copy()
        for work in works:
            session.time(work)
            progress.step(f"{work.case.name} {work.size}")
            _free()
        if session.lost is not None:
            raise DeviceLost(session.lost)
    return session.clocks


def _free() -> None:
    """Give one work's buffers and graphs back before the next asks for its own."""
    inputs_of.cache_clear()
    gc.collect()
    if "torch._inductor.compile_fx" in sys.modules:  # something was compiled
        # Or the next sizes would count as recompilations, and end as refusals.
        torch.compiler.reset()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # it was lost, as the records say
            torch.cuda.empty_cache()


def go_on(options: Options, records: Sequence[Record]) -> None:
    """Say what an interrupt left untimed, and how to time it."""
    timed = {(r["case"], r["M"], r["D"], r["H"]) for r in records if r["kind"] == "time"}
    works = [(work.case.name, work.M, work.D, work.H) for work in plan(options)]
    left = dict.fromkeys(case for case, *size in works if (case, *size) not in timed)
    if left:
        say_command("Go on with the same arguments and:", ["--case", *left])
    else:
        say("All sizes have times; the last may lack some of its providers.")


def show(records: Sequence[Record]) -> None:
    """The table of times, then why whatever is missing was not timed."""
    timed = [r for r in records if r["kind"] == "time" and r["skipped"] is None]
    for peak in (r for r in records if r["kind"] == "peak" and r["name"] == "copy"):
        print(f"device copy: {number(peak['gbps'])} GB/s")
    if timed:
        rows = [
            [
                r["case"], r["activation"], r["dtype"], f"{r['M']}x{r['D']}x{r['H']}", r["phase"],
                r["provider"], number(r["median_ms"]),
                f"{number(r['q20_ms'])}-{number(r['q80_ms'])}", number(r["tflops"]),
                percent(r["of_cublas"]), number(r["gbps"]), percent(r["of_copy"]),
                size(r["peak_memory_bytes"]),
            ]
            for r in timed
        ]  # fmt: skip
        header = (
            "case", "activation", "dtype", "M x D x H", "phase", "provider", "median ms", "20-80%",
            "TFLOP/s", "of cuBLAS", "GB/s", "of copy", "peak memory",
        )  # fmt: skip
        table("Times measured on this GPU", header, rows, drop=DROP)
    reasons = dict.fromkeys(
        f"{r['provider']}, {r['case']} {r['phase']}: {r['skipped']}"
        for r in records
        if r["kind"] == "time" and r["skipped"] is not None
    )
    if reasons:
        print("\nNot timed:", *reasons, sep="\n  ")


def options_of(args: argparse.Namespace) -> Options:
    """What `time` and `predict` share of their command lines."""
    chosen: dict[str, Any] = {
        "activations": chosen_activations(args),
        "shapes": tuple(args.shape),
        "phases": tuple(args.phase),
    }
    if args.case or args.op:
        of_ops = (case for case in PLAIN_CASES if CASES[case].op in (args.op or ()))
        chosen["cases"] = (*(args.case or ()), *of_ops)
    elif args.model:
        chosen["cases"] = None
    if args.dtype:
        chosen["dtypes"] = tuple(args.dtype)
    if args.model:
        chosen["widths"] = tuple((m.D, m.H, m.name) for m in args.model)
    if args.m:
        chosen["tokens"] = tuple(args.m)
    return Options(**chosen)


def add_sizes(
    parser: argparse.ArgumentParser, phases: Sequence[str], choices: Sequence[str] = PHASES
) -> None:
    """The arguments that `options_of` reads."""
    add_selection(parser, "the plain case of each of these ops")
    parser.add_argument("--m", nargs="+", type=count, metavar="M", help="tokens in a call")
    parser.add_argument("--phase", nargs="+", choices=choices, default=phases)


def main(args: argparse.Namespace) -> int:
    options = dataclasses.replace(
        options_of(args),
        rounds=args.rounds,
        keep_samples=args.keep_samples,
        providers=tuple(args.provider or ()),
        without=tuple(args.without),
    )
    records: list[Record] = []
    found = machine.describe() if args.json or args.base else {}
    if args.base is not None:
        base = rooms.load("campaign.base", "time --base")
        require_gpu()
        return int(base.main(args.base, options, args.json, found))
    interrupted, lost = False, None
    try:
        found["sm_clocks_while_timing"] = clock_range(run(options, collecting(records)))
    except NothingTimed:
        write_json(args.json, found, records)
        raise
    except DeviceLost as error:
        lost = error
    except KeyboardInterrupt:
        interrupted = True
    show(records)
    seen = found.get("sm_clocks_while_timing") or "could not be read"
    print("\nInterrupted." if interrupted else f"\nSM clocks between rounds: {seen}")
    if interrupted:
        go_on(options, records)
    write_json(args.json, found, records)
    failed = any(r["kind"] == "check" and not r["passed"] for r in records)
    if lost is not None:
        print(f"Ended early: {lost}", file=sys.stderr)
        failed = True
    return INTERRUPTED if interrupted else int(failed)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "time", "times and peak memory beside eager, torch.compile and other baselines",
        (
            "time",
            "time --op gated_mlp --model llama3-8b qwen3-8b --m 1 16 2048 8192",
            "time --case gated_linear --shape 8192x4096x14336 --provider fusedmlp quack",
            "time --op gated_mlp --base HEAD~1",
            "time --case gated_mlp --phase dglu --provider fusedmlp fusedmlp-cuda eager",
            "time --json times.json",
        ),
        main,
    )  # fmt: skip
    add_sizes(parser, PHASES, (*PHASES, DGLU))
    parser.add_argument(
        "--provider", nargs="+", choices=RIVALS, metavar="NAME",
        help=f"default: those that serve the op, of {', '.join(RIVALS)}",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="+", choices=RIVALS, default=(), metavar="NAME",
        help="providers to leave out",
    )  # fmt: skip
    parser.add_argument("--rounds", type=count, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--base", metavar="REF", help="time this checkout against that commit, fusedmlp only"
    )
    parser.add_argument(
        "--keep-samples", action="store_true", help="keep every sample in the records"
    )
