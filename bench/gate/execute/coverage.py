"""Which kernels, tiles and dtypes of which architectures were executed, and which were not."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Sequence

from triton.runtime.jit import JITFunction

from .... import kernels
from ....kernels.arch import Arch
from ..ptx.driver import label
from .executing import Executed
from .jobs import DTYPES

__all__ = ["functions", "missing"]


@functools.cache
def functions() -> set[str]:
    """Every kernel of kernels/ by the name that a run has: what a launcher may start."""
    found = set()
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel"):
                found.add(label(value))
    return found


def missing(arches: Iterable[Arch], rows: Sequence[Executed]) -> list[str]:
    """One line for each tile of a table, and each kernel, that no row executed."""
    lines = []
    for arch in arches:
        own = [row for row in rows if row.arch == arch.name]
        done = {(row.kernel, row.tile, row.dtype) for row in own if row.what == "tile"}
        for table in (arch.tiles, arch.hyper):
            for (kernel, size), tiles in table.items():
                for tile in tiles:
                    for dtype in DTYPES[size]:
                        key = kernel, str(tile), str(dtype).removeprefix("torch.")
                        if key not in done:
                            lines.append(f"{arch.name} {' '.join(key)}")
        launched = {name for row in own for name in row.launched}
        lines += [f"{arch.name} {name} (no launch)" for name in sorted(functions() - launched)]
    return lines
