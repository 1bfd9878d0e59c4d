"""Processor time of calls in one process and one thread, in turns, so that what else runs on the
machine meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Call = Callable[[], object]
SHORTEST = 0.02  # seconds of one call's turn


@dataclass(frozen=True)
class Ratio:
    """The first of two calls over the second, round by round: the median, and the middle half."""

    middle: float
    low: float
    high: float


def _turn(call: Call, times: int) -> float:
    """Seconds of a call, behind one that finds caches and malloc's heap as others left them: whose
    turn comes after whose would decide else."""
    call()
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def turns(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, the calls taking turns: every other round in the
    opposite order, for a call is slower behind one that leaves more in the caches."""
    for call in calls.values():
        call()
    times = {n: max(1, round(SHORTEST / max(_turn(c, 1), 1e-6))) for n, c in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            found[name].append(_turn(calls[name], times[name]))
    return found


def ratio(first: list[float], second: list[float]) -> Ratio:
    ordered = sorted(a / b for a, b in zip(first, second, strict=True))
    quarter = len(ordered) // 4
    return Ratio(median(ordered), ordered[quarter], ordered[-1 - quarter])
