"""`time --base REF`: this tree against another commit, in one run.

REF is checked out into a throwaway git worktree. Both sides are measured by this tree's bench, each
in fresh processes that take turns; the samples of all turns are pooled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...progress import Progress
from .. import machine, process
from ..options import Emit, Record, Refusal, collecting, write_json
from ..render import number, table
from ..timing.session import Options, plan
from ..timing.stats import summarize
from ..work import Work

TURNS = 3
LIMIT_S = 3600
HERE = "fusedmlp"
# (tree, works, options) -> the records of one turn.
Turn = Callable[[Path, Sequence[Work], Options], list[Record]]
_KEY = ("case", "phase", "activation", "dtype", "M", "D", "H")


def _git(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def worktree(ref: str, root: Path = machine.ROOT) -> Iterator[Path]:
    """`ref` checked out beside this tree, with this tree's bench in place of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fusedmlp-base-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--detach", str(tree), ref, cwd=root)
        shutil.rmtree(tree / "bench", ignore_errors=True)
        shutil.copytree(root / "bench", tree / "bench", ignore=shutil.ignore_patterns("results"))
        link = tree / "fusedmlp" / "bench"
        if not link.exists():
            link.symlink_to("../bench")
        yield tree
    finally:
        # Also when adding failed half-way: what is not there any more is pruned from git's list.
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune", cwd=root)


def _groups(options: Options) -> list[list[Work]]:
    """Pieces of work that one command line can name."""
    groups: dict[tuple[str, str, str], list[Work]] = {}
    for work in plan(options):
        groups.setdefault((work.case.name, work.activation, work.dtype), []).append(work)
    return list(groups.values())


def _arguments(works: Sequence[Work], options: Options) -> Iterator[str]:
    first = works[0]
    yield from ("time", "--keep-samples", "--provider", HERE, "--rounds", str(options.rounds))
    yield from ("--case", first.case.name, "--activation", first.activation)
    yield from ("--dtype", first.dtype, "--phase", *options.phases)
    yield from ("--shape", *(work.size for work in works))


def take_turn(tree: Path, works: Sequence[Work], options: Options) -> list[Record]:
    """Time fusedmlp as it is in `tree`, in a process of its own.

    Raises Refusal if that ends early.
    """
    records: list[Record] = []
    log = Path(tempfile.mkdtemp(prefix="fusedmlp-bench-")) / "time.log"
    argv = [sys.executable, "-m", "fusedmlp.bench", *_arguments(works, options)]
    # cwd comes first on sys.path under -m: each side imports its own tree, whatever is installed.
    outcome = process.run(argv, LIMIT_S, records.extend, log, cwd=tree)
    timed = [r for r in records if r["kind"] == "time"]
    if len(timed) != len(works) * len(options.phases):
        raise Refusal(
            f"timing {works[0].case.name} in {tree} ended early ({outcome.status}); "
            f"its output is in {log}:\n{outcome.detail}"
        )
    shutil.rmtree(log.parent)
    return records


def pooled(turns: Sequence[Sequence[Record]], provider: str) -> list[Record]:
    """One time record for all turns of one side; none of what any turn skipped."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in (r for turn in turns for r in turn if r["kind"] == "time"):
        found.setdefault(tuple(record[name] for name in _KEY), []).append(record)
    return [_pool(records, provider) for records in found.values()]


def _pool(records: Sequence[Record], provider: str) -> Record:
    made = {**records[0], "provider": provider}
    samples = made.pop("samples_ms", None)
    skipped = next((r for r in records if r["skipped"] is not None), None)
    if skipped is not None:
        return {**skipped, "provider": provider, "samples_ms": None}
    samples = [ms for r in records for ms in r["samples_ms"]]
    summary = summarize(samples)
    made |= {"median_ms": summary.median, "q20_ms": summary.q20, "q80_ms": summary.q80}
    for rate, fraction, amount, scale in (
        ("tflops", "of_cublas", "flops", 1e9), ("gbps", "of_copy", "bytes", 1e6),
    ):  # fmt: skip
        made[rate] = made[amount] / summary.median / scale
        peaks = [r[rate] / r[fraction] for r in records if r[fraction]]
        made[fraction] = made[rate] / summarize(peaks).median if peaks else None
    return made


def compare(
    ref: str, options: Options, emit: Emit, turn: Turn = take_turn, root: Path = machine.ROOT
) -> list[tuple[Record, Record]]:
    """Time `ref` and this tree in turns; emits both sides' records, returns (base, here) pairs."""
    base: list[list[Record]] = []
    here: list[list[Record]] = []
    name = f"{HERE}@{ref}"
    groups = _groups(options)
    total = 2 * TURNS * len(groups)
    with worktree(ref, root) as tree, Progress("time", total) as progress:
        for works in groups:
            for i in range(TURNS):
                sides = [(tree, base, name), (root, here, HERE)]
                for path, into, label in sides if i % 2 == 0 else sides[::-1]:
                    into.append(turn(path, works, options))
                    progress.step(label)
    for record in (r for records in here[::TURNS] for r in records if r["kind"] != "time"):
        emit(record)  # one turn's peaks and checks stand for all
    pairs: dict[tuple[Any, ...], list[Record]] = {}
    for record in (*pooled(base, name), *pooled(here, HERE)):
        record.pop("samples_ms", None)
        emit(record)
        pairs.setdefault(tuple(record[field] for field in _KEY), []).append(record)
    return [(p[0], p[1]) for p in pairs.values() if len(p) == 2]


def main(ref: str, options: Options, json: str | None, found: Mapping[str, Any]) -> int:
    records: list[Record] = []
    pairs = compare(ref, options, collecting(records))
    rows, reasons = [], []
    for old, new in pairs:
        what = [old["case"], old["dtype"], f"{old['M']}x{old['D']}x{old['H']}", old["phase"]]
        reasons += [
            f"{r['provider']}, {' '.join(what)}: {r['skipped']}" for r in (old, new) if r["skipped"]
        ]
        if not old["skipped"] and not new["skipped"]:
            speedup = old["median_ms"] / new["median_ms"]
            rows.append(
                [*what, number(old["median_ms"]), number(new["median_ms"]), f"{speedup:.3f}"]
            )
    header = ("case", "dtype", "M x D x H", "phase", f"ms at {ref}", "ms here", "times faster")
    if rows:
        table(f"This tree against {ref}, measured in {TURNS} turns each", header, rows)
    if reasons:
        print("\nNot timed:", *reasons, sep="\n  ")
    write_json(json, found, records)
    return 0
