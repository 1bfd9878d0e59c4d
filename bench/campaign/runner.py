"""Runs steps inside a time box: one process each, so that a crash, a hang or a poisoned CUDA
context costs its own step, those that need it, and no more. Steps of one stage run at the same
time."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Sequence

from .. import process
from ..report.ledger import Ledger
from ..timing.passed import LEDGER
from .outputs import Follower, Outputs
from .plans import SUMMARY_S, startable
from .resume import BLOCKED, INTERRUPTED, OUT_OF_TIME, done, ok, order, unstarted
from .steps import Step
from .worker import ROOT

# With less time left a step would hardly have imported torch.
LEAST_S = 15.0


class Box:
    """A number of minutes from the start of this process on, whatever it did until now."""

    def __init__(self, minutes: float, age_s: float = 0.0) -> None:
        self._end = time.monotonic() - age_s + 60 * minutes - SUMMARY_S

    def left_s(self) -> float:
        return self._end - time.monotonic()


def process_age_s() -> float:
    """Seconds since this process began, its imports included."""
    with open("/proc/self/stat", encoding="utf-8") as file:
        # After the name in parentheses, which may hold blanks, field 22 is the twentieth.
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class _Running:
    step: Step
    child: process.Child
    follower: Follower
    limit_s: float


class Runner:
    def __init__(self, outputs: Outputs, box: Box, say: Callable[[str], None]) -> None:
        self.outputs, self.box, self.say = outputs, box, say
        self.running: list[_Running] = []
        self.waiting: list[Step] = []
        self.total = self.ended = 0

    @property
    def ledger(self) -> Ledger:
        return self.outputs.ledger

    def run(self, steps: Sequence[Step]) -> None:
        """All steps, in their order, until they are done or the box is empty."""
        self.waiting, self.total = list(steps), len(steps)
        try:
            while self.waiting or self.running:
                while (step := self._next()) is not None:
                    self.waiting.remove(step)
                    self._start(step)
                self._poll()
                if self.running:
                    time.sleep(process.POLL_S)
        except KeyboardInterrupt:
            for one in self.running:
                one.child.end()
                one.follower.close()
                self.outputs.step(one.step.name, "killed", one.child.seconds, INTERRUPTED)
            raise

    def _next(self) -> Step | None:
        """What may start now, beside what runs."""
        if not self.waiting:
            return None
        first = self.waiting[0]
        stage = first.stage, first.at_once
        beside = [one.step for one in self.running]
        if len(beside) >= first.at_once or any((s.stage, s.at_once) != stage for s in beside):
            return None
        together = []
        for step in self.waiting:
            if (step.stage, step.at_once) != stage:
                break
            together.append(step)
        return startable(together, {s.name for s in (*together, *beside)})

    def _start(self, step: Step) -> None:
        left = self.box.left_s()
        need = done(self.ledger, step.needs) if step.needs else None
        if left < min(step.budget_s, LEAST_S):
            if unstarted(self.ledger, step):
                self._skip(step, OUT_OF_TIME)
        elif step.needs and not ok(self.ledger, step.needs):
            why = "has not run" if need is None else f"is {need['status']}"
            self._skip(step, f"{BLOCKED}: {step.needs} {why}")
        elif step.module and importlib.util.find_spec(step.module) is None:
            self._skip(step, f"the Python package {step.module} is not installed")
        else:
            self._launch(step, min(step.budget_s, left))

    def _launch(self, step: Step, limit_s: float) -> None:
        absent = [name for name, needed in step.without.items() if not ok(self.ledger, needed)]
        argv = (*step.argv, *(("--without", *absent) if absent else ()))
        output = self.outputs.output_of(step.name)
        child = process.Child(
            argv, limit_s, self.outputs.keep, output, {LEDGER: str(self.ledger.path)}, ROOT
        )
        follower = Follower(step.name, output, self.outputs.log)
        self.running.append(_Running(step, child, follower, limit_s))

    def _poll(self) -> None:
        for one in list(self.running):
            outcome = one.child.poll()
            one.follower.pump()
            if outcome is None:
                continue
            one.follower.close()
            self.running.remove(one)
            detail = outcome.detail
            if outcome.status == "killed" and one.limit_s < one.step.budget_s:
                detail = f"{OUT_OF_TIME}: {detail}"
            self._end(one.step, outcome.status, outcome.seconds, detail)

    def _skip(self, step: Step, why: str) -> None:
        self._end(step, "skipped", 0, why)

    def _end(self, step: Step, status: str, seconds: float, detail: str) -> None:
        self.outputs.step(step.name, status, seconds, detail)
        self.ended += 1
        first = (detail.splitlines() or [""])[0]
        self.say(f"[{self.ended}/{self.total}] {step.name}: {status}, {seconds:.0f} s {first}")


def run_campaign(
    ledger: Ledger,
    steps: Sequence[Step],
    box: Box,
    others: Sequence[Ledger] = (),
    say: Callable[[str], None] = print,
) -> None:
    """What is left of `steps`, into `ledger`, until it is done or the box is empty."""
    outputs = Outputs(ledger)
    try:
        Runner(outputs, box, say).run(order(ledger, steps, others))
    finally:
        outputs.close()
