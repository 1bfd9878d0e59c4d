"""Runs the tests on mutants, in copies of the checkout."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mutants_base import Mutant, MutantError
from mutants_sound import Sound

# A loaded machine may take so much longer than the run without a fault did.
SLOWER, SPARE_SECONDS = 3.0, 30.0
NOTHING_RAN = 5  # pytest's exit code
STILLBORN = "does not compile for the host"  # tests/support/simt_build.py


@dataclass(frozen=True)
class Run:
    """A run of pytest; no status: it ran out of time."""

    status: int | None
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

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.writes = folder / "tree", 0
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

    def run(self, tests: tuple[str, ...], limit: float | None = None) -> Run:
        """pytest on the copy, file after file up to the first failure, `limit` seconds at most."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        begun = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            output, status = "", None
        finally:
            if process.poll() is None:  # the tests' own processes too
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return Run(status, time.monotonic() - begun, output)


@dataclass
class Trials:
    """Test files on copies without a fault, each once, and on mutants."""

    sound: Sound
    lock: threading.Lock = field(default_factory=threading.Lock)

    def limit(self, copy: Copy, tests: str) -> float:
        """How long the file may take on a mutant; its tests must pass without one."""
        with self.lock:
            seconds = self.sound.seconds(copy.folder, tests)
            if seconds is None:
                run = copy.run((tests,))
                if run.status:
                    failed = "nothing to run" if run.status == NOTHING_RAN else run.failed
                    raise MutantError(
                        f"{tests}: must pass without a fault, got {failed}; mend it first:\n"
                        f"{run.output[-2000:]}"
                    )
                self.sound.note(copy.folder, tests, seconds := run.seconds)
            return SLOWER * seconds + SPARE_SECONDS

    def judge(self, copy: Copy, room: str, mutant: Mutant, tests: tuple[str, ...]) -> Outcome:
        """In one process, for most of a cheap file's time is importing."""
        limit = sum(self.limit(copy, file) for file in tests)
        with copy.mutated(mutant):
            run = copy.run(tests, limit)
        if run.status is None:
            result = "timed out"
        elif run.status == 0:
            result = "survived"
        else:
            result = "stillborn" if STILLBORN in run.output else "killed"
        return Outcome(room, mutant, result, run.seconds, run.failed)
