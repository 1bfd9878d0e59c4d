"""`gate`: the ahead-of-time gate of the Triton kernels as a subcommand of the bench; `gate
execute`, which runs what it compiles, and `gate fill-cache`, which keeps it."""

from __future__ import annotations

import argparse
import importlib

from .. import rooms
from ..options import Refusal, subparser
from . import fill
from .kernels import __doc__ as about, add_arguments, run

__all__ = ["main", "register"]

_EXECUTE = "gate.execute.command"
Commands = argparse._SubParsersAction


def main(args: argparse.Namespace) -> int:
    return run(args)


def register(subparsers: Commands[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "gate", "compile every Triton kernel for every architecture, without a GPU",
        (
            "gate --brief", "gate --arch sm_90 sm_103", "gate --brief --json gate.json",
            "gate execute --brief", "gate fill-cache build/carry --extension",
        ),
        main,
    )  # fmt: skip
    parser.description = about
    add_arguments(parser)
    others = parser.add_subparsers(metavar="COMMAND", title="other commands")
    _register_execute(others)
    filling = others.add_parser(
        "fill-cache", help="compile what a campaign will launch into a folder to carry",
        description=fill.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    fill.add_arguments(filling)
    filling.set_defaults(main=fill.main)


def _missing(args: argparse.Namespace) -> int:
    raise Refusal(rooms.missing("gate execute"))


def _register_execute(subparsers: Commands[argparse.ArgumentParser]) -> None:
    if not rooms.has(_EXECUTE):
        subparsers.add_parser("execute", help="needs a checkout").set_defaults(main=_missing)
        return
    command = importlib.import_module(".execute.command", __package__)
    execute = subparser(
        subparsers, "execute", "run every compiled kernel on a CPU and judge its numbers",
        ("gate execute --brief", "gate execute --arch sm_90 --match 'moe_.* tile'"),
        command.run,
    )  # fmt: skip
    execute.description = command.__doc__
    command.add_arguments(execute)
