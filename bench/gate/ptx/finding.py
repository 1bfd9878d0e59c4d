"""What the machine finds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass
class Finding(AssertionError):
    """One fault of a kernel that ran. source: file:line of the Python or CUDA source; line: of the
    PTX; block and warp: who did it."""

    kernel: str
    what: str
    source: str = ""
    line: int = 0
    text: str = ""
    block: tuple[int, int, int] = (0, 0, 0)
    warp: int = -1

    def __str__(self) -> str:
        where = f"\n  at {self.source or 'unknown source'}, PTX line {self.line}: {self.text[:160]}"
        who = f"\n  block {self.block}, warp {self.warp}"
        return f"{self.kernel}: {self.what}" + (where + who if self.line else "")
