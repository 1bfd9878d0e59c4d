"""What is proved: the launches of the kernels' rows, on sm_80, at sizes around their tiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fusedmlp import ops  # noqa: F401  (its files enter their kernels' rows)
from fusedmlp.backends.op import KERNELS
from fusedmlp.kernels.arch import ARCHES, Arch
from fusedmlp.kernels.arch.tile import Tile
from fusedmlp.kernels.launch import Launch, Size

ARCH = ARCHES["sm_80"]
SIZE_OF_BF16 = 2
WITHOUT_TILES = (37, 8, 96), (37, 8, 101)  # several blocks of 2048 elements, the last ragged
LAUNCHES: dict[str, Launch] = {
    launch.name: launch
    for kernel in KERNELS.values()
    for launch in kernel.launches
    if launch.call is not None
}


@dataclass(frozen=True)
class Job:
    """One launch with one tile of its table, if it has a table, at one size."""

    launch: Launch
    arch: Arch
    tile: str
    size: Size


def names() -> list[str]:
    return list(LAUNCHES)


def _sizes(tile: Tile) -> tuple[int, int, int]:
    """Two tiles along M and H and two trips of the loop, rows on 16 bytes; of a tile that loads
    elements one ragged tile and two trips, for its proof takes longer."""
    m = 13 if tile.skinny else tile.block_m
    if tile.loads == "element":
        return (m if tile.skinny else m - 3), tile.block_k + 3, tile.block_n - 3
    return (m if tile.skinny else m + 6), tile.block_k + 8, tile.block_n + 8


def jobs(wanted: list[str], every: bool) -> Iterator[Job]:
    """The smallest tile of each kind, by its loads and whether it is skinny; or every tile. A call
    that several rows share, as hyper_attention's, is one job."""
    called = set()
    for name in wanted or names():
        launch = LAUNCHES[name]
        if (name, SIZE_OF_BF16) not in ARCH.tiles:
            if launch.call not in called:
                for size in (launch.checked,) if launch.reference else WITHOUT_TILES:
                    yield Job(launch, ARCH, "", size)
            called.add(launch.call)
            continue
        kinds = set()
        for tile in reversed(ARCH.tiles[name, SIZE_OF_BF16]):
            kind = tile.loads, tile.skinny
            if every or kind not in kinds:
                arch = ARCH.with_row(name, SIZE_OF_BF16, (tile,))
                yield Job(launch, arch, str(tile), _sizes(tile))
            kinds.add(kind)


def without_barrier(ptx: str, number: int) -> str | None:
    """The PTX less its barrier of that number, counted from 0; None where it has fewer."""
    found = list(re.finditer(r"bar\.sync[^;]*;", ptx))
    if number >= len(found):
        return None
    return ptx[: found[number].start()] + ptx[found[number].end() :]
