"""The ladder's section of RESULTS.md: each prediction, its outcome and the shares behind it."""

from __future__ import annotations

from collections.abc import Sequence

from .ladder import KERNELS, LADDER, TIMED, Rung, measure, provider, variants_of, verdict
from .ledger import Ledger, Record
from .summary import CUDA, place
from .tables import provenance, size, table

HEAD = """\
Each row was predicted before any of these kernels had run on a GPU; bytes a clock are computed from
the tiles. The times are of one kernel, beside the other in the same rounds.
"""


def section(ledgers: Sequence[Ledger]) -> str:
    rows = [row for rung in LADDER for row in _rows(rung, ledgers)]
    header = ["kernel", "variant", "beside", "sizes", "predicted time", "because", "measured", "",
              "GPU, date, commit"]  # fmt: skip
    parts = [HEAD, table(header, rows)]
    last = {ledger.gpu: ledger for ledger in ledgers if any(_shares(ledger, k) for k in KERNELS)}
    for ledger in last.values():
        for kernel in KERNELS:
            if shares := _shares(ledger, kernel):
                parts += ["", f"`{kernel}`, of cuBLAS. {provenance(ledger)}:\n", shares]
    return "\n".join(parts)


def _rows(rung: Rung, ledgers: Sequence[Ledger]) -> list[list[str]]:
    """One for each GPU, of its last ledger that can tell."""
    about = [f"`{rung.kernel}`", rung.variant, rung.over, rung.sizes, rung.predicted, rung.why]
    found = {}
    for ledger in ledgers:
        if measured := measure(rung, ledger.of_kind("time")):
            found[ledger.gpu] = ledger, measured
    rows = []
    for ledger, measured in found.values():
        ratios = [ratio for ratio, _ in measured]
        span = f"{min(ratios):.3f} to {max(ratios):.3f} x, {len(ratios)} sizes"
        where = f"{ledger.gpu}, {ledger.date}, {ledger.commit[:12]}"
        rows.append([*about, span, verdict(rung, measured), where])
    return rows or [[*about, "-", verdict(rung, []), "-"]]


def _shares(ledger: Ledger, kernel: str) -> str:
    """A row for each size at which any of the variants was to be timed; why one was not, below."""
    names = [CUDA, *map(provider, variants_of(kernel))]
    by_place: dict[tuple[object, ...], dict[str, Record]] = {}
    for r in ledger.of_kind("time"):
        if (r["case"], r["phase"]) == TIMED[kernel]:
            by_place.setdefault(place(r), {})[r["provider"]] = r
    groups = [group for group in by_place.values() if set(names[1:]) & set(group)]
    if not groups:
        return ""
    rows, notes = [], dict[str, None]()
    for group in groups:
        first = next(iter(group.values()))
        rows.append([size(first), first["dtype"], *(_share(group.get(name)) for name in names)])
        for name in (n for n in names if n in group and group[n]["skipped"] is not None):
            notes[f"- not timed: {name}: {group[name]['skipped']}"] = None
    header = ["M x D x H", "dtype", "own choice", *variants_of(kernel)]
    return "\n".join([table(header, rows), *([""] if notes else []), *notes])


def _share(r: Record | None) -> str:
    return "-" if r is None or r["of_cublas"] is None else f"{r['of_cublas']:.1%}"
