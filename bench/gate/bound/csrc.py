"""Bounds of csrc's dense products: what the last build holds, walked role by role.

The launches are described here, as csrc/gemm.cuh's Arguments lays them out.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .cubin import Layout
from .derive import DEPTHS, Passed, busy, together
from .launches import Binary, binaries
from .machine import MACHINES
from .row import Bound
from .values import Unreadable
from .walk import Launched, Walk

_SILU = 0  # its number in csrc/activations.cuh


class _Schedule(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("rows", "columns", "cluster")]


class Arguments(ctypes.Structure):
    """csrc/gemm.cuh's struct; eight tensor maps of 128 bytes, then what decides a block's way."""

    _fields_ = [
        ("maps", ctypes.c_uint8 * 1024),
        ("bias", ctypes.c_uint64 * 2),
        ("sums", ctypes.c_uint64),
        ("M", ctypes.c_int64),
        ("H", ctypes.c_int64),
        ("schedule", _Schedule),
        ("k_steps", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("scalars", ctypes.c_float * 3),
        ("store_h", ctypes.c_bool),
        ("store_pair", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Row:
    """One kernel. name: in the demangled listing; template: what stands in its mangled name; tile:
    (rows, columns of the result, depth); products: of that size in it; roles: (first warp, warps);
    variant: training stores g and u, and sums."""

    kernel: str
    source: str
    arch: str
    template: str
    tile: tuple[int, int, int]
    products: int
    roles: tuple[tuple[int, int], ...]
    threads: int
    schedule: str
    together: int = 1  # tiles that a block has under way at once


# A producer's thread, and both consumers: of one tile together, or of a tile each.
_COOPERATIVE, _PINGPONG = ((0, 1), (4, 8)), ((0, 1), (4, 4), (8, 4))
_BLACKWELL = ((0, 1), (1, 1), (4, 4))


def _rows() -> Iterator[Row]:
    for gated in (True, False):
        for backward in (False, True):
            name = f"{'gated_linear' if gated else 'linear_act'}_{'bwd' if backward else 'fwd'}"
            flags = f"Lb{int(gated)}ELb{int(backward)}E"
            for pingpong in (False, True):
                if backward and not pingpong:
                    continue
                wide = 128 if pingpong else 256
                both = gated and not backward
                yield Row(
                    name, "gated_linear_sm90", "sm_90", f"{flags}Lb{int(pingpong)}E",
                    (128, wide // 2 if both else wide, 64), 1 + both,
                    _PINGPONG if pingpong else _COOPERATIVE, 384,
                    "ping-pong" if pingpong else "cooperative", 1 + pingpong,
                )  # fmt: skip
            wide = 128 if backward else 256
            both = gated and not backward
            yield Row(
                name, "gated_linear_sm100", "sm_100", flags,
                (128, wide // 2 if both else wide, 64), 1 + both, _BLACKWELL, 256, "persistent",
            )  # fmt: skip


ROWS = tuple(_rows())


@functools.cache
def cubins(item: Path, arch: str) -> list[bytes]:
    """The machine code of an object for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(tool_path("cuobjdump"))
        command = [str(path), "-xelf", "all", str(item.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return [f.read_bytes() for f in sorted(Path(folder).glob(f"*{arch}*.cubin"))]


def tool_path(name: str) -> str:
    import triton  # noqa: PLC0415

    return str(getattr(triton.knobs.nvidia, name).path)


def find(item: Path, row: Row) -> Binary:
    """The kernel of bfloat16 that a row is about."""
    for cubin in cubins(item, row.arch):
        for name, read in binaries(cubin).items():
            if "nv_bfloat16" in name and row.template in name and "gemm" in name:
                return read
    raise Unreadable(f"{item.name} has no kernel with {row.template} for {row.arch}")


def _launched(row: Row, layout: Layout, tiles: int, K: int, training: bool) -> Launched:
    m, n, k = row.tile
    args = Arguments(M=m, H=n * tiles, k_steps=-(-K // k), activation=_SILU)
    args.schedule = _Schedule(1, tiles, 1)
    args.store_h, args.store_pair = True, training
    args.sums = 1 << 40 if training and row.kernel.endswith("bwd") else 0
    for i in range(2):
        args.bias[i] = (1 << 41) if training and row.kernel.endswith("fwd") else 0
    return Launched(layout, (bytes(args),), (1, 1, 1), row.threads)


def derive(item: Path, row: Row, training: bool) -> Bound:
    m, n, k = row.tile
    text = f"{m}x{n}x{k}, {row.threads // 32} warps, {row.schedule}"
    variant = "train" if training else "infer"
    first = Bound(row.arch, row.kernel, "csrc", text, variant)
    try:
        return _derived(first, find(item, row), row, training)
    except Unreadable as error:
        return replace(first, why=str(error)[:300])


def _derived(first: Bound, read: Binary, row: Row, training: bool) -> Bound:
    machine = MACHINES[row.arch]
    walk = Walk(read.code, machine)
    found: dict[tuple[int, int], Passed] = {}
    # Ping-pong gives every consumer a tile in turn, so tiles go in pairs.
    few, many = 2 * row.together, 3 * row.together
    for K in DEPTHS:
        for tiles in (few, many):
            launch = _launched(row, read.layout, tiles, K, training)
            roles = []
            for warp, warps in row.roles:
                counts, line = walk.run(launch, warp, warps)
                roles.append(busy(read, counts, line, warps, machine))
            found[tiles, K] = together(roles)
    marginal = [(found[many, K] - found[few, K]).scaled(1 / row.together) for K in DEPTHS]
    n = [-(-K // row.tile[2]) for K in DEPTHS]
    step = (marginal[1] - marginal[0]).scaled(1 / (n[1] - n[0]))
    each = marginal[0] - step.scaled(n[0])
    m, width, k = row.tile
    products = step.clocks["tensor"] * machine.tensor / (2.0 * m * width * k)
    if abs(products - row.products) > 0.02:
        raise Unreadable(f"a step multiplies {products:.3f} tiles, expected {row.products}")
    return replace(
        first, block=row.tile, products=row.products, warps=row.threads // 32, persistent=True,
        each=each.clocks, step=step.clocks, counts=each.counts, step_counts=step.counts,
        launch=(found[few, DEPTHS[0]] - marginal[0].scaled(few)).clocks,
    )  # fmt: skip
