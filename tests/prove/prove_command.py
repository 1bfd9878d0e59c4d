"""The arguments, and the environment of each tool, made from PyPI under build/prove."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "prove"
SENTRYWARD, TTSEM = "sentryward==0.1.1", "ttsem[triton]==0.1.0"


class Refusal(RuntimeError):
    """An end whose message is all that a user needs."""


def environment(requirement: str, python: str) -> Path:
    """The folder of programs of an environment that holds `requirement`, made where it is not."""
    name = requirement.partition("=")[0].partition("[")[0]
    programs = FOLDER / name / "bin"
    has = [programs / "python", "-c", f"import {name}"]
    if programs.exists() and not subprocess.run(has, capture_output=True).returncode:
        return programs
    made = subprocess.run(
        [python, "-m", "venv", "--clear", programs.parent], capture_output=True, text=True
    )
    if not made.returncode:
        install = [programs / "python", "-m", "pip", "install", "--quiet", requirement]
        made = subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        said = (made.stderr.strip() or made.stdout.strip() or "no reason given").splitlines()[-1]
        raise Refusal(f"needs {requirement} from PyPI, which did not install: {said}")
    return programs


def modern_python() -> str:
    floors = importlib.import_module("floors")
    found: str = floors.python((12, 13))
    minor = subprocess.run(
        [found, "-c", "import sys; print(sys.version_info.minor)"], capture_output=True, text=True
    )
    if int(minor.stdout) not in (12, 13):
        raise Refusal(f"values needs {TTSEM}, which needs Python 3.12 or 3.13; neither is here")
    return found


def values(args: argparse.Namespace) -> int:
    programs = environment(TTSEM, modern_python())
    script = [Path(__file__).parent / "prove_values.py", *args.kernel]
    return subprocess.run(
        [programs / "python", "-m", "ttsem.sanitize", "--cc", "80", *script],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{script[0].parent}"}, cwd=ROOT,
    ).returncode  # fmt: skip


def races(args: argparse.Namespace) -> int:
    command = importlib.import_module("prove_races")
    tool = environment(SENTRYWARD, sys.executable) / "sentryward"
    failed: int = command.run(tool, args.kernel, args.every, args.limit, args.mutant)
    return failed


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tests/prove", description="Prove the kernels of sm_80.")
    made.add_argument(
        "tool", nargs="?", choices=("races", "values"), default="races",
        help="races: SentryWard on the PTX, the default; values: ttsem on Triton's IR, 6 GB",
    )  # fmt: skip
    made.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these launches")
    made.add_argument("--every", action="store_true", help="every tile, not one of each kind")
    made.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for each proof")
    made.add_argument(
        "--mutant", type=int, nargs="?", const=0, metavar="K",
        help="take the K-th barrier out of each kernel: one that is still proved fails",
    )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    try:
        known = importlib.import_module("prove_launches").names()
        if unknown := set(args.kernel) - set(known):
            raise Refusal(
                f"--kernel must be of {', '.join(known)}; got {', '.join(sorted(unknown))}"
            )
        if args.limit <= 0:
            raise Refusal(f"--limit must be a number of seconds above 0; got {args.limit}")
        return {"races": races, "values": values}[args.tool](args)
    except Refusal as refusal:
        print(f"tests/prove: {refusal}", file=sys.stderr)
        return 2
