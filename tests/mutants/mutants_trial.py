"""Runs the tests on mutants, in copies of the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mutants_base import Mutant, MutantError
from mutants_sound import Sound
from mutants_warm import TIMED_OUT

NO_SUCH_TEST, NOTHING_RAN = 4, 5  # pytest's exit codes
WARM = Path(__file__).with_name("mutants_warm.py")
STILLBORN = "does not compile for the host"  # tests/support/simt_build.py


@dataclass(frozen=True)
class Run:
    """A run of pytest."""

    status: int
    seconds: float
    output: str

    @property
    def failed(self) -> str:
        """The test that failed."""
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", self.output, re.MULTILINE)
        return found[1] if found else ""


@dataclass(frozen=True)
class Outcome:
    """killed, timed out, survived, stillborn (it does not compile) or equivalent; by which test."""

    room: str
    mutant: Mutant
    result: str
    seconds: float = 0.0
    by: str = ""


class Copy:
    """A copy of a git checkout, of what git does not ignore, with one mutant at a time in it."""

    def __init__(
        self, root: Path, folder: Path, imported: Sequence[str] = (), seconds: float = 60
    ) -> None:
        """imported: modules that are imported once for all runs. seconds: what a test may take."""
        self.folder, self.output, self.writes = folder / "tree", folder / "output", 0
        self.imported, self.seconds = imported, seconds
        self.warm: subprocess.Popen[bytes] | None = None
        self.process: int | None = None
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"],
            capture_output=True, text=True,
        )  # fmt: skip
        if listed.returncode:
            raise MutantError(f"{root} must be a git checkout: {listed.stderr.strip()}")
        for name in filter(None, listed.stdout.split("\0")):
            source, target = root / name, self.folder / name
            if source.is_symlink() or source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "FUSEDMLP_SIMT_CACHE": str(folder / "simt"),
        }

    def check_package(self, name: str) -> None:
        """The tests must see the copy, not an installed package or the checkout."""
        code = f"import {name}; print({name}.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if not done.stdout.startswith(str(self.folder)):
            raise MutantError(
                f"{name} must be imported from the copy {self.folder}, got "
                f"{done.stdout.strip() or done.stderr.strip()}"
            )

    def write(self, path: str, text: str) -> None:
        """With a time of its own: bytecode of the same second and size would count as its own."""
        target = self.folder / path
        target.write_text(text)
        self.writes += 1
        os.utime(target, (self.writes, self.writes))

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant):
        text = (self.folder / mutant.path).read_text()
        self.write(mutant.path, mutant.applied(text))
        try:
            yield
        finally:
            self.write(mutant.path, text)

    def run(self, tests: Sequence[str], words: Sequence[str] = ()) -> Run:
        """pytest on the copy up to the first failure: tests whose names have one of the words, then
        file after file."""
        if self.warm is None:
            self.warm = subprocess.Popen(
                [sys.executable, str(WARM), *self.imported], cwd=self.folder,
                env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
        begun = time.monotonic()
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests]
        asked = json.dumps([arguments, str(self.output), self.seconds, words])
        self.warm.stdin.write(asked.encode() + b"\n")
        self.process = int(self.warm.stdout.readline())
        status = int(self.warm.stdout.readline())
        self.end()
        output = self.output.read_text(errors="replace")
        return Run(status, time.monotonic() - begun, output)

    def end(self) -> None:
        """Ends the run that there is, with the tests' own processes."""
        process, self.process = self.process, None
        with contextlib.suppress(ProcessLookupError):
            if process is not None:
                os.killpg(process, signal.SIGKILL)

    def close(self) -> None:
        """A run on the way is lost."""
        if self.warm is not None:
            self.warm.kill()
            self.warm.wait()
            self.end()


@dataclass
class Trials:
    """Tests on mutants, and those that fail on copies without a fault too, each once."""

    sound: Sound
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, copy: Copy, test: str) -> None:
        """Raises MutantError unless the test passes without a fault."""
        with self.lock:
            file = test.partition("::")[0]
            if self.sound.passes(copy.folder, test):
                return
            run = copy.run((test,))
            if run.status == NO_SUCH_TEST and test != file:  # it has the name of the fault
                run = copy.run((file,))
            if run.status:
                failed = "nothing to run" if run.status == NOTHING_RAN else run.failed
                raise MutantError(
                    f"{test}: must pass without a fault, got {failed}; mend it first:\n"
                    f"{run.output[-2000:]}"
                )
            self.sound.note(copy.folder, test)

    def judge(self, copy: Copy, room: str, mutant: Mutant, tests: Sequence[str]) -> Outcome:
        words = mutant.words((copy.folder / mutant.path).read_text())
        with copy.mutated(mutant):
            run = copy.run(tests, words)
        if run.status == 0:
            result = "survived"
        elif run.status in TIMED_OUT:
            result = "timed out"
        elif STILLBORN in run.output:
            result = "stillborn"
        else:
            result = "killed"
            self.check(copy, run.failed or tests[0])
        return Outcome(room, mutant, result, run.seconds, run.failed)
