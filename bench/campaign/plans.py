"""The plans by name, the steps that `--only` chooses, and how long they should take."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Sequence

from ..options import Refusal
from . import brief, full
from .steps import Step

# Beside its steps a campaign asks what machine it runs on, and prints its summary.
START_S = 9.0
SUMMARY_S = 4.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """minutes: its box, from the start of the process to the end of its summary."""

    name: str
    minutes: float
    about: str
    steps: Callable[[], list[Step]]


PLANS = {
    plan.name: plan
    for plan in (
        Plan("brief", 8, "a GPU lent for minutes: all kernels once", brief.brief),
        Plan("rerun", 3, "after a fix: the GEMMs, and every speed", brief.rerun),
        Plan("full", 25, "a GPU of one's own: all sizes, tiles, baselines", full.plan),
    )
}


def only(steps: Sequence[Step], pattern: str | None) -> list[Step]:
    """The steps whose name `pattern` finds, and those that they need. Refusal where it is none."""
    if pattern is None:
        return list(steps)
    try:
        chosen = [step for step in steps if re.search(pattern, step.name)]
    except re.error as error:
        raise Refusal(f"--only {pattern!r} is no regular expression: {error}") from None
    if not chosen:
        names = ", ".join(step.name for step in steps[:4])
        raise Refusal(
            f"--only {pattern!r} finds no step; --dry-run lists all {len(steps)}: {names}, ..."
        )
    wanted = {step.name for step in chosen}
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= {step.needs, *step.without.values()}
    return [step for step in steps if step.name in wanted]


def stages(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that run at the same time, or one after another, as they stand together."""
    together: list[Step] = []
    for step in steps:
        if together and (step.stage, step.at_once) != (together[0].stage, together[0].at_once):
            yield together
            together = []
        together.append(step)
    if together:
        yield together


def startable(waiting: Sequence[Step], unended: Collection[str]) -> Step | None:
    """The first that needs none of the steps that have not ended."""
    return next((step for step in waiting if step.needs not in unended), None)


def timetable(steps: Sequence[Step]) -> Iterator[tuple[Step, float, float]]:
    """(step, when it should start and end), in seconds from the start of the process."""
    now = START_S
    for stage in stages(steps):
        waiting = list(stage)
        ends: dict[str, float] = {}
        while waiting or ends:
            step = startable(waiting, {s.name for s in waiting} | ends.keys())
            if step is not None and len(ends) < step.at_once:
                waiting.remove(step)
                ends[step.name] = now + step.expected_s
                yield step, now, ends[step.name]
            else:
                next_one = min(ends, key=ends.__getitem__)
                now = ends.pop(next_one)


def expected_s(steps: Sequence[Step]) -> float:
    """From the start of the process to the end of its summary."""
    return max((end for _, _, end in timetable(steps)), default=START_S) + SUMMARY_S
