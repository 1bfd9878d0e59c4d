"""A bar that shows how far a long call is."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """A bar on a terminal's stderr, nothing elsewhere; by rich where it is installed. Use as a
    context manager."""

    def __init__(self, title: str, total: int, err: TextIO | None = None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.err = err or sys.stderr
        self.shown = self.err.isatty() and total > 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            with contextlib.suppress(ImportError):
                self._start()
        return self

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TimeElapsedColumn

        self._bar = Bar(
            "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(file=self.err), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total)

    def step(self, what: str = "") -> None:
        """One more is done."""
        self.done += 1
        if self._bar is not None:
            from rich.markup import escape

            text = escape(f"{self.title} {what}")
            self._bar.update(self._task, completed=self.done, description=text)
        elif self.shown:
            # \033[K clears what a longer line left behind.
            text = f"\r{self.title} {self.done}/{self.total} {what}\033[K"
            print(text, end="", file=self.err, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown:
            print("\r\033[K", end="", file=self.err, flush=True)
