"""The file of --json: rows as they come, and of which sources they are, so that a run that ended
early is gone on with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from ...machine import ROOT
from ...options import Refusal
from ..cache import differences, hash_of
from .executing import Executed

__all__ = ["APART", "read", "sources", "stamp", "write"]

# Rooms that no job reaches: they stand on the ops, or compute nothing.
APART = {"layers", "hyperglu", "patching", "distributed", "hub", "dry"}


def sources() -> Iterator[Path]:
    """All code that decides what a row says: what is launched, what runs it, what judges it."""
    for path in (ROOT / "fusedmlp").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in APART:
            yield path
    yield from (ROOT / "kernels").rglob("*.py")
    for room in ("ptx", "execute"):
        for path in (ROOT / "bench" / "gate" / room).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp"):
                yield path


@functools.cache
def stamp() -> dict[str, str]:
    """These sources, and the packages whose results are in a row, as they are when this is first
    asked."""
    return {
        "sources": hash_of(path for path in sources() if path.is_file()),
        "triton": triton.__version__,
        "torch": torch.__version__,
    }


def _row(record: dict[str, Any]) -> Executed:
    lists = {name: tuple(v) for name, v in record.items() if isinstance(v, list)}
    return Executed(**{**record, **lists})


def read(path: str) -> list[Executed]:
    """The rows of a file, none where there is no file. Refusal where they are of other sources."""
    if not os.path.exists(path):
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        there = content.get("stamp") or {}
        wrong = differences(there, stamp())
        rows = [] if wrong else [_row(record) for record in content["records"]]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise Refusal(
            f"--resume: {path} is no file that `gate execute --json` wrote ({error}); give --json "
            "another one"
        ) from error
    if wrong:
        raise Refusal(
            f"--resume: the rows of {path} are not of this code ({wrong}): give --json another "
            "file, or leave --resume out, and all is executed anew"
        )
    return rows


@functools.cache
def _encoded(row: Executed) -> str:
    return json.dumps(dataclasses.asdict(row))


def write(path: str, rows: Iterable[Executed], not_executed: Sequence[str]) -> None:
    """A row a line. Whoever reads finds a whole file, however this process ends."""
    head = json.dumps({"stamp": stamp(), "triton": triton.__version__})
    text = (
        f'{head[:-1]},\n"records": [\n'
        + ",\n".join(map(_encoded, rows))
        + f'\n],\n"not_executed": {json.dumps(not_executed, indent=1)}}}\n'
    )
    begun = f"{path}.begun"
    try:
        Path(begun).write_text(text, encoding="utf-8")
        os.replace(begun, path)
    except OSError as error:
        raise Refusal(f"{path} was not written: {error.strerror}") from error
