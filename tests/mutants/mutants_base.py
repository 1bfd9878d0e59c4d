"""A mutant: one fault in one file."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class MutantError(Exception):
    """What the user or a data file got wrong."""


@dataclass(frozen=True, order=True)
class Mutant:
    """`new` takes the place of the characters start to end of a file; `path` is from the root."""

    path: str
    start: int
    end: int
    new: str
    operator: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def line(self, text: str) -> int:
        return text.count("\n", 0, self.start) + 1

    def words(self, text: str) -> list[str]:
        """Which tests may be of it: those that name the function or the file."""
        inside = re.findall(r"^ *(?:def|class) _*(\w+)", text[: self.start], re.MULTILINE)
        return [*inside[-1:], Path(self.path).stem]

    def lines(self, text: str) -> tuple[str, str]:
        """The lines that it changes, before and after, without their margins."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.end)
        last = len(text) if last < 0 else last
        after = text[first : self.start] + self.new + text[self.end : last]
        return text[first:last].strip(), after.strip()

    def diff(self, text: str) -> str:
        names = f"a/{self.path}", f"b/{self.path}"
        sides = text.splitlines(), self.applied(text).splitlines()
        return "\n".join(difflib.unified_diff(*sides, *names, n=1, lineterm=""))
