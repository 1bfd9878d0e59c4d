"""An upper bound of what each kernel can reach, from its machine code, without a GPU.

The real launchers run on CPU tensors for a GPU that is not there; one block of each kernel is
walked instruction by instruction with the launch's own parameters, so that trip counts are
executed; and a timeline of pipes, scoreboards and barriers says how long the block takes at least.
A row is the share of the tensor cores' peak (of the memory's bandwidth for few rows) that a
tile of depth K can reach at best, and the unit that limits it; hyper_attention's kernels, whose
depth is T, are followed by its whole calls. A bound that is more than 2 % below the committed
table's, a kernel that is not in it, or one that cannot be read, is an error.

Everything printed is computed; nothing is measured. bench/gate/bound/README.md has the model, what
it assumes, and how far it is from kernels whose speed is published. csrc/'s kernels are read from
the last build, where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import triton

from ....kernels.arch import ARCHES
from ...options import Refusal, writable, write_text
from ..compiling import unknown
from ..csrc import BUILD, BuildError, compiler, objects
from . import csrc, cutlass, hyper, table
from .calls import calls
from .derive import all_bounds
from .machine import MACHINES
from .row import Bound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=MACHINES, help="default: all of these")
    parser.add_argument(
        "--kernel", nargs="+", default=(), metavar="NAME",
        help="only these; hyper_attention is all of a call's",
    )  # fmt: skip
    parser.add_argument("--tile", metavar="TEXT", default="", help="only tiles whose name has it")
    parser.add_argument("--build", type=Path, default=BUILD, help="CMake's build folder")
    parser.add_argument(
        "--update", action="store_true", help="write what was derived into the committed table"
    )
    parser.add_argument(
        "--markdown", metavar="FILE", type=writable, help="also write it as a table"
    )


def _triton(args: argparse.Namespace) -> Iterator[Bound]:
    def wanted(first: Bound) -> bool:
        names = {first.kernel, hyper.OP if first.variant in hyper.VARIANTS else first.kernel}
        return (not args.kernel or not names.isdisjoint(args.kernel)) and args.tile in first.tile

    for name in args.arch or MACHINES:
        if why := unknown(ARCHES[name]):
            raise Refusal(f"{why}: use a newer Triton, or another --arch")
        yield from all_bounds(ARCHES[name], wanted)
        yield from hyper.bounds(ARCHES[name], wanted)


def _csrc(args: argparse.Namespace) -> Iterator[Bound]:
    rows = [
        row
        for row in csrc.ROWS
        if row.arch in (args.arch or MACHINES) and (not args.kernel or row.kernel in args.kernel)
    ]
    try:
        items = {item.name.removesuffix(".cu.o"): item for item in objects(args.build)}
    except BuildError as error:
        print(f"csrc/ is left out: {error}")
        return
    for row in rows:
        for training in (True, False):
            yield csrc.derive(items[row.source], row, training)
    for bound in cutlass.rows(items):
        named = not args.kernel or bound.kernel in args.kernel
        if named and bound.arch in (args.arch or MACHINES):
            yield bound


def run(args: argparse.Namespace) -> int:
    """Derive, print, compare; 1 where a bound has fallen."""
    if triton.knobs.runtime.interpret:
        raise Refusal("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    found = []
    print(f"Upper bounds: {table.COMPUTED}")
    print(" | ".join(table.HEADER))
    for make in (_triton, _csrc):
        for bound in make(args):
            found.append(bound)
            print(" | ".join(table.cells(bound)), flush=True)
    for call in calls(found):
        print(" | ".join(table.cells(call)))
    before = table.read()
    if args.markdown:
        write_text(args.markdown, table.markdown(found) + "\n")
    if args.update:
        kept = {b.key: b for b in before if _has_tile(b)}
        kept |= {b.key: b for b in found if b.source != cutlass.SOURCE}
        table.write(kept.values(), {"triton": triton.__version__, "nvcc": _nvcc(args.build)})
        before = list(kept.values())
    worse = table.fallen([b for b in found if b.source != cutlass.SOURCE], before)
    for line in worse:
        print(f"worse: {line}")
    print(f"{len(found)} bounds computed, {len(worse)} worse than the table or not derived")
    return 1 if worse else 0


def _has_tile(bound: Bound) -> bool:
    """Whether its tile is one that a launch may still take. csrc's are in its sources, and kernels
    of hyper_attention that have no row of tiles take another's."""
    row = ARCHES[bound.arch].tiles.get((bound.kernel, 2))
    return bound.source != "triton" or row is None or bound.tile in map(str, row)


def _nvcc(build: Path) -> str:
    return compiler(build) if (build / "build.ninja").exists() else "no build"
