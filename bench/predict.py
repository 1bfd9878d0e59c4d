"""`predict`: what can be computed without a GPU: FLOPs, bytes, what autograd keeps, the roofline
time, and the tile that would run.

Nothing here is measured. Beside the roofline of a whole op stands the sum over its kernels, each by
its upper bound from machine code (`gate bound`), in a checkout. With --compile the ahead-of-time
gate adds what the compiler says of each tile's kernel, hence how many blocks fit a multiprocessor
at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends.flops import lora_names
from ..backends.op import OPS, Kernel
from ..kernels import pick
from ..kernels.arch.roof import Roof
from ..kernels.arch.tile import ADAPTED, Fit, Tile
from ..kernels.device import pretend
from ..kernels.moe.grouped import most_tiles
from ..kernels.tiles import fit_of
from . import machine
from .least import least_ms
from .machine import ARCH_OF, ROOFS
from .occupancy import blocks_at_once
from .options import Record, Refusal, collecting, subparser, write_json
from .render import number, say, size, table
from .saved import saved_bytes
from .timing.command import add_sizes, options_of
from .timing.session import DEFAULT_WIDTHS, plan
from .work import Work

# Beside its GEMM a launcher may run these, which sum what the GEMM stored.
HELPERS = ("reduce_kernel", "_sums_kernel", "_bias_kernel", "_dprob_kernel")
COMPUTED = "computed from datasheets; nothing was measured"


@dataclass(frozen=True)
class PlannedLaunch:
    """One kernel's launch as it is planned for a GPU that is not there."""

    kernel: str
    tile: Tile
    tiles: int
    waves: float
    splits: int


def kernels(op: str, phase: str) -> list[Kernel]:
    """The products with tiles that `op` launches in a phase."""
    row = OPS[op]
    phases = {"forward": row.forward, "backward": row.backward}
    rows = phases.get(phase) or (row.forward + row.backward if phase == "both" else ())
    return [kernel for kernel in rows if kernel.result]


def _row_of_tiles(name: str, work: Work) -> str:
    """Several masks, and adapters, have tiles of their own."""
    shapes = work.case.shapes(1, 8, 8)
    if name == "masked_gated_linear_fwd" and shapes.get("masks", (1,))[0] > 1:
        return f"{name}_group"
    # dh gains the product of the last projection's adapter.
    own = lora_names(*(("down",) if name.endswith("_bwd") else ("gate", "up")))
    return f"{name}{ADAPTED}" if not shapes.keys().isdisjoint(own) else name


def launches(work: Work, phase: str, roof: Roof) -> list[PlannedLaunch]:
    """What `work` would launch on such a GPU. Planned by the launchers' own functions."""
    x = torch.empty(0, dtype=work.torch_dtype)
    matrices = [
        torch.empty(shape, dtype=work.torch_dtype, device="meta")
        for shape in ((work.M, work.D), (work.H, work.D), (work.M, work.H))
    ]
    with pretend(ARCH_OF[roof.name], roof.multiprocessors):
        fit = fit_of(*matrices)
        return [
            (_grouped_launch if kernel.grouped else _launch)(kernel, work, x, fit, roof)
            for kernel in kernels(work.case.op, phase)
        ]


def _launch(kernel: Kernel, work: Work, x: torch.Tensor, fit: Fit, roof: Roof) -> PlannedLaunch:
    assert kernel.result is not None and kernel.depth is not None
    name = _row_of_tiles(kernel.name, work)
    rows, columns = (getattr(work, size) for size in kernel.result)
    tile = pick.pick_tile(name, x, rows, columns, fit)
    count = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n)
    depth = getattr(work, kernel.depth)
    splits = pick.pick_splits(tile, x, columns, depth) if tile.skinny else 1
    return PlannedLaunch(name, tile, count, count * splits / roof.multiprocessors, splits)


def _grouped_launch(
    kernel: Kernel, work: Work, x: torch.Tensor, fit: Fit, roof: Roof
) -> PlannedLaunch:
    """The launch for experts with as many rows each: the most row tiles that there can be."""
    assert kernel.result is not None
    shapes = work.case.shapes(work.M, work.D, work.H).values()
    experts = next(shape[0] for shape in shapes if len(shape) == 3)
    columns = getattr(work, kernel.result[1])
    if kernel.depth == "M":  # every expert has a result of its own
        tile = pick.pick_grouped_tile(kernel.name, x, work.H, 1, fit)
        rows = experts * math.ceil(work.H / tile.block_m)
    else:
        tile = pick.pick_grouped_tile(kernel.name, x, work.rows, experts, fit)
        rows = most_tiles(work.rows, experts, tile.block_m)
    count = rows * math.ceil(columns / tile.block_n)
    return PlannedLaunch(kernel.name, tile, count, count / roof.multiprocessors, 1)


def predict(work: Work, phase: str) -> list[Record]:
    """One record per GPU of machine.ROOFS. least_ms: as least.py sums it, or None."""
    return [_predicted(work, phase, roof) for roof in ROOFS.values()]


def _predicted(work: Work, phase: str, roof: Roof) -> Record:
    flops, moved, arch = work.flops(phase), work.bytes(phase), ARCH_OF[roof.name]
    planned = launches(work, phase, roof)
    return {
        "kind": "predict", **work.identity(), "phase": phase, "model": work.model,
        "gpu": roof.name, "flops": flops, "bytes": moved,
        "saved_bytes": saved_bytes(work, phase, arch),
        "roofline_ms": roof.milliseconds(flops, moved, work.dtype),
        "bound": roof.bound(flops, moved, work.dtype),
        "least_ms": least_ms(work, phase, planned, roof, arch),
        "launches": [_launch_record(launch) for launch in planned],
        "source": COMPUTED,
    }  # fmt: skip


def _launch_record(launch: PlannedLaunch) -> Record:
    return {
        "kernel": launch.kernel, "tile": str(launch.tile), "tiles": launch.tiles,
        "waves": launch.waves, "splits": launch.splits,
    }  # fmt: skip


def show(records: Sequence[Record]) -> None:
    """FLOPs, bytes and roofline times: one row per work and phase, a column per GPU. Behind the
    roofline of the whole op stands the sum over its kernels, where the bound table has them."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for r in records:
        shape = f"{r['M']}x{r['D']}x{r['H']}"
        key = (r["case"], r["activation"], r["dtype"], r["model"] or "-", shape, r["phase"])
        cells = [number(r["flops"] / 1e9), size(r["bytes"]), _saved(r)]
        row = rows.setdefault(key, cells)
        least = r.get("least_ms")
        by_kernels = f", kernels {number(least)}" if least is not None else ""
        row.append(f"{number(r['roofline_ms'])} {r['bound']}{by_kernels}")
    named = ("case", "activation", "dtype", "model", "M x D x H", "phase")
    header = (*named, "GFLOP", "bytes", "saved")
    gpus = [f"{name} ms, bound" for name in ROOFS]
    body = [[*key, *row] for key, row in rows.items()]
    table(
        f"Roofline times: {COMPUTED}", (*header, *gpus), body,
        drop=("activation", "saved", "GFLOP", "bytes", "model", "dtype", *gpus[:0:-1]),
    )  # fmt: skip


def _saved(record: Record) -> str:
    return "-" if record["saved_bytes"] is None else size(record["saved_bytes"])


TILE = "tile, warps, stages, loads"


def _short(tile: str) -> str:
    """A tile as TILE heads it: "64x128x64, 4, 3, tma"."""
    for unit in (" warps", " stages", " loads"):
        tile = tile.replace(unit, "")
    return tile


def show_launches(records: Sequence[Record]) -> None:
    rows = []
    for r in records:
        for launch in r["launches"]:
            shape = f"{r['M']}x{r['D']}x{r['H']}"
            compiled = [str(launch.get(n, "-")) for n in ("registers", "shared", "blocks_at_once")]
            cells = [str(launch["tiles"]), str(launch["splits"]), f"{launch['waves']:.2f}"]
            rows.append([
                r["gpu"], launch["kernel"], r["dtype"], shape, _short(launch["tile"]), *cells,
                *compiled,
            ])  # fmt: skip
    header = (
        "GPU", "kernel", "dtype", "M x D x H", TILE, "tiles", "K parts", "waves", "registers",
        "shared", "blocks at once",
    )  # fmt: skip
    if rows:
        # Forward and both launch the same forward kernel.
        rows = list(map(list, dict.fromkeys(map(tuple, rows))))
        table(
            "Launches as planned: computed, nothing was run", header, rows,
            drop=("blocks at once", "shared", "registers", "K parts", "tiles", "dtype", "waves",
                  "M x D x H"),
        )  # fmt: skip


def compile_kernels(records: Sequence[Record]) -> list[Mapping[str, Any]]:
    """The ahead-of-time gate's rows for what the records launch, compiled in another process."""
    names = sorted({ARCH_OF[r["gpu"]].name for r in records})
    kernels = sorted({launch["kernel"] for r in records for launch in r["launches"]})
    dtypes = sorted({r["dtype"] for r in records})
    if not kernels:
        return []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(machine.ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "aot.json"
        argv = [sys.executable, "-m", "fusedmlp.bench.gate.kernels", "--json", str(file)]
        argv += ["--arch", *names, "--kernel", *kernels, "--dtype", *dtypes]
        print(f"compiling for {', '.join(names)}: minutes", file=sys.stderr, flush=True)
        # On a terminal the gate's own rows are the progress.
        out = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        # In ROOT, for the folder that a child starts in comes first among its modules' places.
        done = subprocess.run(
            argv, env=environment, stdout=out, stderr=subprocess.PIPE, cwd=machine.ROOT
        )
        if not file.exists():
            raise Refusal(f"the ahead-of-time gate failed: {done.stderr.decode()[-2000:]}")
        rows: list[Mapping[str, Any]] = json.loads(file.read_text())
    return rows


def add_compiled(records: Sequence[Record], compiled: Sequence[Mapping[str, Any]]) -> None:
    """Give each launch what the compiler said of its main kernel, as training runs it."""
    found = {
        (row["arch"], row["kernel"].partition(":")[0], row["dtype"], row["tile"]): row
        for row in compiled
        if row["variant"] == "train" and not row["kernel"].endswith(HELPERS)
    }
    for record in records:
        arch = ARCH_OF[record["gpu"]]
        for launch in record["launches"]:
            key = (arch.name, launch["kernel"], record["dtype"], launch["tile"])
            row = found.get(key)
            if row is None:
                continue
            size_of = torch.empty(0, dtype=getattr(torch, record["dtype"])).element_size()
            tile = next(
                t for t in arch.tiles[launch["kernel"], size_of] if str(t) == launch["tile"]
            )
            launch["registers"], launch["shared"] = row["registers"], row["shared"]
            needs = row["registers"], row["shared"], row["tensor_memory"]
            launch["blocks_at_once"] = blocks_at_once(arch, tile, *needs)


def main(args: argparse.Namespace) -> int:
    options = options_of(args)
    if not args.model:
        options = dataclasses.replace(options, widths=DEFAULT_WIDTHS[:1])
    records: list[Record] = []
    emit = collecting(records)
    for work in plan(options):
        for phase in args.phase:
            if work.case.forward_only and phase != "forward":
                continue
            for record in predict(work, phase):
                emit(record)
    if args.compile:
        add_compiled(records, compile_kernels(records))
    show(records)
    show_launches(records)
    print()
    say(f"All of this is {COMPUTED}.")
    write_json(args.json, machine.describe(), records)
    return 0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "predict", "FLOPs, bytes, saved bytes, times and launches, without a GPU",
        (
            "predict",
            "predict --op gated_mlp --model llama3-8b gemma2-9b --m 1 2048 16384",
            "predict --op gated_linear --compile",
            "predict --dtype float16 --phase forward --json predicted.json",
        ),
        main,
    )  # fmt: skip
    add_sizes(parser, ("forward", "backward"))
    parser.add_argument(
        "--compile", action="store_true",
        help="compile every kernel for these GPUs (minutes): adds registers and occupancy",
    )  # fmt: skip
