"""Runs the tests on mutants, in copies of the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
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
WARM = Path(__file__).with_name("mutants_warm.py")
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

    def __init__(self, root: Path, folder: Path, imported: tuple[str, ...] = ()) -> None:
        """imported: modules that are imported once for all runs of tests."""
        self.folder, self.output, self.writes = folder / "tree", folder / "output", 0
        self.imported, self.warm = imported, None
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
        if self.warm is None:
            self.warm = subprocess.Popen(
                [sys.executable, str(WARM), *self.imported], cwd=self.folder,
                env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
        begun = time.monotonic()
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests]
        self.warm.stdin.write(json.dumps([arguments, str(self.output)]).encode() + b"\n")
        process = int(self.warm.stdout.readline())
        try:
            in_time = select.select([self.warm.stdout], [], [], limit)[0]
        except BaseException:
            self.close()
            os.killpg(process, signal.SIGKILL)
            raise
        if not in_time:  # with the tests' own processes
            os.killpg(process, signal.SIGKILL)
        status = int(self.warm.stdout.readline())
        output = self.output.read_text(errors="replace")
        return Run(status if in_time else None, time.monotonic() - begun, output)

    def close(self) -> None:
        if self.warm is not None:
            self.warm.kill()
            self.warm.wait()


@dataclass
class Trials:
    """Test files on copies without a fault, each once, and on mutants."""

    sound: Sound
    lock: threading.Lock = field(default_factory=threading.Lock)

    def limit(self, copy: Copy, *tests: str) -> float:
        """How long the files may take on a mutant; their tests must pass without one. What is not
        known to pass runs in one process, for most of a cheap file's time is importing."""
        known = lambda file: self.sound.seconds(copy.folder, file)  # noqa: E731
        with self.lock:
            if new := tuple(file for file in tests if known(file) is None):
                run = copy.run(new)
                if run.status:
                    failed = "nothing to run" if run.status == NOTHING_RAN else run.failed
                    raise MutantError(
                        f"{', '.join(new)}: must pass without a fault, got {failed}; mend it "
                        f"first:\n{run.output[-2000:]}"
                    )
                for file in new:
                    self.sound.note(copy.folder, file, run.seconds / len(new))
            return sum(SLOWER * (known(file) or 0) + SPARE_SECONDS for file in tests)

    def judge(self, copy: Copy, room: str, mutant: Mutant, tests: tuple[str, ...]) -> Outcome:
        limit = self.limit(copy, *tests)
        with copy.mutated(mutant):
            run = copy.run(tests, limit)
        if run.status is None:
            result = "timed out"
        elif run.status == 0:
            result = "survived"
        else:
            result = "stillborn" if STILLBORN in run.output else "killed"
        return Outcome(room, mutant, result, run.seconds, run.failed)
