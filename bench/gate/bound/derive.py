"""A kernel's bound from its machine code: walks of one block over tiles of two depths.

A block's time over n tiles of depth K is taken as launch + n (tile + step K / block_k): walks of
one and of two tiles, of two depths each, give the three.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ....backends.op import KERNELS, Kernel
from ....kernels.arch import Arch
from ....kernels.arch.tile import SKINNY_M, Tile
from ....kernels.launch import Launch, Size, Tensors, dtype_of, empty
from ...occupancy import blocks_at_once
from .launches import Binary, Caught, binary, caught
from .machine import (
    FP32,
    INTEGER,
    L2_BYTES,
    MACHINES,
    MULTIPLY,
    PRODUCTS,
    SCHEDULERS,
    SHARED_BYTES,
    SPECIAL,
    Machine,
)
from .row import Bound, Clocks
from .timeline import Timeline
from .values import Unreadable
from .walk import Walk

DEPTHS = (512, 1024)  # what is walked
SKINNY_DEPTHS = (2048, 4096)  # which K parts of a skinny product divide evenly
# Weights of fewer columns are walked deeper: Blackwell takes no tensor map of less than 128 KB.
WIDE = 128


@dataclass(frozen=True)
class Passed:
    """One block's way: clocks of a multiprocessor that each unit was busy for it, the time of its
    own order, and counts."""

    clocks: Clocks
    counts: Clocks

    def __sub__(self, other: Passed) -> Passed:
        return Passed(_less(self.clocks, other.clocks), _less(self.counts, other.counts))

    def scaled(self, by: float) -> Passed:
        return Passed(
            *({k: v * by for k, v in part.items()} for part in (self.clocks, self.counts))
        )

    def __add__(self, other: Passed) -> Passed:
        return self - other.scaled(-1)


def _less(a: Clocks, b: Clocks) -> Clocks:
    return {name: value - b[name] for name, value in a.items()}


@functools.lru_cache(64)
def _walk(binary_of: int, machine: str) -> Walk:
    return Walk(_CODES[binary_of].code, MACHINES[machine])


_CODES: dict[int, Binary] = {}


def together(roles: Sequence[Passed]) -> Passed:
    """Warps of several roles in one block: what they share adds up, their orders run side by
    side."""
    clocks = {u: sum(r.clocks[u] for r in roles) for u in roles[0].clocks}
    clocks["order"] = max(r.clocks["order"] for r in roles)
    counts = {u: max(r.counts[u] for r in roles) for u in roles[0].counts}
    return Passed(clocks, counts)


def passed(launch: Caught, machine: Machine, arch: str, block: tuple[int, int, int]) -> Passed:
    """Walk the first warp of a kernel whose warps run alike, as all of Triton's do."""
    read = binary(launch.cubin)
    _CODES[id(read)] = read
    given = dataclasses.replace(launch.launched(), block=block)
    counts, line = _walk(id(read), arch).run(given, 0, launch.warps)
    return busy(read, counts, line, launch.warps, machine)


def busy(read: Binary, counts: list[int], line: Timeline, warps: int, machine: Machine) -> Passed:
    issued = dict.fromkeys(("all", "integer", "fp32", "multiply", "special", "BAR", "LDG"), 0)
    for n, i in zip(counts, read.code.instructions, strict=True):
        issued["all"] += n
        issued["integer"] += n * (i.stem in INTEGER)
        issued["fp32"] += n * (i.stem in FP32)
        issued["multiply"] += n * (i.stem in MULTIPLY)
        issued["special"] += n * (i.stem in SPECIAL)
        issued["BAR"] += n * (i.stem == "BAR")
    each, totals = warps / SCHEDULERS, line.totals
    clocks = {
        "order": line.end,
        "tensor": each * totals.tensor,
        "issue": each * issued["all"],
        "integer": each * machine.integer * issued["integer"],
        "fp32": each * machine.fp32 * issued["fp32"],
        "multiply": each * machine.integer * issued["multiply"],
        "special": each * machine.special * issued["special"],
        "shared": (warps * totals.shared + totals.once) / SHARED_BYTES,
        "L2": (warps * totals.l2 + totals.once) / L2_BYTES,
    }
    main = main_loop(read, counts)
    numbers = {
        "instructions": issued["all"], "barriers": issued["BAR"], "drains": line.drains,
        "exposed": line.exposed, "trips": counts[main] if main is not None else 0,
        "inner waits": _waits(read, counts),
    }  # fmt: skip
    return Passed(clocks, numbers)


def main_loop(read: Binary, counts: list[int]) -> int | None:
    """The head of the innermost loop that issues most products."""

    def products(body: frozenset[int]) -> int:
        return sum(counts[k] for k in body if read.code.instructions[k].stem in PRODUCTS)

    loops = [loop for loop in read.loops if counts[loop.head]]
    most = max((products(loop.body) for loop in loops), default=0)
    able = [loop for loop in loops if most and products(loop.body) * 2 > most]
    return min(able, key=lambda loop: len(loop.body)).head if able else None


def _waits(read: Binary, counts: list[int]) -> int:
    """Waits for every product at once, WARPGROUP.DEPBAR 0."""
    return sum(
        n
        for n, i in zip(counts, read.code.instructions, strict=True)
        if i.stem == "WARPGROUP" and "DEPBAR" in i.parts and i.operands[-1] == "0x0"
    )


def sizes(kernel: Kernel, launch: Launch, tile: Tile, tiles: int, K: int) -> Size:
    """(M, D, H, ...) of a result of `tiles` tiles in one row, K deep."""
    assert kernel.result is not None and kernel.depth is not None
    found = {kernel.result[0]: tile.block_m, kernel.result[1]: tile.block_n * tiles}
    found[kernel.depth] = K
    if kernel.name == "moe_wgrad":
        found["M"] = K
    rest = list(launch.size[3:])
    if kernel.grouped:
        rest = [1]  # one expert has all rows
    return (found["M"], found["D"], found["H"], *rest)


def _operands(launch: Launch, kernel: Kernel, size: Size) -> Tensors:
    made = empty(launch, size, torch.bfloat16)
    if kernel.grouped:
        rows = size[0]
        made["tokens"] = torch.arange(rows, dtype=torch.int32)
        made["offsets"] = torch.tensor([0, rows, rows], dtype=torch.int32)
    return made


def _caught(
    arch: Arch, kernel: Kernel, launch: Launch, tile: Tile, variant: str, size: Size
) -> list[Caught]:
    assert launch.call is not None
    operands = _operands(launch, kernel, size)
    named = ("silu",) if launch.activated else ()
    call = functools.partial(launch.call, operands, variant == "train", *named)
    return caught(arch, 1, call, tiles={(launch.name, 2): (tile,)})


def _weights(launch: Launch, size: Size) -> int:
    return sum(
        math.prod(shape) * dtype_of(name, torch.bfloat16).itemsize
        for name, shape in launch.shapes(*size).items()
        if name.startswith(("w", "q_", "s_", "planes"))
    )


def derive(arch: Arch, kernel: Kernel, launch: Launch, tile: Tile, variant: str) -> Bound:
    """The bound of the product that the launch makes with this tile; of what cannot be read, a row
    that says why."""
    first = Bound(arch.name, launch.name, "triton", str(tile), variant)
    try:
        return _derived(first, arch, kernel, launch, tile)
    except Unreadable as error:
        return dataclasses.replace(first, why=str(error)[:300])


def _derived(first: Bound, arch: Arch, kernel: Kernel, launch: Launch, tile: Tile) -> Bound:
    machine = MACHINES[arch.name]
    rows = min(tile.block_m, SKINNY_M) if tile.skinny else tile.block_m
    passes: dict[tuple[int, int], Passed] = {}
    one: Caught | None = None
    persistent = False
    depths = SKINNY_DEPTHS if tile.skinny else DEPTHS
    if tile.tma and tile.block_n < WIDE:
        depths = depths[0] * 2, depths[1] * 2
    for K in depths:
        for tiles in (1, 2):
            # So many tiles for each block of a multiprocessor, if they stay.
            size = sizes(kernel, launch, tile, tile.blocks * tiles, K)
            made = _caught(arch, kernel, launch, tile, first.variant, size)
            one = made[0]
            persistent = one.grid[0] == tile.blocks and tile.tma
            passes[tiles, K] = passed(one, machine, arch.name, (0, 0, 0))
            if not persistent:
                break
    assert one is not None
    low, high = depths
    parts = 1
    if persistent:
        marginal = [passes[2, K] - passes[1, K] for K in depths]
    else:
        # Skinny products cut K into parts: a block has its share of the steps.
        marginal = [passes[1, K] for K in depths]
        parts = one.grid[1] if tile.skinny else 1
    n = [math.ceil(K / tile.block_k) / parts for K in depths]
    step = (marginal[1] - marginal[0]).scaled(1 / (n[1] - n[0]))
    each = marginal[0] - step.scaled(n[0])
    start = passes[1, low] - marginal[0]
    m, width = rows, tile.block_n
    flops = step.clocks["tensor"] * machine.tensor / (2.0 * m * width * tile.block_k)
    counted = (kernel, launch, tile)
    per_step = (
        (_weights(launch, sizes(*counted, 3, high)) - _weights(launch, sizes(*counted, 2, high)))
        * tile.block_k
        / high
    )
    registers = binary(one.cubin).layout.registers
    if not tile.skinny and abs(flops - round(flops)) > 0.02 or not round(flops):
        raise Unreadable(
            f"a step multiplies {flops:.3f} times {m} x {width} x {tile.block_k}: no whole number"
        )
    blocks = blocks_at_once(arch, tile, registers, one.shared, one.tensor_memory)
    return dataclasses.replace(
        first, block=(m, width, tile.block_k), products=round(flops),
        blocks=min(blocks, tile.blocks) if persistent else blocks,
        warps=one.warps, persistent=persistent, skinny=tile.skinny or tile.few, launch=start.clocks,
        each=each.clocks, step=step.clocks, counts=each.counts, step_counts=step.counts,
        step_weights=per_step,
    )  # fmt: skip


def variants(arch: Arch, launch: Launch, tile: Tile) -> tuple[str, ...]:
    """Training, and what inference compiles of the first tile."""
    return ("train", "infer") if tile == arch.tiles[launch.name, 2][0] else ("train",)


def all_bounds(arch: Arch, wanted: Callable[[Bound], bool] = lambda first: True) -> Iterator[Bound]:
    """Every product with tiles; wanted: asked with each row before it is derived."""
    for kernel in KERNELS.values():
        for launch in kernel.launches if kernel.result else ():
            for tile in arch.tiles.get((launch.name, 2), ()):
                for variant in variants(arch, launch, tile):
                    first = Bound(arch.name, launch.name, "triton", str(tile), variant)
                    if wanted(first):
                        yield derive(arch, kernel, launch, tile, variant)
