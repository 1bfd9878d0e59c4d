"""`gate`: the ahead-of-time gate of the Triton kernels as a subcommand of the bench."""

from __future__ import annotations

import argparse
import importlib

from .. import rooms
from ..options import Refusal, subparser
from .kernels import __doc__ as about, add_arguments, run

__all__ = ["main", "register"]

_EXECUTE = "gate.execute.command"


def main(args: argparse.Namespace) -> int:
    return run(args)


def _missing(args: argparse.Namespace) -> int:
    raise Refusal(rooms.missing("gate execute"))


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "gate", "compile every Triton kernel for every architecture, without a GPU",
        (
            "gate --brief", "gate --arch sm_90 sm_103", "gate --brief --json gate.json",
            "gate execute --brief",
        ),
        main,
    )  # fmt: skip
    parser.description = about
    add_arguments(parser)
    inner = parser.add_subparsers(metavar="COMMAND", title="more")
    if not rooms.has(_EXECUTE):
        inner.add_parser("execute", help="needs a checkout").set_defaults(main=_missing)
        return
    command = importlib.import_module(".execute.command", __package__)
    execute = subparser(
        inner, "execute", "run every compiled kernel on a CPU and judge its numbers",
        ("gate execute --brief", "gate execute --arch sm_90 --match 'moe_.* tile'"),
        command.run,
    )  # fmt: skip
    execute.description = command.__doc__
    command.add_arguments(execute)
