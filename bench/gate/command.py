"""`gate`: the ahead-of-time gate of the Triton kernels as a subcommand of the bench."""

from __future__ import annotations

import argparse

from ..options import subparser
from .kernels import __doc__ as about, add_arguments, run as main

__all__ = ["main", "register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "gate", "compile every Triton kernel for every architecture, without a GPU",
        ("gate --brief", "gate --arch sm_90 sm_103", "gate --brief --json gate.json"),
        main,
    )  # fmt: skip
    parser.description = about
    add_arguments(parser)
