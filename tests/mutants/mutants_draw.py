"""Which mutants are run: drawn by operator, and those of the hand list."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mutants_base import ROOT, Mutant, MutantError
from mutants_cuda import cuda_mutants
from mutants_lists import EQUIVALENT, FAULTS, Equivalent, Fault
from mutants_python import changes, python_mutants
from mutants_rooms import NOT_DRAWN, ROWS, Row

SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}


def files(rows: Iterable[Row] = ROWS) -> list[str]:
    """Every source file in the folders of the rows, from the root; links are not followed."""
    folders = sorted({glob.split("/")[0] for row in rows for glob in row.sources})
    return sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )


def row_of(path: str, rows: Iterable[Row] = ROWS) -> Row | None:
    """The first row that has the file; None for a file that is not drawn."""
    for row in rows:
        if any(Path(path).match(glob) for glob in row.sources):
            return row
    if any(Path(path).match(glob) for glob in NOT_DRAWN):
        return None
    raise MutantError(f"{path}: must be in a row of mutants_rooms.py, is in none; write one")


def rows_of(rooms: Iterable[str], rows: Iterable[Row] = ROWS) -> list[Row]:
    """The rows of these rooms, or of all where none is named."""
    rows, rooms = list(rows), set(rooms)
    known = sorted({row.room for row in rows})
    if unknown := sorted(rooms - set(known)):
        raise MutantError(f"--room must be of {', '.join(known)}, got {', '.join(unknown)}")
    return [row for row in rows if not rooms or row.room in rooms]


def mutants_of(path: str, text: str) -> list[Mutant]:
    return (python_mutants if path.endswith(".py") else cuda_mutants)(path, text)


def named(paths: Iterable[str], globs: Sequence[str]) -> list[str]:
    """Those that a glob of `globs` matches; all where none is given."""
    paths = list(paths)
    for glob in globs:
        if not any(matches(path, [glob]) for path in paths):
            raise MutantError(f"--file must match a file of the rooms drawn from, got {glob}")
    return [path for path in paths if matches(path, globs)]


def matches(path: str, globs: Sequence[str]) -> bool:
    return not globs or any(Path(path).match(glob) for glob in globs)


def places(
    rows: list[Row], operator: str | None = None, globs: Sequence[str] = ()
) -> dict[str, dict[str, list[Mutant]]]:
    """room -> file -> its mutants, by one operator or all."""
    found: dict[str, dict[str, list[Mutant]]] = defaultdict(dict)
    operators = set()
    for path in named((path for path in files(rows) if row_of(path) in rows), globs):
        mutants = mutants_of(path, (ROOT / path).read_text())
        operators |= {m.operator for m in mutants}
        room = row_of(path).room
        found[room][path] = [m for m in mutants if operator in (None, m.operator)]
    if operator and operator not in operators:
        raise MutantError(f"--operator must be of {', '.join(sorted(operators))}, got {operator}")
    return found


def drawn(
    rows: list[Row],
    count: int,
    seed: int,
    operator: str | None = None,
    globs: Sequence[str] = (),
) -> Iterator[Mutant]:
    """`count` mutants of each room of these rows, no two of one line and operator.

    First a file is drawn, then an operator, then a place, so that neither a long file nor the many
    constants crowd out the rest."""
    for room, by_file in sorted(places(rows, operator, globs).items()):
        generator, taken = random.Random(f"{seed} {room}"), 0
        left = {path: found for path, found in by_file.items() if found}
        while taken < count and left:
            path = generator.choice(sorted(left))
            text = (ROOT / path).read_text()
            kind = generator.choice(sorted({m.operator for m in left[path]}))
            mutant = generator.choice([m for m in left[path] if m.operator == kind])
            seen = kind, mutant.line(text)
            left[path] = [m for m in left[path] if (m.operator, m.line(text)) != seen]
            if not left[path]:
                del left[path]
            if path.endswith(".py") and not changes(text, mutant):
                continue
            taken += 1
            yield mutant


def by_hand(rows: Iterable[Row], faults: Iterable[Fault] = FAULTS) -> Iterator[Mutant]:
    """The faults of the hand list that are in these rows."""
    for fault in faults:
        if row_of(fault.path) not in rows:
            continue
        text = (ROOT / fault.path).read_text()
        if (count := text.count(fault.old)) != 1:
            raise MutantError(
                f"{fault.path}: must hold the text of a fault of mutants_lists.py once, holds it "
                f"{count} times; write it as the file has it today: {fault.old!r}"
            )
        start = text.index(fault.old)
        yield Mutant(fault.path, start, start + len(fault.old), fault.new, "by hand")


def survived(found: Iterable[dict[str, Any]], rows: Iterable[Row]) -> Iterator[Mutant]:
    """The survivors of an earlier run's record, wherever their lines are by now."""
    for row in found:
        path = row["mutant"]["path"]
        if row["result"] != "survived" or row_of(path) not in rows:
            continue
        text = (ROOT / path).read_text()
        lines = row["before"], row["after"]
        here = [mutant for mutant in mutants_of(path, text) if mutant.lines(text) == lines]
        if not here:
            raise MutantError(
                f"{path}: must hold the line of a survivor, which is gone; leave it out or run "
                f"without --again: {row['before']}"
            )
        yield here[0]


def reason(mutant: Mutant, text: str, listed: Iterable[Equivalent] = EQUIVALENT) -> str | None:
    """Why the mutant changes nothing, where that is known."""
    before, after = mutant.lines(text)
    above = [line.strip() for line in text[: mutant.start].split("\n")[:-1]]
    for row in listed:
        *lead, line = row.before.split("\n")
        same = (row.path, line, row.after) == (mutant.path, before, after)
        if same and above[len(above) - len(lead) :] == lead:
            return row.reason
    return None
