"""What the ahead-of-time gate compiles: calls of the real launchers at real sizes, as the rows of
kernels tell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import ops  # noqa: F401  (its files enter their kernels' rows)
from ...backends.op import KERNELS
from ...kernels.arch import Arch
from ...kernels.arch.tile import SKINNY_M, Tile
from ...kernels.launch import Extra, Launch, Size, empty
from ...reference.activations import resolve


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a launcher, planned for one tile of one architecture. kernel: the registered op
    that the call belongs to."""

    arch: Arch
    dtype: torch.dtype
    variant: str
    call: Callable[[], Any]
    key: tuple[str, int] | None = None
    tile: Tile | None = None
    kernel: str = ""

    @property
    def name(self) -> str:
        """The row of tiles that it is of; of a kernel without tiles its own name."""
        return self.key[0] if self.key else self.kernel


def _call(
    launch: Launch, size: Size, dtype: torch.dtype, training: bool, activation: str
) -> Callable[[], Any]:
    assert launch.call is not None, f"{launch.name} has a size and no call"
    named = (activation,) if launch.activated else ()
    return functools.partial(launch.call, empty(launch, size, dtype), training, *named)


def _tile_jobs(arch: Arch, launch: Launch, size: int, activations: list[str]) -> Iterator[Job]:
    """Each tile of the table for elements of `size` bytes."""
    key = (launch.name, size)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    for tile in arch.tiles[key]:
        sizes = launch.size if tile.loads != "element" else launch.ragged
        sizes = (SKINNY_M, *sizes[1:]) if tile.skinny else sizes

        def job(variant: str, activation: str, dtype: torch.dtype, training: bool) -> Job:
            call = _call(launch, sizes, dtype, training, activation)  # noqa: B023
            return Job(arch, dtype, variant, call, key, tile)  # noqa: B023

        yield job("train", "silu", dtype, True)
        if tile == arch.tiles[key][0] and arch.thorough:
            yield job("infer", "silu", dtype, False)
            if size == 2:
                yield job("train", "silu", torch.float16, True)
        if tile == arch.tiles[key][0] and size == 2 and launch.activated:
            for name in activations:
                if launch.gated or resolve(name).row.up is None:
                    yield job(name, name, dtype, True)


def _launch_jobs(arch: Arch, launch: Launch, activations: list[str]) -> Iterator[Job]:
    tiled = [size for name, size in arch.tiles if name == launch.name]
    key = (launch.name, 2) if tiled else None

    def extra(variant: str, dtype: torch.dtype, call: Callable[[], Any]) -> Job:
        return Job(arch, dtype, variant, call, key)

    for size in tiled:
        yield from _tile_jobs(arch, launch, size, activations)
    if launch.size and not tiled:
        for dtype in launch.dtypes:
            yield extra("train", dtype, _call(launch, launch.size, dtype, True, "silu"))
    extras: list[Extra] = list(launch.everywhere())
    if arch.thorough:
        for variant, sizes in launch.odd.items():
            call = _call(launch, sizes, torch.bfloat16, True, "silu")
            extras.append((variant, torch.bfloat16, call))
        extras += launch.extras()
    for made in extras:
        yield extra(*made)


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    """Every job of one architecture. activations: those that the first tiles are compiled with."""
    for kernel in KERNELS.values():
        for launch in kernel.launches:
            for job in _launch_jobs(arch, launch, activations):
                yield dataclasses.replace(job, kernel=kernel.name)
