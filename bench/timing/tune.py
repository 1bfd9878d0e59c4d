"""`tune`: search tiles around those of kernels/arch on this GPU and print rows to paste there.

A row's shapes are tuned together: those for which the table picks the same tile. A candidate is
first launched with all that training stores and judged by the tolerance rule, then timed. The
search climbs: it times every neighbour of the best tile so far, until no neighbour is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...backends.op import KERNELS
from ...kernels.arch import Arch
from ...kernels.arch.tile import Fit, Tile
from ...kernels.device import arch_of, multiprocessors, pretend
from ...kernels.launch import Launch, draw
from ...kernels.pick import pick_tile
from ...testing import assert_close_to, doubled
from ..options import (
    INTERRUPTED,
    Emit,
    Record,
    Refusal,
    add_json,
    collecting,
    shape_of,
    subparser,
    write_json,
)
from ..shapes import MODELS
from ..work import DTYPES
from .candidates import neighbours

# Those with tiles to search, by the rows of the table that they read.
LAUNCHES: dict[str, Launch] = {
    launch.name: launch
    for kernel in KERNELS.values()
    for launch in kernel.launches
    if launch.reference
}
Timer = Callable[[Callable[[], object]], float]
Shape = tuple[int, int, int]

DEFAULT_SHAPES: tuple[Shape, ...] = tuple(
    (m, MODELS[name].D, MODELS[name].H)
    for name in ("llama3-8b", "llama3.2-1b")
    for m in (16, 2048, 8192)
)
CHECKED_ROWS = 515  # enough for several tiles and a ragged last one
ROUNDS = 5
# Below this a winner is noise, and the table keeps its tile.
WORTHWHILE = 0.01


@dataclasses.dataclass(frozen=True)
class TileRow:
    """One table row and the shapes that the table sends to it."""

    kernel: str
    dtype: torch.dtype
    tile: Tile
    shapes: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """ms: of the winner and of the table's tile, per shape, from interleaved rounds."""

    row: TileRow
    tile: Tile
    ms: tuple[float, ...]
    table_ms: tuple[float, ...]
    tried: int
    discarded: dict[str, int]


def device_timer(call: Callable[[], object]) -> float:
    """Median milliseconds, with L2 flushed before each call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=60, return_mode="median"))


@contextmanager
def forced(kernel: str, dtype: torch.dtype, tile: Tile, device: torch.device) -> Iterator[None]:
    """Inside, the launchers find `tile` alone in `kernel`'s row."""
    arch = arch_of(device).with_row(kernel, dtype.itemsize, (tile,))
    with pretend(arch, multiprocessors(device)):
        yield


def rows_of(
    kernel: str, dtype: torch.dtype, shapes: Sequence[Shape], device: torch.device
) -> list[TileRow]:
    """The table's rows that `shapes` use, each with its shapes."""
    grouped: dict[Tile, list[Shape]] = {}
    like = torch.empty(0, dtype=dtype, device=device)
    for m, d, h in shapes:
        of = LAUNCHES[kernel].tile_of
        tile = of(like, (m, d, h)) if of else pick_tile(kernel, like, m, h, Fit.TMA)
        grouped.setdefault(tile, []).append((m, d, h))
    return [TileRow(kernel, dtype, tile, tuple(group)) for tile, group in grouped.items()]


class Bench:
    """Judges and times tiles for one row; holds the operands, so that they are drawn once."""

    def __init__(self, row: TileRow, device: torch.device, timer: Timer, emit: Emit) -> None:
        self.row, self.device, self.timer, self.emit = row, device, timer, emit
        self.launch = LAUNCHES[row.kernel]
        self.operands = [draw(self.launch, shape, row.dtype, device) for shape in row.shapes]
        self.discarded: dict[str, int] = {}
        m, d, h = row.shapes[0]
        few = (min(m, CHECKED_ROWS), d, h)
        self.checked = draw(self.launch, few, row.dtype, device)
        assert self.launch.reference is not None
        exact = self.launch.reference(doubled(self.checked))
        eager = self.launch.reference(self.checked)
        self.expected = {name: (exact[name], eager[name]) for name in exact}

    def _launch(self, tile: Tile, inputs: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        assert self.launch.call is not None
        with forced(self.row.kernel, self.row.dtype, tile, self.device):
            return self.launch.call(inputs, training)

    def _milliseconds(self, tile: Tile) -> tuple[float, ...]:
        return tuple(
            self.timer(lambda inputs=inputs: self._launch(tile, inputs, False))  # type: ignore[misc]
            for inputs in self.operands
        )

    def check(self, tile: Tile) -> None:
        """Raise unless `tile` compiles, launches, and passes the tolerance rule."""
        results = self._launch(tile, self.checked, True)
        for name, expected in self.expected.items():
            assert_close_to(results[name], *expected, name=name)

    def measure(self, tile: Tile) -> float:
        """Geometric mean of the shapes' milliseconds; infinite if the tile cannot be used."""
        try:
            self.check(tile)
            ms = _mean(self._milliseconds(tile))
            self._note(tile, ms, None)
            return ms
        except Exception as error:  # compilers fail in many ways, and the next tile may do
            reason = type(error).__name__
            self._note(tile, None, f"{reason}: {(str(error).splitlines() or [''])[0][:200]}")
            self.discarded[reason] = self.discarded.get(reason, 0) + 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again where the context itself is lost
            return math.inf

    def _note(self, tile: Tile, ms: float | None, skipped: str | None) -> None:
        """On record and on paper at once: a search that is cut short loses no tile."""
        print(f"  {tile}: {skipped or f'{ms:.4g} ms'}", flush=True)
        self.emit({
            "kind": "tile", "arch": arch_of(self.device).name, "kernel": self.row.kernel,
            "dtype": str(self.row.dtype).removeprefix("torch."),
            "shapes": ["x".join(map(str, shape)) for shape in self.row.shapes],
            "tile": dataclasses.asdict(tile), "median_ms": ms, "skipped": skipped,
        })  # fmt: skip

    def compare(self, tile: Tile, table: Tile) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(tile's ms, table's ms) per shape; rounds alternate, so that drifting clocks hit both."""
        rounds = [(self._milliseconds(tile), self._milliseconds(table)) for _ in range(ROUNDS)]
        ours, theirs = zip(*rounds, strict=True)
        median = lambda r: tuple(map(statistics.median, zip(*r, strict=True)))  # noqa: E731
        return median(ours), median(theirs)


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def search(
    start: Tile,
    around: Callable[[Tile], Sequence[Tile]],
    measure: Callable[[Tile], float],
    limit: int,
) -> tuple[Tile, int]:
    """(fastest tile found, how many were measured), climbing from `start`."""
    times = {start: measure(start)}
    best = start
    while True:
        fresh = [t for t in around(best) if t not in times][: limit - len(times)]
        times |= {tile: measure(tile) for tile in fresh}
        fastest = min(times, key=lambda tile: times[tile])
        if times[fastest] >= times[best]:
            return best, len(times)
        best = fastest


def tune_row(
    row: TileRow, arch: Arch, device: torch.device, timer: Timer, limit: int, emit: Emit
) -> Found:
    """The best tile for a row. Raises where the table's own tile fails: that is a bug."""
    bench = Bench(row, device, timer, emit)
    bench.check(row.tile)
    around = lambda tile: neighbours(tile, arch, row.kernel, row.dtype.itemsize)  # noqa: E731
    best, tried = search(row.tile, around, bench.measure, limit)
    ms, table_ms = bench.compare(best, row.tile)
    if _mean(table_ms) < (1 + WORTHWHILE) * _mean(ms):
        best, ms = row.tile, table_ms
    return Found(row, best, ms, table_ms, tried, bench.discarded)


def source(tile: Tile) -> str:
    """The tile as kernels/arch writes it: five sizes, then whatever differs from the default."""
    fields = dataclasses.fields(tile)
    sizes = ", ".join(str(getattr(tile, f.name)) for f in fields[:5])
    named = [f for f in fields[5:] if getattr(tile, f.name) != f.default]
    # json-like double quotes, as the formatter would have them.
    texts = [f"{f.name}={getattr(tile, f.name)!r}".replace("'", '"') for f in named]
    return f"Tile({', '.join([sizes, *texts])})"


def table_rows(kernel: str, size: int, arch: Arch, found: Sequence[Found]) -> str:
    """One entry of the tile table, ready to paste, with what each changed tile bought."""
    by_tile = {f.row.tile: f for f in found}
    lines = [f'("{kernel}", {size}): (']
    for tile in arch.row(kernel, size):
        f = by_tile.get(tile)
        for shape, ms, table_ms in zip(f.row.shapes, f.ms, f.table_ms, strict=True) if f else ():
            gain = f"{table_ms / ms - 1:+.1%} over {tile}" if f and f.tile != tile else "kept"
            lines.append(f"    # {arch.name} {'x'.join(map(str, shape))}: {ms:.4g} ms, {gain}")
        lines.append(f"    {source(f.tile if f else tile)},")
    return "\n".join([*lines, "),"])


def _records(found: Found, arch: Arch) -> Iterator[Record]:
    for (m, d, h), ms, table_ms in zip(found.row.shapes, found.ms, found.table_ms, strict=True):
        yield {
            "kind": "tune", "arch": arch.name, "kernel": found.row.kernel,
            "dtype": str(found.row.dtype).removeprefix("torch."), "M": m, "D": d, "H": h,
            "tile": dataclasses.asdict(found.tile), "median_ms": ms, "table_ms": table_ms,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """limit: how many tiles to measure for each row of the table. shapes: () for each kernel's
    own."""

    kernels: tuple[str, ...] = tuple(LAUNCHES)
    dtypes: tuple[str, ...] = ("bfloat16",)
    shapes: tuple[Shape, ...] = ()
    limit: int = 40
    device: str = "cuda"


def shapes_of(options: TuneOptions, kernel: str) -> tuple[Shape, ...]:
    return options.shapes or LAUNCHES[kernel].sizes or DEFAULT_SHAPES


def run(options: TuneOptions, emit: Emit, timer: Timer = device_timer) -> str:
    """Tune everything asked for, a record per shape; returns the rows to paste."""
    device = torch.device(options.device)
    arch = arch_of(device)
    texts = []
    for kernel in options.kernels:
        for name in options.dtypes:
            dtype = DTYPES[name]
            results = []
            for row in rows_of(kernel, dtype, shapes_of(options, kernel), device):
                print(f"{kernel} {name}: {row.tile}", flush=True)
                found = tune_row(row, arch, device, timer, options.limit, emit)
                print(f"  best of {found.tried}: {found.tile}", flush=True)
                results.append(found)
                for record in _records(found, arch):
                    emit(record)
            texts.append(table_rows(kernel, dtype.itemsize, arch, results))
    return "\n".join(texts)


def options_of(args: argparse.Namespace) -> TuneOptions:
    return TuneOptions(
        kernels=tuple(args.kernel),
        dtypes=tuple(args.dtype),
        shapes=tuple(args.shape),
        limit=args.limit,
    )


def main(args: argparse.Namespace) -> int:
    from .. import machine

    if not torch.cuda.is_available():
        raise Refusal("tune needs a GPU, and torch finds none: tiles can only be timed on one")
    options = options_of(args)
    records: list[Record] = []
    found = machine.describe()
    try:
        rows = run(options, collecting(records))
    except KeyboardInterrupt:
        done = dict.fromkeys(r["kernel"] for r in records if r["kind"] == "tune")
        print(f"\nInterrupted; done: {', '.join(done) or 'no kernel'}. --kernel tunes the others.")
        write_json(args.json, found, records)
        return INTERRUPTED
    print(f"\n# For kernels/arch/; timed on {found['gpu']}, commit {found['commit'] or 'unknown'}")
    print(rows)
    write_json(args.json, found, records)
    return 0


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers, "tune", "search tiles on this GPU and print rows for kernels/arch",
        ("tune", "tune --kernel gated_linear_fwd --shape 8192x4096x14336 --limit 80"), main,
    )  # fmt: skip
    parser.add_argument(
        "--kernel", nargs="+", choices=LAUNCHES, default=list(LAUNCHES), metavar="NAME",
        help=f"launchers: {', '.join(LAUNCHES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--shape", nargs="+", type=shape_of, default=[], metavar="MxDxH",
        help="default: llama3-8b and llama3.2-1b at 16, 2048 and 8192 tokens; of hyper_attention "
        "layers with 2 and 16 heads at 16384",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, default=40, help="tiles per table row (default: %(default)s)"
    )
    add_json(parser)
