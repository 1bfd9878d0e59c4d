"""The command line: `python -m fusedmlp.bench [subcommand]`.

Every subcommand lives in its own module and enters the tree through `register(subparsers)`, which
adds a parser with `set_defaults(main=...)`; main takes the parsed arguments and returns the exit
code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from . import overview
from .options import Refusal

# Modules with a subcommand, in the order of --help.
COMMANDS = (
    "check",
    "timing.command",
    "predict",
    "campaign.command",
    "timing.tune",
    "report.command",
    "report.plots",
    "experiments.table",
    "experiments.lm",
)

EPILOG = """\
examples:
  python -m fusedmlp.bench                       what is here, errors, times or computed times
  python -m fusedmlp.bench --model llama3-8b     the same at that model's widths
  python -m fusedmlp.bench check --dtype float16
  python -m fusedmlp.bench time --case gated_mlp --m 4096 --json times.json
  python -m fusedmlp.bench COMMAND --help

Gates that need no GPU are modules of their own: python -m fusedmlp.bench.gate.kernels (kernels/)
and python -m fusedmlp.bench.gate.csrc (csrc/).
"""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m fusedmlp.bench",
        description="Errors, times and computed times of fusedmlp's kernels on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.configure(root)
    subparsers = root.add_subparsers(metavar="COMMAND", title="commands")
    for name in COMMANDS:
        importlib.import_module(f".{name}", __package__).register(subparsers)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.main(args) or 0)
    except Refusal as refusal:
        print(f"fusedmlp.bench: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `... | head` closed the pipe: not our fault, and no traceback's worth.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
