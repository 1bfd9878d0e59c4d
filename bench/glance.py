"""What the bench says first: one line an op, whatever is wrong, and what to do next."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from . import machine
from .options import Record
from .render import number, say, table, width_of
from .variants import DEFAULT
from .work import DTYPES

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
RULE = (
    "Largest error of any result or gradient against float64, in percent of what the tolerance "
    "rule allows."
)


def strain(tensor: Record) -> float:
    """How much of what the rule allows was used; above 1 it failed."""
    uses = [
        tensor[field] / tensor[f"{field}_bound"]
        if tensor[f"{field}_bound"]
        else float(tensor[field] > 0)
        for field in ("max", "rms")
    ]
    return max(uses)


def show(records: Sequence[Record], complete: bool = True) -> None:
    """One line for each op that was checked or has a time, then failures and the count."""
    checks = [r for r in records if r["kind"] == "check"]
    header, times, about = _times(records)
    ops = dict.fromkeys(r["op"] for r in (*checks, *records) if "op" in r)
    rows = [[op, *_errors(checks, op), *times.get(op, ["-"] * len(header))] for op in ops]
    say(" ".join([RULE, *about]))
    table(
        "", ("op", *SHORT.values(), "", *header), rows, styles={"pass": "green", "FAIL": "red"},
        drop=("model", "of", "limit"),
    )  # fmt: skip
    for line in failures(checks):
        say(line)
    say(count(checks, complete))


def _errors(checks: Sequence[Record], op: str) -> list[str]:
    """The cells of an op: its worst error in each dtype, and the verdict on all of them."""
    own = [r for r in checks if r["op"] == op]
    cells = []
    for dtype in DTYPES:
        tensors = [t for r in own if r["dtype"] == dtype for t in r["tensors"].values()]
        cells.append(percent(max(map(strain, tensors))) if tensors else "-")
    verdict = "pass" if all(r["passed"] for r in own) else "FAIL"
    return [*cells, verdict if own else "-"]


def percent(share: float) -> str:
    """Never less than it is: 100.2% is past the bound and must not be read as on it."""
    return f"{-(-share * 100 // 1):.0f}%" if share < 1000 else "inf"


def failures(checks: Sequence[Record]) -> Iterator[str]:
    """Each wrong tensor with its worst coordinate, each call that raised with what it said."""
    for r in checks:
        what = f"{r['case']} {r['activation']} {r['dtype']} {r['M']}x{r['D']}x{r['H']}"
        what += f", {r['variant']}" if r.get("variant") else ""
        if "error" in r:
            yield f"FAIL {what}: {r['error']}"
        for name, t in r["tensors"].items():
            if not t["passed"]:
                worst = f" at {list(t['worst'])}" if t.get("worst") is not None else ""
                yield (
                    f"FAIL {what}: {name}{worst}: error {number(t['max'])}, allowed "
                    f"{number(t['max_bound'])}; rms {number(t['rms'])}, allowed "
                    f"{number(t['rms_bound'])}"
                )


def count(checks: Sequence[Record], complete: bool) -> str:
    tensors = sum(len(r["tensors"]) for r in checks)
    failed = sum(not r["passed"] for r in checks)
    backends = ", ".join(dict.fromkeys(r["backend"] for r in checks)) or "none"
    cases = len({r["case"] for r in checks})
    return (
        f"{len(checks)} checked, {failed} failed: {tensors} tensors of {cases} cases; backend "
        f"{backends}, device {', '.join(dict.fromkeys(r['device'] for r in checks)) or 'none'}."
        + ("" if complete else " Interrupted: the rest was not checked.")
    )


def _times(records: Sequence[Record]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """(header, cells by op, a sentence): measured times, or else computed ones."""
    measured = [r for r in records if r["kind"] == "time" and r["skipped"] is None]
    if measured:
        return _measured(measured)
    gpu = next(iter(machine.ROOFS))
    found: dict[str, Record] = {}
    for r in (r for r in records if r["kind"] == "predict" and r["gpu"] == gpu):
        # Forward and backward together, where there is a backward.
        if r["op"] not in found or (r["phase"], r["case"]) == ("both", found[r["op"]]["case"]):
            found[r["op"]] = r
    if not found:
        return [], {}, []
    tokens = ", ".join(str(m) for m in dict.fromkeys(r["M"] for r in found.values()))
    cells = {
        op: [number(r["roofline_ms"]), r["bound"], r["model"] or "-"] for op, r in found.items()
    }
    about = (
        f"Times are computed from {gpu}'s datasheet, not measured: forward and backward of "
        f"{tokens} tokens in bfloat16 take at least so many ms, for what limits them."
    )
    return [f"{gpu} ms", "limit", "model"], cells, [about]


def _measured(times: Sequence[Record]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """The largest call of each op, and how it compares with the fastest other there."""
    cells = {}
    for ours in times:
        if ours["provider"] != DEFAULT or (ours["op"] in cells and ours["phase"] != "both"):
            continue
        same = ("case", "phase", "dtype", "activation", "M", "D", "H")
        others = [
            r for r in times
            if r["provider"] != DEFAULT and all(r[field] == ours[field] for field in same)
        ]  # fmt: skip
        best = min(others, key=lambda r: r["median_ms"], default=None)
        ratio = "-" if best is None else f"{best['median_ms'] / ours['median_ms']:.2f}x"
        against = "-" if best is None else best["provider"]
        cells[ours["op"]] = [number(ours["median_ms"]), ratio, against, ours["model"] or "-"]
    tokens = ", ".join(str(m) for m in dict.fromkeys(r["M"] for r in times))
    about = (
        f"Times are measured: forward and backward of {tokens} tokens in bfloat16, and the speed "
        "beside the fastest other."
    )
    return ["ms", "speed", "of", "model"], cells, [about]


def next_steps(steps: Sequence[tuple[str, str]]) -> None:
    """What to type for what; where lines are short each command stands under its purpose."""
    print("\nNext:")
    what_width, command_width = (max(map(len, column)) for column in zip(*steps, strict=True))
    beside = what_width + command_width + 4 <= width_of(sys.stdout)
    for what, command in steps:
        print(f"  {what.ljust(what_width)}  {command}" if beside else f"  {what}:\n    {command}")
