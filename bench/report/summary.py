"""A ledger in at most 60 lines: what a campaign prints last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ..lost import NOT_RUN
from ..variants import CUDA, DEFAULT
from .ledger import Ledger, Record

LIMIT = 60
WIDTH = 110


def summary(ledger: Ledger) -> list[str]:
    """Machine, steps, checks, sanitizer, times, tiles; it says where it left lines off."""
    sections = [
        [f"{ledger.gpu}, {ledger.date}, commit {ledger.commit}", f"ledger: {ledger.path}"],
        list(_steps(ledger.steps)),
        list(_checks(ledger.of_kind("check"))),
        list(_answers(ledger.of_kind("answer"))),
        list(_sanitizers(ledger.of_kind("sanitizer"))),
        list(_peaks(ledger.of_kind("peak"))),
        list(_times(ledger.of_kind("time"))),
        list(_cuda(ledger.of_kind("time"))),
        list(_tunes(ledger.of_kind("tune"), ledger.of_kind("tile"))),
    ]
    # Each section keeps its head: a long list of failures must not push the speeds out.
    lines = []
    for section in sections:
        lines += section[:10]
        if len(section) > 10:
            lines[-1] = f"  and {len(section) - 9} more lines"
    assert len(lines) <= LIMIT + 30, "nine sections of ten lines"
    return [line[:WIDTH] for line in _fit(lines)]


def _fit(lines: list[str]) -> list[str]:
    if len(lines) <= LIMIT:
        return lines
    return [*lines[: LIMIT - 1], f"and {len(lines) - LIMIT + 1} more lines, all in the ledger"]


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0]


def _steps(steps: list[Record]) -> Iterator[str]:
    count = Counter(step["status"] for step in steps)
    yield f"steps: {', '.join(f'{n} {status}' for status, n in count.items()) or 'none ran'}"
    for step in steps:
        if step["name"] == "tests" or step["status"] != "ok":
            # How it ended, then the last thing it printed: most often the error itself.
            lines = step["detail"].splitlines() or [""]
            why = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"
            yield f"  {step['status']:8} {step['name']:32} {why}"


def _checks(records: list[Record]) -> Iterator[str]:
    bad = [r for r in records if not r["passed"]]
    skipped = [r for r in bad if str(r.get("error", "")).startswith(NOT_RUN)]
    more = f", {len(skipped)} not run" if skipped else ""
    yield f"check: {len(records) - len(bad)} of {len(records)} passed{more}"
    for r in (r for r in bad if r not in skipped):
        faulty = ", ".join(name for name, t in r["tensors"].items() if not t["passed"])
        what = f"{r['case']} {r['activation']} {r['dtype']} {_size(r)}{on_backend(r)}"
        yield f"  failed   {what}: {faulty or r.get('error', 'it raised')}"


def _sanitizers(records: list[Record]) -> Iterator[str]:
    if records:
        good = sum(r["status"] == "ok" for r in records)
        yield f"compute-sanitizer: {good} of {len(records)} clean"
    for r in records:
        if r["status"] != "ok":
            what = f"{r['tool']} {r['case']}{on_backend(r)}"
            yield f"  {r['status']:8} {what}: {_first_line(r['detail'])}"


def _peaks(records: list[Record]) -> Iterator[str]:
    for name, field, unit in (("cublas", "tflops", "TFLOP/s"), ("copy", "gbps", "GB/s")):
        rates = [r[field] for r in records if r["name"] == name]
        if rates:
            yield f"peak: {name} up to {max(rates):.0f} {unit}"


def on_backend(r: Record) -> str:
    """Where a record is about the CUDA kernels: that, and the variant that was forced."""
    variant = f", {r['variant']}" if r.get("variant") else ""
    return f" (cuda{variant})" if r.get("backend") == "cuda" else ""


def _size(r: Record) -> str:
    return f"{r['M']}x{r['D']}x{r['H']}"


def place(r: Record) -> tuple[object, ...]:
    """What providers of one and the same computation have in common."""
    return tuple(r[k] for k in ("case", "phase", "activation", "dtype", "M", "D", "H"))


def fastest(records: Iterable[Record]) -> Record | None:
    return min(
        (r for r in records if r["skipped"] is None), key=lambda r: r["median_ms"], default=None
    )


def _times(records: list[Record]) -> Iterator[str]:
    """Our fastest at the largest size for each op and phase, beside the best baseline there."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r["op"], r["phase"]), []).append(r)
    timed = sum(r["skipped"] is None for r in records)
    if records:
        yield f"time: {timed} measured, {len(records) - timed} skipped"
    for (op, phase), group in groups.items():
        ours = [r for r in group if is_default(r) and r["skipped"] is None]
        if not ours:
            yield f"  {op} {phase}: {_first_line(group[0]['skipped'] or 'only baselines measured')}"
            continue
        best = max(ours, key=lambda r: (r["flops"] or 0, r["M"] * r["D"] * r["H"]))
        rival = fastest(r for r in group if place(r) == place(best) and not is_ours(r))
        against = (
            f", {rival['median_ms'] / best['median_ms']:.2f}x {rival['provider']}" if rival else ""
        )
        rate = "" if best["tflops"] is None else f", {best['tflops']:.0f} TFLOP/s"
        speed = f"{best['median_ms']:.4g} ms{rate}{share(best)}{against}"
        yield f"  {op} {phase} {_size(best)}: {speed}"


def _cuda(records: list[Record]) -> Iterator[str]:
    """At each size of theirs: the CUDA kernels, their variants, and what auto takes."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    wins: Counter[str] = Counter()
    for r in records:
        if is_ours(r) and r["skipped"] is None:
            groups.setdefault(place(r), []).append(r)
    for group in groups.values():
        if any(not is_default(r) for r in group):
            group.sort(key=lambda r: r["median_ms"])
            rates = [f"{r['provider'].removeprefix(f'{DEFAULT}-')} {_rate(r)}" for r in group]
            first = group[0]
            yield f"cuda: {first['op']} {first['phase']} {_size(first)}: {', '.join(rates)}"
            if any(r.get("backend") == "cuda" for r in group):
                wins["csrc" if first.get("backend") == "cuda" else "Triton"] += 1
    if wins:
        count = ", ".join(f"{name} wins {n}" for name, n in wins.items())
        yield f"csrc or Triton, where both ran: {count}"


def _rate(r: Record) -> str:
    return f"{r['median_ms']:.4g} ms" if r["of_cublas"] is None else f"{r['of_cublas']:.1%}"


def share(record: Record) -> str:
    """The share of the nearer peak: cuBLAS or copy."""
    of = {"cuBLAS": record["of_cublas"] or 0, "copy": record["of_copy"] or 0}
    nearer = max(of, key=lambda name: of[name])
    return f", {of[nearer]:.1%} of {nearer}" if of[nearer] else ""


def _tunes(records: list[Record], tiles: list[Record]) -> Iterator[str]:
    if tiles:
        good = [r for r in tiles if r["skipped"] is None]
        yield f"tiles: {len(good)} timed, {len(tiles) - len(good)} unusable"
        for r in sorted(good, key=lambda r: r["median_ms"])[:1]:
            sizes = [r["tile"][k] for k in ("block_m", "block_n", "block_k")]
            yield f"  fastest of {r['kernel']}: {sizes}, {r['median_ms']:.4g} ms"
    for r in records:
        gain = r["table_ms"] / r["median_ms"] - 1
        yield f"tune: {r['kernel']} {r['dtype']} {_size(r)}: {gain:+.1%} over the table's tile"


def _answers(records: list[Record]) -> Iterator[str]:
    for r in records:
        yield f"{r['question']}: {r['answer']} ({r['detail']})"


def is_ours(record: Record) -> bool:
    """Providers of this library: fusedmlp, fusedmlp-BACKEND and fusedmlp-BACKEND-VARIANT."""
    return str(record["provider"]).startswith(DEFAULT)


def is_default(record: Record) -> bool:
    """Is it what auto takes, hence what a user gets?"""
    return bool(record["provider"] == DEFAULT)


def is_variant(record: Record) -> bool:
    """Was a variant of a kernel forced?"""
    return str(record["provider"]).startswith(f"{CUDA}-")
