"""Rows of hyper_attention's kernels: walks of single pieces of their work.

The launches are the real ones at the sizes that the gate compiles, 4 x 4096 tokens of width 1024.
Each is walked as if it had a block for each piece, so that a block takes one and ends: `each` is a
piece beside its visits, `step` a visit, a tile of 64 sources. Their products are a triangle, so a
row's depth is T.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from ....kernels.arch import Arch
from ....kernels.launches import hyper
from ....kernels.launches.hyper import RANK, TOKENS
from ...occupancy import blocks_at_once
from .calls import ALIKE, HALVES, OP, PARTS, VARIANTS, Part, Piece, Size, tile_of
from .derive import Passed, passed
from .launches import Caught, binary, caught
from .machine import MACHINES
from .row import Bound
from .values import Unreadable

# Visits of the pieces that are walked: even tiles and odd ones differ, so each has as many of both.
VISITS = (2, 6)
NONE: Piece = (-1, False)
FLOAT, HALF = 4, 2  # bytes


def _moved(part: Part, size: Size) -> float:
    """Bytes of device memory that a tile of a kernel without products moves, whatever L2 holds: of
    dO, O and the norm's coefficient, or of c, dz, and dz times c."""
    rows = tile_of(size.arch, part).block_m
    if part.name == "coefficient":
        return rows * (2 * HALF * size.shapes["v"][-1] + 2 * FLOAT)
    return rows * RANK * (2 * HALF + FLOAT)


def _call(half: str, variant: str) -> Callable[[], object]:
    """The gate's own."""
    launch, *_ = {"forward": hyper.FORWARD, "backward": hyper.BACKWARD}[half]
    extras = itertools.chain(launch.everywhere(), launch.extras())
    return next(call for name, _, call in extras if name == variant)


def _launches(arch: Arch, half: str, variant: str) -> dict[str, Caught]:
    """One launch of each kernel; Unreadable where they are not what calls.py says."""
    size = Size(arch, TOKENS, VARIANTS[variant])
    expected = list(size.launches(half))
    made = caught(arch, size.machine.multiprocessors, _call(half, variant))
    if len(made) != len(expected):
        raise Unreadable(f"{half} has {len(made)} launches, expected {len(expected)}")
    found: dict[str, Caught] = {}
    for one, (part, chunk) in zip(made, expected, strict=True):
        _, programs = size.work(part, chunk)
        if (one.kernel.rpartition(".")[2], one.grid[0]) != (part.kernel, programs):
            raise Unreadable(
                f"{one.kernel} has {one.grid[0]} blocks, expected {part.kernel} with {programs}"
            )
        found.setdefault(part.row, one)
    return found


def bounds(arch: Arch, wanted: Callable[[Bound], bool] = lambda first: True) -> Iterator[Bound]:
    """Every kernel of both halves of a call; wanted: asked with each row before it is derived."""
    for variant, half in itertools.product(VARIANTS, HALVES):
        rows = [
            (Bound(arch.name, p.row, "triton", str(tile_of(arch, p)), variant), p)
            for p in PARTS[half]
        ]
        rows = [(first, part) for first, part in rows if wanted(first)]
        if not rows:
            continue
        try:
            launches = _launches(arch, half, variant)
        except Unreadable as error:
            yield from (dataclasses.replace(first, why=str(error)[:300]) for first, _ in rows)
            continue
        for first, part in rows:
            try:
                yield _derived(first, arch, part, launches[part.row])
            except Unreadable as error:
                yield dataclasses.replace(first, why=str(error)[:300])


def _walker(arch: Arch, part: Part, variant: str, launch: Caught) -> Callable[[Piece], Passed]:
    """What a block of one such piece takes; of a piece that there is not, what all blocks take."""
    size = Size(arch, TOKENS, VARIANTS[variant])
    chunk = next(chunk for other, chunk in size.launches(_half(part)) if other is part)
    pieces = size.pieces(part, chunk)
    single = dataclasses.replace(launch, grid=(len(pieces), 1, 1))

    def walked(piece: Piece) -> Passed:
        index = pieces.index(piece) if piece in pieces else len(pieces)
        return passed(single, MACHINES[arch.name], arch.name, (index, 0, 0))

    return walked


def walker(arch: Arch, kernel: str, variant: str) -> Callable[[Piece], Passed]:
    """The same by a row's name."""
    part = next(part for parts in PARTS.values() for part in parts if part.row == kernel)
    return _walker(arch, part, variant, _launches(arch, _half(part), variant)[kernel])


def _derived(first: Bound, arch: Arch, part: Part, launch: Caught) -> Bound:
    machine, tile = MACHINES[arch.name], tile_of(arch, part)
    walked = _walker(arch, part, first.variant, launch)
    registers = binary(launch.cubin).layout.registers
    known = dataclasses.replace(
        first, warps=launch.warps, persistent=part.stay is not None,
        blocks=blocks_at_once(arch, tile, registers, launch.shared, launch.tensor_memory),
    )  # fmt: skip
    if not part.looped:
        one = walked(ALIKE)
        nothing = one.scaled(0)
        return dataclasses.replace(
            known, block=(tile.block_m, 1, 1), launch=nothing.clocks, each=one.clocks,
            step=nothing.clocks, counts=one.counts, step_counts=nothing.counts,
            moved=_moved(part, Size(arch, TOKENS, VARIANTS[first.variant])),
        )  # fmt: skip
    low, high = VISITS
    start, short = walked(NONE), walked((low, False))
    step = (walked((high, False)) - short).scaled(1 / (high - low))
    each = short - step.scaled(low) - start
    further = (walked((low, True)) - short).clocks if part.segment else {}
    side = tile.block_m
    width = step.clocks["tensor"] * machine.tensor / (2.0 * side * side)
    if abs(width - round(width)) > 0.02 or not round(width):
        raise Unreadable(f"a visit multiplies {width:.3f} columns: no whole number")
    return dataclasses.replace(
        known, block=(side, round(width), side), products=1, triangle=True,
        segment=part.segment, launch=start.clocks, each=each.clocks, step=step.clocks,
        further=further, counts=each.counts, step_counts=step.counts,
    )  # fmt: skip


def _half(part: Part) -> str:
    return next(half for half, parts in PARTS.items() if part in parts)


__all__ = ["OP", "VARIANTS", "bounds", "walker"]
