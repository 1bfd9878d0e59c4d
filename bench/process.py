"""Run one campaign step as a process of its own, and outlive it.

The child appends JSON lines to the file named by FUSEDMLP_RECORDS: a ledger record, or its own
verdict {"step": {"status", "detail"}}. A file and not a pipe: a grandchild that holds a pipe open
cannot stall the parent, and a line once written stays written whatever becomes of its writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RECORDS = "FUSEDMLP_RECORDS"
POLL_S = 0.05
REAP_S = 10
TAIL_LINES = 15
GUARD = Path(__file__).with_name("guard.py")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step ended; status is one of ledger.STATUSES."""

    status: str
    seconds: float
    detail: str


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def end_on_sigterm() -> None:
    """Whoever ends this process, or calls its machine back: children end, what is known is kept."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def interrupt_asked() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, for work that can stop only between two steps; a second
    one is a KeyboardInterrupt. Outside the main thread there is no Ctrl-C to wait for."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Lines:
    """The complete JSON lines that appeared in a growing file since the last look."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - it lives as long as the step; see close()
        self._rest = b""

    def fresh(self) -> list[bytes]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line for line in lines if line.strip()]

    def close(self) -> bytes:
        """What a crash left of a line."""
        self._file.close()
        return self._rest


def emitter() -> Callable[[dict[str, Any]], None]:
    """The child's side: hands one record to the campaign, or prints it where there is none."""
    path = os.environ.get(RECORDS)

    def emit(record: dict[str, Any]) -> None:
        line = json.dumps(record) + "\n"
        if path is None:
            print(line, end="", flush=True)
            return
        # One write of one line in append mode, so that the parent never sees halves interleaved.
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)

    return emit


class Child:
    """A command that runs as a process of its own, for at most limit_s seconds.

    Its records are passed on in batches, as they come, by `poll`. A batch that `receive` refuses by
    ValueError makes it fail and does not end it. Its output goes to `log`. Whatever of its process
    group is left, at the end or at the limit, is killed: a forgotten grandchild would hold the GPU
    against the next step. If this process is killed, its group ends too (guard.py).
    """

    def __init__(
        self,
        argv: Sequence[str],
        limit_s: float,
        receive: Callable[[list[dict[str, Any]]], None],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        handle, self._name = tempfile.mkstemp(suffix=".jsonl")
        os.close(handle)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.limit_s = log, limit_s
        self._lines, self._verdict = Lines(Path(self._name)), _Verdict(receive)
        self._start = time.monotonic()
        guarded = (sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *argv)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                guarded, cwd=cwd, env={**os.environ, **(env or {}), RECORDS: self._name},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def poll(self) -> Outcome | None:
        """Pass on what is new; how it ended, once it has, or is killed at its limit."""
        ended = _has_ended(self._process)
        if ended or self.seconds >= self.limit_s:
            return self.end(ended)
        self._verdict.take(self._lines.fresh())
        return None

    def end(self, ended: bool = False) -> Outcome:
        """Kill what is left of it and pass on the last records. ended: it was over already."""
        reaped = _kill_group(self._process)
        self._verdict.take(self._lines.fresh())
        rest = self._lines.close()
        os.unlink(self._name)
        seconds = self.seconds
        if rest:
            self._verdict.faults.append(f"half a record: {rest[:80]!r}")
        if not reaped:
            self._verdict.faults.append(f"process {self._process.pid} cannot be killed")
        code = -signal.SIGKILL if self._process.returncode is None else self._process.returncode
        return _judge(self._verdict, ended, code, seconds, self.limit_s, self.log)


def run(
    argv: Sequence[str],
    limit_s: float,
    receive: Callable[[list[dict[str, Any]]], None],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Outcome:
    """Run one `Child` to its end."""
    child = Child(argv, limit_s, receive, log, env, cwd)
    try:
        while (outcome := child.poll()) is None:
            time.sleep(POLL_S)
    except BaseException:
        child.end()
        raise
    return outcome


class _Verdict:
    """Sorts a child's lines into records, its own verdict and faults."""

    def __init__(self, receive: Callable[[list[dict[str, Any]]], None]) -> None:
        self.receive = receive
        self.status = "ok"
        self.detail = ""
        self.faults: list[str] = []

    def take(self, lines: list[bytes]) -> None:
        records = []
        for line in lines:
            try:
                item = json.loads(line)
            except ValueError as error:
                self.faults.append(f"{error}: {line[:80]!r}")
                continue
            if isinstance(item, dict) and "step" in item:
                self.status, self.detail = item["step"]["status"], item["step"]["detail"]
            else:
                records.append(item)
        if records:
            try:
                self.receive(records)
            except ValueError as error:
                self.faults.append(str(error))


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Asked without reaping: until then its id, hence its group's, goes to no other process."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(child: subprocess.Popen[bytes]) -> bool:
    """False where it is still there after a while: one that the system cannot end must not stop
    the rest."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(REAP_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _tail(log: Path) -> str:
    text = log.read_bytes().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-TAIL_LINES:])[-3000:]


def _judge(
    verdict: _Verdict, ended: bool, code: int, seconds: float, limit_s: float, log: Path
) -> Outcome:
    said = [verdict.detail] if verdict.detail else []
    faults = verdict.faults[:3]
    if len(verdict.faults) > 3:
        faults.append(f"and {len(verdict.faults) - 3} more")
    if not ended:
        why = [f"killed at its limit of {limit_s:.0f} s", *said, *faults, _tail(log)]
        return Outcome("killed", seconds, "\n".join(why))
    if code != 0:
        # A negative code is the signal that ended it.
        end = f"exit code {code}" if code > 0 else f"died of {signal.Signals(-code).name}"
        return Outcome("failed", seconds, "\n".join([end, *said, *faults, _tail(log)]))
    if faults:
        return Outcome("failed", seconds, "\n".join([*said, *faults]))
    return Outcome(verdict.status, seconds, "\n".join(said))
