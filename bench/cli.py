"""The command line: `fusedmlp bench [COMMAND]`.

Every command lives in its own module and enters the tree through `register(subparsers)`, which adds
a parser with `set_defaults(main=...)`; main takes the parsed arguments and returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import overview, rooms
from .options import INTERRUPTED, PROG, Refusal

# Commands and their modules, in the order of --help.
COMMANDS = {
    "check": "check",
    "time": "timing.command",
    "cpu": "cpu.command",
    "predict": "predict",
    "tune": "timing.tune",
    "gate": "gate.command",
    "campaign": "campaign.command",
    "report": "report.command",
    "plots": "report.plots",
    "table": "experiments.table",
    "lm": "experiments.lm",
    "patch-sweep": "experiments.patch_sweep",
}

EPILOG = f"""\
exit code: 0 all is right, 1 something is wrong, 2 wrong usage, 130 interrupted

examples:
  {PROG}                       errors of every op, times or computed times
  {PROG} --model llama3-8b     the same at that model's widths
  {PROG} --verbose             every row of it
  {PROG} check --dtype float16
  {PROG} time --case gated_mlp --m 4096 --json times.json
  {PROG} COMMAND --help

The gate of csrc/ is a module of its own: python -m fusedmlp.bench.gate.csrc (in a checkout).
"""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog=PROG,
        description="Errors, times and computed times of fusedmlp's kernels on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.configure(root)
    subparsers = root.add_subparsers(metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        if rooms.has(module):
            importlib.import_module(f".{module}", __package__).register(subparsers)
        else:
            subparsers.add_parser(name, help="needs a checkout")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Before its arguments are read: only its own room knows them.
        name = arguments[0] if arguments else ""
        if name in COMMANDS and not rooms.has(COMMANDS[name]):
            raise Refusal(rooms.missing(name))
        args = parser().parse_args(arguments)
        return int(args.main(args) or 0)
    except Refusal as refusal:
        print(f"{PROG}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted, and nothing was kept: type it again", file=sys.stderr)
        return INTERRUPTED
