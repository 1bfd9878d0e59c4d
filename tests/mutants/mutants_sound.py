"""Which tests pass without a fault: kept from one run of the tool to the next, for as long as
neither the code nor the test's file changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

CODE = {".py", ".cu", ".cuh", ".h", ".cpp", ".toml"}


def fingerprint(folder: Path) -> str:
    """A hash of all code but tests and this tool; what several tests share counts as code."""
    seen = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if (
            path.suffix in CODE
            and path.is_file()
            and not path.name.startswith(("test_", "mutants_"))
        ):
            seen.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return seen.hexdigest()


class Sound:
    """`file` keeps what was seen, `code` is the fingerprint of the code that is tested."""

    def __init__(self, file: Path, code: str) -> None:
        self.file, self.code = file, code
        self.seen = json.loads(file.read_text()) if file.exists() else {}

    def _key(self, tests: Path) -> str:
        return hashlib.sha256(self.code.encode() + tests.read_bytes()).hexdigest()

    def passes(self, folder: Path, test: str) -> bool:
        """Whether it has passed on this code; `test` is a file, or a test in it."""
        return self.seen.get(test) == self._key(folder / test.partition("::")[0])

    def note(self, folder: Path, test: str) -> None:
        self.seen[test] = self._key(folder / test.partition("::")[0])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.seen, indent=1, sort_keys=True) + "\n")
