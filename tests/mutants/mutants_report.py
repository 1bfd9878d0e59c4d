"""What a run of mutants showed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mutants_trial import Outcome

Texts = dict[str, str]  # path -> what the file held when mutants were drawn
RESULTS = ("killed", "timed out", "survived", "equivalent", "stillborn")


def score(count: Counter[str]) -> float | None:
    """The part of those that change something which the tests found."""
    found = count["killed"] + count["timed out"]
    judged = found + count["survived"]
    return found / judged if judged else None


def counts(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """By room, and of all."""
    by_room: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for room in (outcome.room, "all"):
            by_room.setdefault(room, Counter())[outcome.result] += 1
    return by_room


def table(outcomes: list[Outcome]) -> str:
    by_room = counts(outcomes)
    lines = [f"{'room':14}" + "".join(f"{name:>12}" for name in RESULTS) + f"{'score':>8}"]
    for room in (*sorted(by_room.keys() - {"all"}), *(by_room.keys() & {"all"})):
        part = score(by_room[room])
        shown = "-" if part is None else f"{100 * part:.0f} %"
        numbers = "".join(f"{by_room[room][name]:12}" for name in RESULTS)
        lines.append(f"{room:14}{numbers}{shown:>8}")
    return "\n".join(lines)


def survivors(outcomes: Iterable[Outcome], texts: Texts) -> str:
    """Their diffs."""
    return "\n\n".join(
        f"{o.room}, {o.mutant.operator}:\n{o.mutant.diff(texts[o.mutant.path])}"
        for o in outcomes
        if o.result == "survived"
    )


def record(outcomes: list[Outcome], seed: int, texts: Texts) -> dict[str, Any]:
    """For --json."""
    rows = []
    for outcome in outcomes:
        text = texts[outcome.mutant.path]
        before, after = outcome.mutant.lines(text)
        rows.append(
            dataclasses.asdict(outcome)
            | {"line": outcome.mutant.line(text), "before": before, "after": after}
        )
    rooms = {room: {**count, "score": score(count)} for room, count in counts(outcomes).items()}
    return {"seed": seed, "rooms": rooms, "mutants": rows}
