"""The bound table: as JSON that is committed, as Markdown for RESULTS.md, and the ratchet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...machine import ROOT
from .calls import BATCH, Call, calls
from .row import Bound

TABLE = ROOT / "bench" / "results" / "bound" / "table.json"
DEPTHS = (1536, 4096)
FALL = 0.02  # of a bound, that the ratchet lets pass
COMPUTED = "computed from machine code; nothing was run on a GPU"
_ROUNDED = ("launch", "each", "step", "further", "counts", "step_counts")
_OF_CALLS = ("triangle", "segment", "further", "moved")  # other rows lack them


def record(bound: Bound) -> dict[str, Any]:
    """A row as JSON holds it; numbers to a tenth of a clock."""
    row = dataclasses.asdict(bound)
    for name in _ROUNDED:
        row[name] = {u: round(v, 1) for u, v in row[name].items() if round(v, 1)}
    return {name: value for name, value in row.items() if value or name not in _OF_CALLS}


def bound(row: Mapping[str, Any]) -> Bound:
    """A row of the table; units that are not in it took no clock."""
    fields = dict(row)
    nothing = dict.fromkeys((*fields["each"], *fields["step"], "order", "tensor"), 0.0)
    for name in ("each", "step"):
        # Its own units first: written again, a row that has not changed is the same line.
        fields[name] = {**fields[name], **{u: 0.0 for u in nothing if u not in fields[name]}}
    return Bound(**{**fields, "block": tuple(fields["block"])})


def read(path: Path = TABLE) -> list[Bound]:
    if not path.exists():
        return []
    return [bound(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write(bounds: Iterable[Bound], versions: Mapping[str, str], path: Path = TABLE) -> None:
    """One row a line, for diffs."""
    rows = sorted((record(b) for b in bounds), key=lambda r: json.dumps(r)[:120])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = f'{{\n "source": {json.dumps(COMPUTED)},\n "versions": {json.dumps(dict(versions))},\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head} "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def fallen(now: Sequence[Bound], before: Sequence[Bound]) -> list[str]:
    """Where a bound, of a kernel or of a whole call, is lower by more than FALL than in the
    committed table, is not in it, or cannot be derived any more."""
    old = {b.key: b for b in with_calls(before)}
    worse = []
    for b in with_calls(now):
        was = old.get(b.key)
        if b.why:
            worse.append(f"{b.key}: not derived: {b.why}")
        elif was is None:
            worse.append(f"{b.key}: not in the table; `gate bound --update` enters it")
        elif not was.why:
            for K in DEPTHS:
                got, had = b.share(K), was.share(K)
                if got < had * (1 - FALL):
                    worse.append(f"{b.key}: at most {got:.1%} at K = {K}, was {had:.1%}")
    return worse


def with_calls(bounds: Sequence[Bound]) -> list[Bound | Call]:
    """Behind the rows, the calls whose kernels are all among them."""
    return [*bounds, *calls(bounds)]


HEADER = (
    "GPU", "kernel, tile", "variant", "K = 1536", "K = 4096", "limit", "clocks: a tile, a step",
    "of it products", "L2 bytes a clock", "drains, barriers a step", "exposed waits a tile",
)  # fmt: skip


def _cells_of_call(call: Call) -> list[str]:
    if call.why:
        return [call.arch, call.kernel, call.variant, "not derived", call.why, *[""] * 6]
    high = DEPTHS[-1]
    tokens = BATCH * high
    return [
        call.arch, f"{call.kernel}: {call.count(tokens)} launches, waves and all", call.variant,
        *(f"{call.share(T):.0%}" for T in DEPTHS),
        ", ".join(dict.fromkeys(map(call.limit, DEPTHS))),
        f"{call.seconds(tokens) * 1e3:.2f} ms; {call.full_share(high):.0%} without waves",
        *[""] * 4,
    ]  # fmt: skip


def cells(b: Bound | Call) -> list[str]:
    """One row of the table."""
    if isinstance(b, Call):
        return _cells_of_call(b)
    name = f"{b.kernel} ({b.source}), {b.tile}"
    if b.why:
        return [b.arch, name, b.variant, "not derived", b.why, *[""] * 6]
    of = " of bandwidth" if b.of_bandwidth else ""
    low, high = DEPTHS
    limits = dict.fromkeys((b.limit(low), b.limit(high)))
    clocks = b.clocks(high)
    demand = clocks["L2"] * 64 / max(clocks.values())
    return [
        b.arch, name, b.variant, f"{b.share(low):.0%}{of}", f"{b.share(high):.0%}{of}",
        ", ".join(limits), f"{b.each['order']:.0f}, {b.step['order']:.0f}",
        f"{b.step['tensor']:.0f}", f"{demand:.0f}",
        f"{b.step_counts.get('drains', 0):.0f}, {b.step_counts.get('barriers', 0):.0f}",
        f"{b.counts.get('exposed', 0) + b.step_counts.get('exposed', 0):.0f}",
    ]  # fmt: skip


def markdown(bounds: Sequence[Bound]) -> str:
    """For RESULTS.md: an upper bound of the share of a GPU's peak, kernel by kernel."""
    lines = [
        f"All of it is {COMPUTED}: upper bounds by `fusedmlp bench gate bound`, whose README in "
        "`bench/gate/bound/` says what is assumed and how far off it may be.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{' --- |' * len(HEADER)}",
    ]
    lines += [
        f"| {' | '.join(c.replace('|', '/') for c in cells(b))} |" for b in with_calls(bounds)
    ]
    return "\n".join(lines)
