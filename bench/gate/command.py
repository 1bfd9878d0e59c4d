"""`gate`: the ahead-of-time gate of the Triton kernels as a subcommand of the bench; `gate
execute`, which runs what it compiles, `gate bound`, which says how fast it can be, and `gate
fill-cache`, which keeps it."""

from __future__ import annotations

import argparse
import importlib

from .. import rooms
from ..options import Refusal, subparser
from . import fill
from .kernels import __doc__ as about, add_arguments, run

__all__ = ["main", "register"]

# Commands that need a checkout: what each does, and how it is called.
_OTHERS = {
    "execute": (
        "run every compiled kernel on a CPU and judge its numbers",
        ("gate execute --brief", "gate execute --arch sm_90 --match 'moe_.* tile'"),
    ),
    "bound": (
        "an upper bound of each kernel's speed, computed from its machine code",
        ("gate bound --arch sm_90 --kernel gated_linear_fwd", "gate bound --update"),
    ),
}
Commands = argparse._SubParsersAction


def main(args: argparse.Namespace) -> int:
    return run(args)


def register(subparsers: Commands[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "gate", "compile every Triton kernel for every architecture, without a GPU",
        (
            "gate --brief", "gate --arch sm_90 sm_103", "gate --brief --json gate.json",
            "gate execute --brief", "gate bound --arch sm_90",
            "gate fill-cache build/carry --extension",
        ),
        main,
    )  # fmt: skip
    parser.description = about
    add_arguments(parser)
    others = parser.add_subparsers(metavar="COMMAND", title="other commands")
    for name in _OTHERS:
        _register(others, name)
    filling = others.add_parser(
        "fill-cache", help="compile what a campaign will launch into a folder to carry",
        description=fill.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    fill.add_arguments(filling)
    filling.set_defaults(main=fill.main)


def _register(others: Commands[argparse.ArgumentParser], name: str) -> None:
    if not rooms.has(f"gate.{name}.command"):

        def missing(args: argparse.Namespace) -> int:
            raise Refusal(rooms.missing(f"gate {name}"))

        others.add_parser(name, help="needs a checkout").set_defaults(main=missing)
        return
    command = importlib.import_module(f".{name}.command", __package__)
    parser = subparser(others, name, *_OTHERS[name], command.run)
    parser.description = command.__doc__
    command.add_arguments(parser)
