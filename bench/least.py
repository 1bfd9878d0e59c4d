"""The least time of an op on a GPU: the sum over its kernels, each by its row of the bound table.

Where the roofline takes the whole op at once, here every kernel has whole waves of its tiles and
its own limit, what it stores is read again by what follows, and none is shorter than one way to
memory and back. Products that PyTorch makes are at the roofline. All of it is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

from ..backends.op import KERNELS
from ..kernels.arch import Arch
from ..kernels.arch.roof import Roof
from ..kernels.arch.tile import Tile
from . import rooms
from .work import Work

# Luo et al. (2024) measured 478 clocks from an H100's memory to a register; a kernel loads and
# stores.
LATENCY_S = 2 * 478 / 1.755e9

# For each of these biases a matrix that a kernel stored is read again, to sum its columns.
SUMMED = {"moe_dh": ("b_gate", "b_up")}


class Launch(Protocol):
    """What is planned of one kernel."""

    @property
    def kernel(self) -> str: ...
    @property
    def tile(self) -> Tile: ...


@functools.cache
def _table() -> dict[str, Any]:
    """The committed rows by key; none where the table's room is not installed."""
    if not rooms.has("gate.bound.table"):
        return {}
    return {b.key: b for b in rooms.load("gate.bound.table", "predict").read()}


def _row(arch: Arch, launch: Launch, training: bool) -> Any:
    key = f"{arch.name} triton {launch.kernel}, {launch.tile}, "
    variants = ("train", "infer") if training else ("infer", "train")
    found = (_table().get(key + variant) for variant in variants)
    return next((b for b in found if b is not None and not b.why), None)


def least_ms(
    work: Work, phase: str, launches: Sequence[Launch], roof: Roof, arch: Arch
) -> float | None:
    """At least so many milliseconds, or None where a kernel of the op has no row in the table."""
    if work.case.op == "hyper_attention":
        return _of_calls(work, phase, roof, arch)
    rows = [_row(arch, launch, phase != "forward") for launch in launches]
    if not rows or any(row is None for row in rows) or work.torch_dtype.itemsize != 2:
        return None
    total = flops = again = moved = 0.0
    for launch, row in zip(launches, rows, strict=True):
        M, N, K, groups = _sizes(work, launch)
        useful = 2.0 * row.products * M * N * K
        stored = 2.0 * M * N
        weights = groups * row.step_weights * row.steps(K) * math.ceil(N / row.block[1])
        own = 2.0 * M * K + weights + stored
        at = max(row.milliseconds(M, N, K) / 1e3, own / roof.bytes_per_s, LATENCY_S)
        total, flops = total + at, flops + useful
        again, moved = again + stored, moved + own
        for _ in work.case.shapes(1, 8, 8).keys() & set(SUMMED.get(launch.kernel, ())):
            total += max(stored / roof.bytes_per_s, LATENCY_S)
    rest = max(0.0, work.flops(phase) - flops)
    if rest > 0.001 * work.flops(phase):
        left = max(0.0, work.bytes(phase) - moved) + again
        total += max(rest / roof.flops[work.dtype], left / roof.bytes_per_s, LATENCY_S)
    return total * 1e3


def _of_calls(work: Work, phase: str, roof: Roof, arch: Arch) -> float | None:
    """hyper_attention's, whose kernels make no result tile by tile: at the sizes of its rows."""
    if work.case.name != "hyper_attention-layer" or work.torch_dtype.itemsize != 2 or not _table():
        return None
    least_seconds = rooms.load("gate.bound.calls", "predict").least_seconds
    total = 0.0
    for half in ("forward", "backward") if phase == "both" else (phase,):
        own = least_seconds(_table().values(), arch.name, half, (work.M, work.D, work.H))
        if own is None:
            return None
        total += max(own, work.bytes(half) / roof.bytes_per_s)
    return total * 1e3


def _sizes(work: Work, launch: Launch) -> tuple[int, int, int, int]:
    """(rows, columns, depth, groups) of a kernel's product; of experts with as many rows each,
    their tiles one below the other."""
    kernel = KERNELS[launch.kernel.removesuffix("_group")]
    assert kernel.result is not None and kernel.depth is not None
    rows, columns, depth = (getattr(work, n) for n in (*kernel.result, kernel.depth))
    if not kernel.grouped:
        return rows, columns, depth, 1
    shapes = work.case.shapes(work.M, work.D, work.H).values()
    experts = next(shape[0] for shape in shapes if len(shape) == 3)
    each = math.ceil(work.rows / experts)
    if kernel.depth == "M":
        return experts * rows, columns, each, experts
    return experts * each, columns, depth, experts
