"""Command-line arguments that subcommands share, and the JSON file that all of them write."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..reference.activations import ACTIVATIONS, resolve
from ..testing import CASES
from . import process
from .shapes import MODELS, Model
from .work import ALL_CASES, DTYPES, ops

PROG = "fusedmlp bench"
SCHEMA = 1
INTERRUPTED = 130  # the exit code of a program that SIGINT ends
Record = dict[str, Any]
Emit = Callable[[Record], None]


class Refusal(RuntimeError):
    """An end whose message is all that a user needs."""


def need(package: str, what: str) -> None:
    """Refuse `what` where an optional package is missing, before any work is lost for it."""
    if importlib.util.find_spec(package) is None:
        raise Refusal(f'{what} need {package}: pip install "fusedmlp[bench]"')


def subparser(
    subparsers: Any, name: str, summary: str, examples: Sequence[str], main: Callable[..., int]
) -> argparse.ArgumentParser:
    """Add a subcommand whose --help ends in examples."""
    lines = "\n".join(f"  {PROG} {example}" for example in examples)
    made: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"examples:\n{lines}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(main=main)
    return made


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write machine and records to FILE"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for `check_device`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)


def check_device(device: str) -> None:
    """Refuse a GPU that is not there, before anything has begun."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda needs a GPU; torch finds none")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", type=_model, default=[],
        help=f"widths of these models: {', '.join(MODELS)}",
    )  # fmt: skip


def add_selection(parser: argparse.ArgumentParser, of_op: str = "every case of these ops") -> None:
    """What to run: cases or ops, dtypes, activations, sizes."""
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", choices=ALL_CASES, default=None,
        help=f"cases: {', '.join(CASES)}",
    )  # fmt: skip
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", default=None, choices=sorted(ops()),
        help=f"{of_op}: {', '.join(sorted(ops()))}",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=None)
    parser.add_argument(
        "--activation", nargs="+", metavar="NAME", type=activation, default=None,
        help="activations such as 'clamped_swiglu(limit=10)', or all; default: the function's own",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--shape", nargs="+", metavar="MxDxH", type=shape_of, default=[],
        help="tokens x width x hidden width, such as 4096x2048x8192",
    )  # fmt: skip
    add_json(parser)


def chosen_cases(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The cases that --case and --op name; None if neither was given."""
    if args.case is None and args.op is None:
        return None
    wanted = list(args.case or [])
    wanted += [c.name for c in CASES.values() if c.op in (args.op or []) and c.name not in wanted]
    return tuple(wanted)


def activation(text: str) -> str:
    """An argument `activation` of the functions, or "all"."""
    try:
        return text if text == "all" else resolve(text) and text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be all, or {error}; got {text!r}") from None


def chosen_activations(args: argparse.Namespace) -> tuple[str, ...] | None:
    if args.activation and "all" in args.activation:
        return tuple(ACTIVATIONS)
    return tuple(args.activation) if args.activation else None


def _model(name: str) -> Model:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


def shape_of(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"must be MxDxH, such as 4096x2048x8192; got {text!r}")
    M, D, H = map(int, parts)
    return M, D, H


def count(text: str) -> int:
    """An argument that counts something: 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """An argument that measures something: above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def writable(text: str) -> str:
    """An argument that is a file to write once all is done: refused before anything has begun."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written; got {text!r}")
    return text


def writable_folder(text: str) -> str:
    """An argument that is a folder to write into once all is done: made before anything has begun,
    or refused then."""
    with contextlib.suppress(OSError):
        Path(text).mkdir(parents=True, exist_ok=True)
    if not Path(text).is_dir() or not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written; got {text!r}")
    return text


# What a record of these kinds is about.
_ABOUT = {
    "time": ("kind", "case", "provider", "phase", "activation", "dtype", "M", "D", "H"),
    "peak": ("kind", "name", "dtype", "M", "N", "K"),
}


def collecting(records: list[Record]) -> Emit:
    """An emit that keeps records, and hands them on where a parent process asked for them. A time
    or a peak takes the place of an earlier one of the same thing."""
    forward = process.emitter() if process.RECORDS in os.environ else None

    def emit(record: Record) -> None:
        kind = record["kind"]
        if kind in _ABOUT:
            same = {name: record.get(name) for name in _ABOUT[kind]}
            records[:] = [r for r in records if any(r.get(k) != v for k, v in same.items())]
        records.append(record)
        if forward is not None:
            forward(record)

    return emit


def write_json(
    path: str | None, found: Mapping[str, Any], records: Sequence[Record], say: bool = True
) -> None:
    if path is None:
        return
    content = {"schema": SCHEMA, "machine": dict(found), "records": list(records)}
    write_text(path, json.dumps(content, indent=1) + "\n", say)


def write_text(path: str | Path, text: str, say: bool = True) -> None:
    """Write a file that a user is to find, and say where; Refusal where it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refusal(f"{path} was not written: {error.strerror}") from error
    if say:
        print(f"wrote {path}")
