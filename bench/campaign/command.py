"""Everything a borrowed GPU should do, the most valuable first, inside a time box.

    fusedmlp bench campaign [--plan NAME] [--only REGEX] [--minutes N] [--out DIR] [--dry-run]

Right answers, speeds, sound memory, the tests, better tiles (plans.py): one process per step. Each
record lies in the ledger within a moment of being found. The same command with the same --out goes
on where the last one stopped. docs/device.md is the page for whoever borrows a GPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import process
from ..gate.cache import extension_is_carried, take
from ..options import Refusal, add_json, positive, subparser, write_json
from ..render import say, table
from ..report.ledger import RESULTS, Ledger
from ..report.summary import summary
from .plans import PLANS, START_S, SUMMARY_S, expected_s, only, timetable
from .resume import open_ledger, readable, source_hash
from .runner import Box, process_age_s, run_campaign
from .steps import WORKER, Step, python_step
from .worker import ROOT


def discover() -> dict[str, Any]:
    """This machine, asked of a child: a CUDA context here would hold memory all along."""
    asking = python_step("environment", 180, WORKER, "environment")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        found: list[dict[str, Any]] = []
        outcome = process.run(asking.argv, asking.budget_s, found.extend, log, cwd=ROOT)
    if outcome.status != "ok":
        raise Refusal(f"campaign cannot describe this machine: {outcome.detail}")
    return {**found[0]["machine"], "source": source_hash()}


def dry_run(steps: Sequence[Step], minutes: float, out: Path) -> None:
    """What would run: step, worth, expected seconds, needs; and where results would go."""
    first = ["0", "-", "environment", f"{START_S:.0f}", "180", "a GPU", "what was measured where"]
    rows = [first] + [
        [f"{begin:.0f}", step.stage or "-", step.name, f"{step.expected_s:.0f}",
         f"{step.budget_s:.0f}", step.needs or step.module or "-", step.worth or "-"]
        for step, begin, _ in timetable(steps)
    ]  # fmt: skip
    header = ("at, s", "stage", "step", "expected s", "limit s", "needs", "worth")
    table("The steps, in their order", header, rows, drop=("limit s", "stage", "worth", "needs"))
    total = expected_s(steps)
    print()
    say(
        f"{len(steps)} steps, {total:.0f} s expected, start ({START_S:.0f} s) and summary "
        f"({SUMMARY_S:.0f} s) included, of a box of {60 * minutes:.0f} s"
    )
    print(f"results: {out}/<gpu>-<date>-<commit>.json, .log and .txt")


def _refuse_small_box(steps: Sequence[Step], minutes: float) -> None:
    least = START_S + steps[0].expected_s + SUMMARY_S
    if 60 * minutes < least:
        raise Refusal(
            f"--minutes {minutes:g} is too short for the first step, {steps[0].name}: give "
            f"{least / 60:.1f} or more"
        )


def _ended_well(ledger: Ledger) -> bool:
    return not any(step["status"] in ("failed", "killed") for step in ledger.steps)


def main(args: argparse.Namespace) -> int:
    """0: all that ran is ok; 1: some is not; 2: nothing was run or written; 130: interrupted."""
    plan = PLANS[args.plan]
    minutes = plan.minutes if args.minutes is None else args.minutes
    steps = only(plan.steps(), args.only)
    _refuse_small_box(steps, minutes)
    if args.dry_run:
        dry_run(steps, minutes, args.out)
        return 0
    box = Box(minutes, process_age_s())
    if args.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(take(args.cache))
    extension_is_carried()  # or it is refused, before anything has begun
    machine = discover()
    if not machine.get("gpu"):
        raise Refusal(
            "campaign needs a GPU, and torch finds none: nothing was run or written; --dry-run "
            "shows the plan"
        )
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    known = readable([args.out, RESULTS], say)
    ledger = open_ledger(machine, steps, args.out, known)
    others = [other for other in known if other.path != ledger.path]
    say(f"campaign: {ledger.gpu}, commit {ledger.commit}, {minutes:g} minutes, into {ledger.path}")
    code = 0
    try:
        run_campaign(ledger, steps, box, others, say)
    except KeyboardInterrupt:
        code = 130
    print("\n".join(summary(ledger)))
    write_json(args.json, ledger.machine, ledger.records)
    return code or int(not _ended_well(ledger))


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "campaign",
        "check, build, time, test, sanitize and tune on this GPU, into one ledger",
        (
            "campaign --dry-run",
            "campaign --cache build/carry --out results   # the same --out again: goes on",
            "campaign --plan rerun --only gated   # after a fix",
        ),
        main,
    )
    about = "; ".join(f"{p.name} ({p.minutes:g} minutes), {p.about}" for p in PLANS.values())
    parser.add_argument("--plan", choices=PLANS, default="brief", help=f"{about}; default: brief")
    parser.add_argument(
        "--only", metavar="REGEX", help="the steps whose name it finds, and those that they need"
    )
    parser.add_argument(
        "--minutes", type=positive, metavar="N",
        help="time box, from the start of this process to its end; default: the plan's",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR",
        help="folder of the ledger; the same folder again goes on (default: bench/results)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="DIR",
        help="compiled kernels, carried from where `gate fill-cache DIR` ran; or DIR.tar.xz",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and run nothing; needs no GPU"
    )
    add_json(parser)
