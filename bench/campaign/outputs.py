"""The files that a campaign leaves, three of one stem: the ledger, one log, one summary. A machine
that is lent gives few files back, so there are no others."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..report.ledger import Ledger, LedgerError, save
from ..report.summary import summary

# The largest log, and what one step may put into it: a machine may give back no larger file.
LOG_BYTES = 14 << 20
STEP_BYTES = 2 << 20


class Follower:
    """Copies a growing file into the log, line by line, each behind the name of its step."""

    def __init__(self, name: str, source: Path, log: Log) -> None:
        self._name, self._log = name, log
        self._file = open(source, "rb")  # noqa: SIM115 - it lives as long as the step; see close()
        self._rest, self._left = b"", STEP_BYTES

    def pump(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        self._write(lines)

    def close(self) -> None:
        self.pump()
        self._write([self._rest] if self._rest else [])
        self._file.close()

    def _write(self, lines: list[bytes]) -> None:
        for line in lines:
            if self._left <= 0:
                return
            self._left -= len(line) + 1
            text = line.decode("utf-8", "replace")
            self._log.write(self._name, text if self._left > 0 else "(more lines are left out)")


class Log:
    """One file for what all steps print, written as it comes."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the campaign
        self._start = time.monotonic()

    def write(self, name: str, text: str) -> None:
        if self._file.tell() < LOG_BYTES:
            self._file.write(f"{time.monotonic() - self._start:7.1f} {name}| {text}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Outputs:
    """What is found goes into the ledger at once; so do the summary's lines after every step."""

    def __init__(self, ledger: Ledger) -> None:
        assert ledger.path is not None
        self.ledger = ledger
        self.log = Log(ledger.path.with_suffix(".log"))
        self.summary = ledger.path.with_suffix(".txt")
        self._folder = tempfile.TemporaryDirectory(prefix="fusedmlp-campaign-")

    def output_of(self, name: str) -> Path:
        """Where a step's own output lies while it runs."""
        return Path(self._folder.name) / name.replace(":", "-")

    def keep(self, records: list[dict[str, Any]]) -> None:
        """Save every good record of a batch, then raise for the bad ones."""
        faults = []
        for record in records:
            try:
                self.ledger.add_record(record)
            except LedgerError as error:
                faults.append(f"{error} in {json.dumps(record)[:200]}")
        save(self.ledger)
        if faults:
            raise LedgerError("; ".join(faults))

    def step(self, name: str, status: str, seconds: float, detail: str) -> None:
        self.ledger.add_step(name, status, seconds, detail)
        save(self.ledger)
        self.summary.write_text("\n".join(summary(self.ledger)) + "\n", encoding="utf-8")
        first = (detail.splitlines() or [""])[0]
        self.log.write(name, f"== {status} after {seconds:.1f} s {first}")

    def close(self) -> None:
        self.log.close()
        self._folder.cleanup()
