"""The rows of csrc/cutlass/: which kernels they are, and why no bound is derived of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .row import Bound

SOURCE = "cutlass"
WHY = "the bytes of its parameters are made by CUTLASS's host code, which is not run here"
_TILES = {"linear_act_fwd": "128x256x64", "gated_linear_fwd": "128x128x64"}
_SCHEDULES = {"sm_90": "12 warps, cooperative", "sm_100": "8 warps, persistent"}


def rows(items: dict[str, Path]) -> Iterator[Bound]:
    """Those of the objects that a build has, by the stems of their sources."""
    for arch, schedule in _SCHEDULES.items():
        if f"cutlass_{arch.replace('_', '')}" in items:
            for kernel, tile in _TILES.items():
                for variant in ("train", "infer"):
                    yield Bound(arch, kernel, SOURCE, f"{tile}, {schedule}", variant, why=WHY)
