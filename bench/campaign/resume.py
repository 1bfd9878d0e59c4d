"""Which ledger a campaign writes into, and what of a plan is left to do."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..options import Refusal
from ..report.ledger import RESULTS, Ledger, LedgerError, create, load
from .steps import Step
from .worker import ROOT

# How the detail of a step begins that did not get its chance; the next run takes it up.
OUT_OF_TIME = "out of time"
INTERRUPTED = "interrupted"
BLOCKED = "left out"


def source_hash(root: Path = ROOT) -> str:
    """The hash of all code that a number depends on: a dirty tree has no other name."""
    digest = hashlib.sha256()
    folders = ("fusedmlp", "kernels", "bench", "csrc")
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def readable(folders: Iterable[Path], say: Callable[[str], None]) -> list[Ledger]:
    """Every ledger there. A broken one is named and passed over: it must not cost a GPU's time."""
    ledgers = []
    for path in sorted({path.resolve() for folder in folders for path in folder.glob("*.json")}):
        try:
            ledgers.append(load(path))
        except LedgerError as error:
            say(f"campaign: passing over {error}")
    return ledgers


def identity(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whose work it is: GPU, commit, code."""
    return machine["gpu"], machine.get("commit"), machine.get("source")


def done(ledger: Ledger, name: str) -> dict[str, Any] | None:
    return next((s for s in ledger.steps if s["name"] == name), None)


def ok(ledger: Ledger, name: str) -> bool:
    found = done(ledger, name)
    return found is not None and found["status"] == "ok"


def unstarted(ledger: Ledger, step: Step) -> bool:
    found = done(ledger, step.name)
    return found is None or found["detail"].startswith((OUT_OF_TIME, INTERRUPTED, BLOCKED))


def _blocked(ledger: Ledger, step: Step) -> bool:
    """Was it left out before, for want of another?"""
    found = done(ledger, step.name)
    return found is not None and found["detail"].startswith(BLOCKED)


def _failed(ledger: Ledger, step: Step) -> bool:
    """Failed on its own: worth another try, after everything that has had none."""
    bad = any(s["name"] == step.name and s["status"] in ("failed", "killed") for s in ledger.steps)
    return bad and not unstarted(ledger, step)


def order(ledger: Ledger, steps: Sequence[Step], others: Iterable[Ledger]) -> list[Step]:
    """What is left to do: first what no GPU has done with this code, by worth within each half."""
    elsewhere = {
        step["name"]
        for other in others
        if identity(other.machine)[1:] == identity(ledger.machine)[1:]
        for step in other.steps
        if step["status"] == "ok"
    }
    fresh = [s for s in steps if unstarted(ledger, s) and not _blocked(ledger, s)]
    urgent: set[str] = set()
    for s in reversed(fresh):
        if s.name not in elsewhere or s.name in urgent:
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
    """The unfinished ledger of this GPU and this very code in `out`, or else a new one.

    Refusal where `out` holds a ledger of other code or of another GPU, unless it is bench/results,
    which holds those of every commit.
    """
    here = [ledger for ledger in known if ledger.path and ledger.path.parent == out.resolve()]
    for ledger in here:
        if identity(ledger.machine) == identity(machine):
            if any(unstarted(ledger, step) for step in steps):
                return ledger
        elif out.resolve() != RESULTS.resolve():
            raise Refusal(
                f"{ledger.path} is of {ledger.gpu}, commit {ledger.commit}, sources "
                f"{ledger.machine.get('source')}; here are {machine['gpu']}, commit "
                f"{machine['commit']}, sources {machine.get('source')}: give --out an empty folder "
                "(nothing was changed)"
            )
    ledger = Ledger(machine, machine["commit"], datetime.date.today().isoformat())
    create(ledger, out)
    return ledger
