"""Ledgers as Markdown: every section of RESULTS.md, and the block in README.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..variants import CUDA
from .ledger import Ledger, Record
from .summary import is_default, is_ours, on_backend, place, share
from .targets import TARGETS, measure, verdict

NOTHING = "Nothing has been measured on a device yet."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def provenance(ledger: Ledger) -> str:
    """What every table says of where its numbers come from."""
    machine: Mapping[str, Any] = ledger.machine
    versions = [
        f"{name} {machine[name]}"
        for name in ("driver", "cuda", "torch", "triton")
        if machine.get(name)
    ]
    parts = [ledger.gpu, ledger.date, f"commit {ledger.commit}", *versions]
    clocks = machine.get("clocks") or {}
    if "sm_mhz" in clocks:
        parts.append(f"SM clock {clocks['sm_mhz']} of {clocks.get('sm_max_mhz', '?')} MHz")
    name = ledger.path.name if ledger.path else "unsaved"
    return f"{', '.join(parts)} (`{name}`)"


def on_device(record: Record) -> bool:
    """Is this a check of the library's own kernels on a GPU?"""
    return record["device"] != "cpu" and record["backend"] in ("triton", "cuda")


def newest(ledgers: Sequence[Ledger], op: str, kind: str) -> list[tuple[Ledger, list[Record]]]:
    """The last ledger of each GPU that has records of `kind` for `op`, with these."""
    found: dict[str, tuple[Ledger, list[Record]]] = {}
    for ledger in ledgers:
        records = [r for r in ledger.of_kind(kind) if r["op"] == op]
        if kind == "check":
            records = [r for r in records if on_device(r)]
        if records:
            found[ledger.gpu] = ledger, records
    return list(found.values())


def size(r: Record) -> str:
    model = f" ({r['model']})" if r.get("model") else ""
    return f"{r['M']} x {r['D']} x {r['H']}{model}"


def _figure(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def state(ledgers: Sequence[Ledger], ops: Sequence[str]) -> str:
    """One row per op, GPU and backend, then the ops that no GPU has checked, by name."""
    rows, missing = [], []
    for op in ops:
        checks, times = newest(ledgers, op, "check"), newest(ledgers, op, "time")
        if not checks:
            missing.append(op)
        timed = {
            ledger.gpu: [str(r["provider"]).startswith(CUDA) for r in rs if r["skipped"] is None]
            for ledger, rs in times
        }
        for ledger, records in checks:
            for backend in dict.fromkeys(r["backend"] for r in records):
                passed = [r["passed"] for r in records if r["backend"] == backend]
                bad = passed.count(False)
                says = f"{bad} FAILED" if bad else "all passed"
                count = timed.get(ledger.gpu, []).count(backend == "cuda")
                found = [backend, f"{len(passed)}: {says}", str(count)]
                rows.append([f"`{op}`", ledger.gpu, *found, ledger.date, ledger.commit[:12]])
    parts = []
    if not rows:
        parts.append(NOTHING)
    else:
        parts.append(table(["op", "GPU", "backend", "checks", "times", "date", "commit"], rows))
    if missing:
        parts.append(f"Without a device record: {', '.join(f'`{op}`' for op in missing)}.")
    return "\n\n".join(parts)


def target_table(ledgers: Sequence[Ledger]) -> str:
    """Every target, once per GPU that has something to say of it."""
    rows = []
    for target in TARGETS:
        found = [
            (ledger, measured)
            for ledger, records in newest(ledgers, target.op, "time")
            if target.decidable and (measured := measure(target, records))
        ]
        for ledger, m in found:
            value = f"{m.value:.1%}" if target.share else f"{m.value:.2f} x"
            worst = f"{value} at {size(m.record)} {m.record['phase']}, the worst of {m.sizes}"
            where = f"{ledger.gpu}, {ledger.date}, {ledger.commit[:12]}"
            rows.append([f"`{target.op}`", target.text, worst, verdict(target, m), where])
        if not found:
            rows.append([f"`{target.op}`", target.text, "-", verdict(target, None), "-"])
    return table(["op", "target", "measured", "", "GPU, date, commit"], rows)


def errors(records: Sequence[Record]) -> str:
    """Per dtype and backend: how many checks, and the one nearest to its bound."""
    rows = []
    for dtype, backend in dict.fromkeys((r["dtype"], r["backend"]) for r in records):
        group = [r for r in records if (r["dtype"], r["backend"]) == (dtype, backend)]
        tensors = [(_used(t), name, r, t) for r in group for name, t in r["tensors"].items()]
        good = sum(r["passed"] for r in group)
        cells = ["-"] * 5
        if tensors:
            used, name, r, t = max(tensors, key=lambda item: item[0])
            cells = [f"{r['case']} {size(r)} {name}", f"{t['max']:.3g}", f"{t['eager_max']:.3g}",
                     f"{t['relative_l2']:.3g}", _percent(used)]  # fmt: skip
        rows.append([dtype, backend, f"{good} of {len(group)}", *cells])
    header = ["dtype", "backend", "passed", "nearest to its bound", "max error", "eager's",
              "relative L2", "of the bound"]  # fmt: skip
    bad = [
        f"- FAILED: {r['case']} {r['activation']} {r['dtype']} {size(r)}{on_backend(r)}: "
        + (
            ", ".join(n for n, t in r["tensors"].items() if not t["passed"])
            or r.get("error", "raised")
        )
        for r in records
        if not r["passed"]
    ]
    return "\n".join([table(header, rows), *([""] if bad else []), *bad])


def _used(tensor: Record) -> float:
    """The larger part of a bound that was used; above 1 it failed."""
    parts = [
        tensor[f] / tensor[f"{f}_bound"] if tensor[f"{f}_bound"] else 0.0 for f in ("max", "rms")
    ]
    return float(max(parts))


def times(records: Sequence[Record]) -> str:
    """A row per size and phase: ours, then each baseline's time as a multiple of ours."""
    rivals = sorted({r["provider"] for r in records if not is_ours(r)})
    header = ["case", "phase", "dtype", "M x D x H", "provider", "ms (20% to 80%)", "TFLOP/s"]
    header += ["GB/s", "of cuBLAS", "of copy", "peak MB", *(f"{r} / ours" for r in rivals)]
    by_place: dict[tuple[object, ...], dict[str, Record]] = {}
    for r in records:
        by_place.setdefault(place(r), {})[r["provider"]] = r
    rows: list[list[str]] = []
    skipped: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r["skipped"] is not None:
            skipped.setdefault((r["provider"], r["skipped"]), []).append(r)
            continue
        if not is_ours(r):
            continue
        peak = r["peak_memory_bytes"]
        others = by_place[place(r)]
        rows.append([
            f"{r['case']} {r['activation']}", r["phase"], r["dtype"], size(r), r["provider"],
            f"{_figure(r['median_ms'])} ({_figure(r['q20_ms'])} to {_figure(r['q80_ms'])})",
            _figure(r["tflops"], 3), _figure(r["gbps"], 3), _percent(r["of_cublas"]),
            _percent(r["of_copy"]), "-" if peak is None else f"{peak / 1e6:.1f}",
            *(_multiple(others.get(rival), r) for rival in rivals),
        ])  # fmt: skip
    notes = [
        f"- not timed: {provider}, {len(group)} of its sizes and phases: {reason}"
        for (provider, reason), group in skipped.items()
    ]
    shown = table(header, rows) if rows else "No time of this library's own was taken."
    return "\n".join([shown, *([""] if notes else []), *notes])


def _multiple(rival: Record | None, ours: Record) -> str:
    if rival is None or rival["skipped"] is not None:
        return "-"
    return f"{rival['median_ms'] / ours['median_ms']:.2f}"


def peaks(ledger: Ledger) -> str:
    rows = [
        [
            r["name"],
            r["dtype"],
            f"{r['bytes'] / 1e6:.0f} MB"
            if r["name"] == "copy"
            else f"{r['M']} x {r['N']} x {r['K']}",
            f"{r['gbps']:.0f} GB/s" if r["name"] == "copy" else f"{r['tflops']:.0f} TFLOP/s",
        ]
        for r in ledger.of_kind("peak")
    ]
    return table(["peak", "dtype", "size (M x N x K)", "rate"], rows)


def sanitizers(ledger: Ledger) -> str:
    rows = [
        [r["tool"], f"`{r['case']}`{on_backend(r)}", r["status"],
         (r["detail"].splitlines() or [""])[0]]
        for r in ledger.of_kind("sanitizer")
    ]  # fmt: skip
    return table(["tool", "case", "status", "detail"], rows)


def tiles(ledger: Ledger) -> str:
    rows = [
        [r["kernel"], r["arch"], r["dtype"], size(r), _tile(r["tile"]), _figure(r["median_ms"]),
         _figure(r["table_ms"]), f"{r['table_ms'] / r['median_ms'] - 1:+.1%}"]
        for r in ledger.of_kind("tune")
    ]  # fmt: skip
    header = ["kernel", "arch", "dtype", "M x D x H", "fastest tile", "ms", "table's ms", "gain"]
    return table(header, rows)


def _tile(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def steps(ledgers: Sequence[Ledger]) -> Iterator[str]:
    """All ledgers with what their campaigns did not do."""
    for ledger in ledgers:
        count = len(ledger.steps)
        bad = [f"{s['name']} {s['status']}" for s in ledger.steps if s["status"] != "ok"]
        rest = f"; not ok: {', '.join(bad)}" if bad else ""
        yield f"- {provenance(ledger)}: {count} steps, {len(ledger.records)} records{rest}"


def readme(ledgers: Sequence[Ledger], ops: Sequence[str]) -> str:
    """The largest forward of each op on each GPU, and which ops have none."""
    rows = []
    for op in ops:
        for ledger, records in newest(ledgers, op, "time"):
            ours = [
                r
                for r in records
                if is_default(r)
                and r["skipped"] is None
                and (r["phase"], r["case"]) == ("forward", op)
            ]
            if not ours:
                continue
            r = max(ours, key=lambda r: (r["M"] * r["D"] * r["H"], -r["median_ms"]))
            rows.append([f"`{op}`", f"{size(r)} {r['dtype']}", f"{_figure(r['median_ms'])} ms",
                         share(r).strip(", ") or "-", ledger.gpu, ledger.date,
                         ledger.commit[:12]])  # fmt: skip
    header = ["op", "forward, M x D x H", "median", "reaches", "GPU", "date", "commit"]
    lines = [table(header, rows), ""] if rows else [f"{NOTHING}\n"]
    missing = [op for op in ops if not newest(ledgers, op, "check")]
    if missing:
        lines.append(f"Without a device record: {', '.join(f'`{op}`' for op in missing)}.\n")
    lines.append("All measurements, targets and plots: [bench/RESULTS.md](bench/RESULTS.md).")
    return "\n".join(lines)
