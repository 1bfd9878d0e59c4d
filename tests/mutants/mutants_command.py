"""The command: what is asked for, and what is shown."""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mutants_draw as draw
import mutants_report as report
from mutants_base import ROOT, Mutant, MutantError
from mutants_sound import Sound, fingerprint
from mutants_trial import Copy, Outcome, Trials
from mutants_warm import IMPORTED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    about = "Puts single faults into the code and says which of them the tests miss."
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=about)
    parser.add_argument("--seed", type=int, help="which mutants are drawn; default: fresh ones")
    parser.add_argument("--room", nargs="+", default=[], help="these rooms alone")
    parser.add_argument("--file", nargs="+", default=[], help="these files alone, by globs")
    parser.add_argument("--operator", help='faults of this kind alone, say "statement dropped"')
    parser.add_argument("--count", type=int, default=10, help="mutants drawn in each room")
    parser.add_argument("--no-hand", action="store_true", help="without those of the hand list")
    parser.add_argument("--again", type=Path, metavar="FILE", help="the survivors of a --json FILE")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the checkout at work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    given = parser.parse_args(arguments)
    if given.count < 0 or given.jobs < 1:
        parser.error("--count must be at least 0 and --jobs at least 1")
    return given


def chosen(given: argparse.Namespace, seed: int) -> list[Mutant]:
    rows = draw.rows_of(given.room)
    if given.again:
        return list(draw.survived(json.loads(given.again.read_text())["mutants"], rows))
    hand = [] if given.no_hand else draw.by_hand(rows)
    # A glob may match files without a fault by hand; drawn() refuses one that matches none at all.
    mutants = [mutant for mutant in hand if draw.matches(mutant.path, given.file)]
    mutants += draw.drawn(rows, given.count, seed, given.operator, given.file)
    # One row after another, so that its tests run without a fault shortly before they run with one.
    return sorted(mutants, key=lambda m: draw.ROWS.index(draw.row_of(m.path)))


def judged(mutants: list[Mutant], texts: report.Texts, jobs: int) -> Iterator[Outcome]:
    """Each outcome once it is known."""
    free = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        copies = [Copy(ROOT, Path(home) / str(i), IMPORTED) for i in range(jobs)]
        for copy in copies:
            copy.check_package("fusedmlp")
            free.put(copy)
        sound = Sound(ROOT / "build" / "mutants" / "sound.json", fingerprint(copy.folder))
        trials = Trials(sound)

        def judge(mutant: Mutant) -> Outcome:
            row = draw.row_of(mutant.path)
            if draw.reason(mutant, texts[mutant.path]):
                return Outcome(row.room, mutant, "equivalent")
            copy = free.get()
            try:
                return trials.judge(copy, row.room, mutant, row.tests)
            finally:
                free.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield from pool.map(judge, mutants)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in copies:
                    copy.close()


def show(mutant: Mutant, text: str) -> str:
    before, after = mutant.lines(text)
    return f"{mutant.path}:{mutant.line(text)} {mutant.operator}\n  - {before}\n  + {after}"


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    outcomes: list[Outcome] = []
    try:
        mutants = chosen(given, seed)
        texts = {mutant.path: (ROOT / mutant.path).read_text() for mutant in mutants}
        print(f"{len(mutants)} mutants, --seed {seed}", flush=True)
        if given.list:
            print("\n".join(show(mutant, texts[mutant.path]) for mutant in mutants))
            return 0
        for outcome in judged(mutants, texts, given.jobs):
            outcomes.append(outcome)
            by = f" by {outcome.by}" if outcome.by else ""
            shown = show(outcome.mutant, texts[outcome.mutant.path])
            print(f"{outcome.result}{by}, {outcome.seconds:.0f} s", shown, flush=True)
    except MutantError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what follows is of the mutants so far")
    finally:
        if given.json and outcomes:
            found = report.record(outcomes, seed, texts)
            given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nsurvivors:\n\n{report.survivors(outcomes, texts)}\n\n{report.table(outcomes)}")
    return int(any(outcome.result == "survived" for outcome in outcomes))
