"""Tables for a terminal; with rich where it is installed, in plain text where not.

Anything that is not a terminal gets plain text with every column: it has no width to fit.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

try:
    import rich.console
    import rich.table
    import rich.text
except ImportError:
    rich = None  # type: ignore[assignment]

Rows = Sequence[Sequence[str]]


def plain_table(header: Sequence[str], rows: Rows) -> str:
    """Columns as wide as their widest cell; figures to the right, words to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(_is_figure(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _is_figure(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell in ("-", "inf")


def width_of(out: TextIO) -> int:
    """Columns of a terminal (COLUMNS, where it is set); more than anything needs elsewhere."""
    return shutil.get_terminal_size().columns if out.isatty() else 10_000


def say(text: str, out: TextIO | None = None) -> None:
    """Print a paragraph, broken between words where the terminal ends."""
    out = out or sys.stdout
    width = width_of(out)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    print("\n".join(lines), file=out)


def say_command(what: str, words: Sequence[str], out: TextIO | None = None) -> None:
    """Print a command to paste. Where the terminal is too narrow it begins a line of its own, and
    each line but the last ends in a backslash, by which the shell reads on."""
    out = out or sys.stdout
    quoted = [shlex.quote(word) for word in words]
    if len(f"{what} {' '.join(quoted)}") <= width_of(out):
        print(what, *quoted, file=out)
        return
    lines = ["  "]
    for word in quoted:
        if lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width_of(out):
            lines.append("    ")
        lines[-1] += f"{word} "
    print(what, "\\\n".join(lines).rstrip(), sep="\n", file=out)


def fit(
    header: Sequence[str], rows: Rows, width: int, drop: Sequence[str]
) -> tuple[Sequence[str], Rows, list[str]]:
    """The table without as many of the columns `drop`, in that order, as make it fit; and those."""
    gone: list[str] = []
    for name in drop:
        if max(map(len, plain_table(header, rows).splitlines())) <= width:
            break
        if name not in header:
            continue
        at = list(header).index(name)
        header = [*header[:at], *header[at + 1 :]]
        rows = [[*row[:at], *row[at + 1 :]] for row in rows]
        gone.append(name)
    return header, rows, gone


def table(
    title: str,
    header: Sequence[str],
    rows: Rows,
    out: TextIO | None = None,
    styles: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> None:
    """styles: rich's style of cells with exactly this text. drop: columns that a terminal too
    narrow for all of them does without, the least needed first."""
    out = out or sys.stdout
    styles = styles or {}
    header, rows, gone = fit(header, rows, width_of(out), drop)
    print(file=out)
    if title:
        say(title, out)
    _print_table(header, rows, out, styles)
    if gone:
        names = gone if len(gone) <= 3 else [*gone[:2], f"{len(gone) - 2} more"]
        say(f"Left out, for want of columns: {', '.join(names)}.", out)


def _print_table(header: Sequence[str], rows: Rows, out: TextIO, styles: Mapping[str, str]) -> None:
    plain = plain_table(header, rows)
    console = rich.console.Console(file=out) if rich is not None and out.isatty() else None
    # A table wider than the terminal would have its cells folded: whole lines read better.
    frame = 3 * len(header) + 1
    if console is None or console.width < max(map(len, plain.splitlines())) + frame:
        print(plain, file=out)
        return
    made = rich.table.Table()
    for i, name in enumerate(header):
        figures = all(_is_figure(row[i]) for row in rows)
        made.add_column(name, justify="right" if figures else "left")
    for row in rows:
        made.add_row(*(rich.text.Text(cell, styles.get(cell, "")) for cell in row))
    console.print(made)


def number(value: float | None, digits: int = 3) -> str:
    """A figure in few characters; "-" for one that was not taken."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        short = f"{value:.{digits}g}"
        return f"{value:.0f}" if "e" in short else short
    return f"{value:.{digits - 1}e}"


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}%"


def size(count: float) -> str:
    """Bytes in the unit that keeps them short."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} GB"
