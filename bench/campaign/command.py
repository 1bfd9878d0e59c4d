"""Everything a borrowed GPU should do, the most valuable first, inside a time box.

    fusedmlp bench campaign [--minutes N] [--out DIR]

check, the CUDA kernels, time, the test suite, compute-sanitizer, tune (steps.py): one process per
step, so that a crash, a hang or a poisoned CUDA context costs its own step, those that need it, and
no more. Each record lies in the ledger within a moment of being found. The same command with the
same --out goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import process
from ..options import add_json, subparser, write_json
from ..report.ledger import RESULTS, Ledger, LedgerError, create, load, save
from ..report.summary import summary
from .steps import WORKER, Step, plan, python_step
from .worker import ROOT

# How the detail of a step begins that did not get its chance; the next run takes it up.
OUT_OF_TIME = "out of time"
INTERRUPTED = "interrupted"
BLOCKED = "left out"
# With less time left a step would hardly have imported torch.
LEAST_S = 15


def source_hash(root: Path = ROOT) -> str:
    """The hash of all code that a number depends on: a dirty tree has no other name."""
    digest = hashlib.sha256()
    folders = ("fusedmlp", "kernels", "bench", "csrc")
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def discover() -> dict[str, Any]:
    """This machine, asked of a child: a CUDA context here would hold memory all along."""
    asking = python_step("environment", 180, WORKER, "environment")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        found: list[dict[str, Any]] = []
        outcome = process.run(asking.argv, asking.budget_s, found.extend, log, cwd=ROOT)
    if outcome.status != "ok":
        raise RuntimeError(f"campaign: cannot describe this machine: {outcome.detail}")
    return {**found[0]["machine"], "source": source_hash()}


def _readable(folders: Iterable[Path], say: Callable[[str], None]) -> list[Ledger]:
    """Every ledger there. A broken one is named and passed over: it must not cost a GPU's time."""
    ledgers = []
    for path in sorted({path.resolve() for folder in folders for path in folder.glob("*.json")}):
        try:
            ledgers.append(load(path))
        except LedgerError as error:
            say(f"campaign: passing over {error}")
    return ledgers


def _identity(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whose work it is: GPU, commit, code."""
    return machine["gpu"], machine.get("commit"), machine.get("source")


def _done(ledger: Ledger, name: str) -> dict[str, Any] | None:
    return next((s for s in ledger.steps if s["name"] == name), None)


def _ok(ledger: Ledger, name: str) -> bool:
    done = _done(ledger, name)
    return done is not None and done["status"] == "ok"


def _unstarted(ledger: Ledger, step: Step) -> bool:
    done = _done(ledger, step.name)
    return done is None or done["detail"].startswith((OUT_OF_TIME, INTERRUPTED, BLOCKED))


def _blocked(ledger: Ledger, step: Step) -> bool:
    """Was it left out before, for want of another?"""
    done = _done(ledger, step.name)
    return done is not None and done["detail"].startswith(BLOCKED)


def _failed(ledger: Ledger, step: Step) -> bool:
    """Failed on its own: worth another try, after everything that has had none."""
    bad = any(s["name"] == step.name and s["status"] in ("failed", "killed") for s in ledger.steps)
    return bad and not _unstarted(ledger, step)


def order(ledger: Ledger, steps: Sequence[Step], others: Iterable[Ledger]) -> list[Step]:
    """What is left to do: first what no GPU has done with this code, by worth within each half."""
    done = {
        step["name"]
        for other in others
        if _identity(other.machine)[1:] == _identity(ledger.machine)[1:]
        for step in other.steps
        if step["status"] == "ok"
    }
    fresh = [s for s in steps if _unstarted(ledger, s) and not _blocked(ledger, s)]
    urgent: set[str] = set()
    for s in reversed(fresh):
        if s.name not in done or s.name in urgent:
            urgent |= {s.name, s.needs}
    fresh.sort(key=lambda s: s.name not in urgent)
    # Only another try of what failed can free the blocked ones.
    fresh += [s for s in steps if _failed(ledger, s)]
    fresh += [s for s in steps if _blocked(ledger, s)]
    needed = {s.needs for s in fresh}
    for s in reversed(steps):
        needed |= {s.needs} if s.name in needed else set()
    lost = [s for s in steps if s.again and s.name in needed and s not in fresh]
    return lost + fresh


def open_ledger(
    machine: dict[str, Any], steps: Sequence[Step], out: Path, known: Iterable[Ledger]
) -> Ledger:
    """The unfinished ledger of this GPU and this very code in `out`, or else a new one."""
    for ledger in known:
        assert ledger.path is not None
        same = _identity(ledger.machine) == _identity(machine)
        here = ledger.path.parent == out.resolve()
        if same and here and any(_unstarted(ledger, step) for step in steps):
            return ledger
    ledger = Ledger(machine, machine["commit"], datetime.date.today().isoformat())
    create(ledger, out)
    return ledger


def _keep(ledger: Ledger, records: list[dict[str, Any]]) -> None:
    """Save every good record of a batch, then raise for the bad ones."""
    faults = []
    for record in records:
        try:
            ledger.add_record(record)
        except LedgerError as error:
            faults.append(f"{error} in {json.dumps(record)[:200]}")
    save(ledger)
    if faults:
        raise LedgerError("; ".join(faults))


def run_step(ledger: Ledger, step: Step, left_s: float) -> None:
    """Run one step and put it and its records into the ledger, however it ends."""
    assert ledger.path is not None
    limit = min(step.budget_s, left_s)
    left_out = [name for name, needed in step.without.items() if not _ok(ledger, needed)]
    argv = (*step.argv, *(("--without", *left_out) if left_out else ()))
    log = ledger.path.parent / "logs" / ledger.path.stem / f"{step.name.replace(':', '-')}.log"
    start = time.monotonic()
    try:
        keep = lambda records: _keep(ledger, records)  # noqa: E731
        outcome = process.run(argv, limit, keep, log, cwd=ROOT)
    except KeyboardInterrupt:
        ledger.add_step(step.name, "killed", time.monotonic() - start, INTERRUPTED)
        save(ledger)
        raise
    detail = outcome.detail
    if outcome.status == "killed" and limit < step.budget_s:
        detail = f"{OUT_OF_TIME}: {detail}"
    ledger.add_step(step.name, outcome.status, outcome.seconds, detail)
    save(ledger)


def run_campaign(
    machine: dict[str, Any],
    steps: Sequence[Step],
    out: Path,
    minutes: float,
    say: Callable[[str], None] = print,
) -> Ledger:
    """Run `steps` until they are done or the minutes are over."""
    end = time.monotonic() + 60 * minutes
    known = _readable([out, RESULTS], say)
    ledger = open_ledger(machine, steps, out, known)
    others = [other for other in known if other.path != ledger.path]
    say(f"campaign: {ledger.gpu}, commit {ledger.commit}, {minutes:g} minutes, into {ledger.path}")
    todo = order(ledger, steps, others)
    for i, step in enumerate(todo):
        left = end - time.monotonic()
        if left < min(step.budget_s, LEAST_S):
            if _unstarted(ledger, step):
                ledger.add_step(step.name, "skipped", 0, OUT_OF_TIME)
            continue
        if step.needs and not _ok(ledger, step.needs):
            need = _done(ledger, step.needs)
            why = "has not run" if need is None else f"is {need['status']}"
            ledger.add_step(step.name, "skipped", 0, f"{BLOCKED}: {step.needs} {why}")
            save(ledger)
        else:
            run_step(ledger, step, left)
        done = ledger.steps[-1]
        first = (done["detail"].splitlines() or [""])[0]
        say(f"[{i + 1}/{len(todo)}] {step.name}: {done['status']}, {done['seconds']:.0f} s {first}")
    save(ledger)
    return ledger


def main(args: argparse.Namespace) -> int:
    """0: all that ran is ok; 1: some is not; 2: no GPU, nothing written; 130: interrupted."""
    machine = discover()
    if not machine.get("gpu"):
        print("campaign: no GPU here; nothing was run and nothing written")
        return 2
    say = lambda line: print(line, flush=True)  # noqa: E731
    steps = plan()
    code = 0
    try:
        ledger = run_campaign(machine, steps, args.out, args.minutes, say)
    except KeyboardInterrupt:
        code = 130
        known = _readable([args.out], say)
        ledger = open_ledger(machine, steps, args.out, known)
    print("\n".join(summary(ledger)))
    write_json(args.json, ledger.machine, ledger.records)
    bad = any(step["status"] in ("failed", "killed") for step in ledger.steps)
    return code or int(bad)


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "campaign",
        "check, build, time, test, sanitize and tune on this GPU, into one ledger",
        ("campaign", "campaign --minutes 10 --out results   # again with the same --out: goes on"),
        main,
    )
    parser.add_argument(
        "--minutes", type=float, default=25, metavar="N", help="time box (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR",
        help="folder of the ledger; the same folder again goes on (default: bench/results)",
    )  # fmt: skip
    add_json(parser)
