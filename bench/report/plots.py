"""The plots of RESULTS.md: each GPU's roofline, and each op's speed over tokens beside baselines.

What a plot shows is settled without matplotlib, as plain data; drawing.py comes after. Each
SVG ends in the digest of its data and of its own text, so that a check needs no matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import Refusal, need, subparser
from ..variants import DEFAULT
from ..work import ops
from . import drawing
from .ledger import RESULTS, Ledger, LedgerError, Record, collect, load_own
from .summary import is_default, is_variant
from .tables import newest, size

WIDTHS = 3  # in a picture of times: a row of panels each
STYLE = 3  # raise it when the drawing changes, so that old plots count as stale


@dataclass(frozen=True)
class Plot:
    """data: plain JSON, everything that the picture depends on."""

    name: str
    title: str
    data: dict[str, Any]
    draw: Callable[[Any, str, dict[str, Any]], None]

    @property
    def digest(self) -> str:
        text = json.dumps([STYLE, self.title, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def _source(ledger: Ledger) -> str:
    # An installed copy has a version and no commit.
    version = f"fusedmlp {ledger.machine.get('fusedmlp', 'of unknown version')}"
    what = f"commit {ledger.commit[:12]}" if ledger.commit else version
    return f"{ledger.gpu}, {ledger.date}, {what}"


def plots_of(ledgers: Sequence[Ledger], ops: Sequence[str]) -> list[Plot]:
    """Every plot that the newest ledgers give, in the order of RESULTS.md."""
    return [*_rooflines(ledgers, ops), *_times(ledgers, ops)]


def _rooflines(ledgers: Sequence[Ledger], ops: Sequence[str]) -> Iterator[Plot]:
    """For each GPU and phase, six ops a picture: our plain cases in bfloat16 under the two peaks of
    their ledger. An op has the width at which most token counts were timed, or else the widest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for op in ops:
        for ledger, records in newest(ledgers, op, "time"):
            peaks = ledger.of_kind("peak")
            cublas = [
                r["tflops"] for r in peaks if r["name"] == "cublas" and r["dtype"] == "bfloat16"
            ]
            copy = [r["gbps"] for r in peaks if r["name"] == "copy"]
            if not cublas or not copy:
                continue
            ours = [
                r for r in _plain(records, op)
                if is_default(r) and r["flops"] and r["bytes"] and r["tflops"]
            ]  # fmt: skip
            for phase in dict.fromkeys(r["phase"] for r in ours):
                empty: dict[str, Any] = {"roofs": {}, "ops": {}, "sources": []}
                data = found.setdefault((ledger.gpu, phase), empty)
                # Two campaigns may have met different clocks; a roof is the best that was seen.
                roofs = data["roofs"]
                roofs["tflops"] = max(roofs.get("tflops", 0), *cublas)
                roofs["gbps"] = max(roofs.get("gbps", 0), *copy)
                width, points = _most([r for r in ours if r["phase"] == phase])
                data["ops"][f"{op}, {width}"] = points
                if _source(ledger) not in data["sources"]:
                    data["sources"].append(_source(ledger))
    for (gpu, phase), data in found.items():
        title = f"Roofline, {drawing.phase(phase)}, bfloat16\n{'; '.join(data['sources'])}"
        for end, part in _parts(data["ops"], drawing.MOST):
            name = f"roofline-{phase}-{slug(gpu)}{end}"
            yield Plot(name, title, data | {"ops": part}, drawing.roofline)


def _parts(rows: Mapping[str, Any], most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of each picture, with the end of its name: "-1", unless one picture holds all."""
    for i, part in enumerate(drawing.chunks(list(rows.items()), most)):
        yield "" if len(rows) <= most else f"-{i + 1}", dict(part)


def _most(records: Sequence[Record]) -> tuple[str, list[list[float]]]:
    """The width with most records, and its [M, FLOP a byte, TFLOP/s]."""
    widths: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        widths.setdefault((r["D"], r["H"]), []).append(r)
    (d, h), chosen = max(widths.items(), key=lambda item: (len(item[1]), item[0]))
    chosen.sort(key=lambda r: r["M"])
    return f"{d} x {h}", [[r["M"], r["flops"] / r["bytes"], r["tflops"]] for r in chosen]


def _plain(records: Sequence[Record], op: str) -> list[Record]:
    return [
        r for r in records
        if r["case"] == op and r["dtype"] == "bfloat16" and r["skipped"] is None
    ]  # fmt: skip


def _times(ledgers: Sequence[Ledger], ops: Sequence[str]) -> Iterator[Plot]:
    """A plot for each op, GPU and phase with two token counts or more; a row of panels a width."""
    for op in ops:
        for ledger, records in newest(ledgers, op, "time"):
            plain = [r for r in _plain(records, op) if not is_variant(r)]
            for phase in dict.fromkeys(r["phase"] for r in plain):
                panels = _panels([r for r in plain if r["phase"] == phase])
                if panels:
                    title = f"{op}, {drawing.phase(phase)}, bfloat16\n{_source(ledger)}"
                    names = _by_speed(panels)
                    shown, left_out = names[: drawing.MOST], sorted(names[drawing.MOST :])
                    kept = {width: _only(shown, panel) for width, panel in panels.items()}
                    kept = {width: panel for width, panel in kept.items() if panel["lines"]}
                    shared = {"op": op, "providers": shown, "left_out": left_out}
                    name = f"{slug(op)}-{phase}-{slug(ledger.gpu)}"
                    for end, part in _parts(kept, WIDTHS):
                        yield Plot(name + end, title, shared | {"panels": part}, drawing.times)


def _panels(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """width -> "lines": provider -> [M, ms, share, share at the 80% time, share at the 20% time],
    in percent; and "copy": the spans of M where it is a share of a copy and not of cuBLAS.

    Share of the nearer peak, which one size's providers have in common: so the curves of one panel
    keep their ratios, and few tokens are as legible as many.
    """
    panels: dict[str, dict[str, Any]] = {}
    of_copy: dict[str, dict[int, bool]] = {}
    for r in sorted(records, key=lambda r: (r["D"], r["H"], r["M"])):
        share = 100 * max(r["of_cublas"] or 0, r["of_copy"] or 0)
        if share:
            width = size(r).split(" x ", 1)[1]
            spread = [share * r["median_ms"] / r[f] for f in ("q80_ms", "q20_ms")]
            lines = panels.setdefault(width, {"lines": {}, "copy": []})["lines"]
            points = lines.setdefault(r["provider"], [])
            points.append([r["M"], r["median_ms"], share, *spread])
            nearer = (r["of_copy"] or 0) > (r["of_cublas"] or 0)
            of_copy.setdefault(width, {})[r["M"]] = nearer
    for width, panel in panels.items():
        panel["copy"] = _spans(of_copy[width])
    return {w: p for w, p in panels.items() if any(len(line) > 1 for line in p["lines"].values())}


def _only(providers: Sequence[str], panel: Mapping[str, Any]) -> dict[str, Any]:
    lines = {name: line for name, line in panel["lines"].items() if name in providers}
    return {"lines": lines, "copy": panel["copy"]}


def _spans(of_copy: Mapping[int, bool]) -> list[list[float]]:
    """Token counts side by side that have a copy as their peak, each span to halfway (on a
    logarithmic axis) to the next count with the other one."""
    counts = sorted(of_copy)
    found = []
    for copy, group in itertools.groupby(range(len(counts)), lambda i: of_copy[counts[i]]):
        if copy:
            first, *rest = group
            last = rest[-1] if rest else first
            low = (counts[first] * counts[first - 1]) ** 0.5 if first else counts[0] / 2
            after = last + 1 < len(counts)
            high = (counts[last] * counts[last + 1]) ** 0.5 if after else counts[-1] * 2
            found.append([low, high])
    return found


def _by_speed(panels: Mapping[str, Any]) -> list[str]:
    """Providers: ours, then the baselines by how many times the fastest's time they took, in the
    geometric mean over their sizes."""
    fastest: dict[tuple[str, float], float] = {}
    points = [
        (name, (width, point[0]), point[1])
        for width, panel in panels.items()
        for name, line in panel["lines"].items()
        for point in line
    ]
    for _, where, ms in points:
        fastest[where] = min(ms, fastest.get(where, ms))
    ratios: dict[str, list[float]] = {}
    for name, where, ms in points:
        ratios.setdefault(name, []).append(math.log(ms / fastest[where]))
    mean = {name: sum(some) / len(some) for name, some in ratios.items()}
    ours = sorted(name for name in mean if name.startswith(DEFAULT))
    return [*ours, *sorted(mean.keys() - ours, key=lambda name: (mean[name], name))]


def svg(plot: Plot) -> str:
    """The plot as SVG text: the same for the same data and matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Without a salt ids are random; text as paths looks alike wherever it is opened.
    with matplotlib.rc_context({"svg.hashsalt": "fusedmlp", "svg.fonttype": "path"}):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        plot.draw(figure, plot.title, plot.data)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Title": plot.title.splitlines()[0]}
        figure.savefig(buffer, format="svg", metadata=metadata, facecolor="white")
    return sign(buffer.getvalue(), plot.digest)


def sign(text: str, digest: str) -> str:
    body = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}<!-- data {digest}, picture {body} -->\n"


def fault(plot: Plot, path: Path) -> str | None:
    """What is wrong with the file of a plot; None where it shows the plot's data untouched."""
    if not path.exists():
        return "is missing"
    text, _, mark = path.read_text(encoding="utf-8").rpartition("<!-- data ")
    if f"<!-- data {mark}" != sign(text, plot.digest)[len(text) :]:
        return "shows other numbers, or was edited"
    return None


def write(plots: Sequence[Plot], folder: Path) -> None:
    """Draw what has changed. The folder may be a user's: what else lies there stays."""
    changed = [p for p in plots if fault(p, folder / f"{p.name}.svg")]
    if changed:
        need("matplotlib", "plots")
        folder.mkdir(parents=True, exist_ok=True)
    for plot in changed:
        (folder / f"{plot.name}.svg").write_text(svg(plot), encoding="utf-8")


def stale(plots: Sequence[Plot], folder: Path) -> list[Path]:
    names = {f"{plot.name}.svg" for plot in plots}
    return sorted(path for path in folder.glob("*.svg") if path.name not in names)


def _ledgers(args: argparse.Namespace) -> list[Ledger]:
    """Those of the files, or else of the folder."""
    try:
        if missing := [str(path) for path in args.files if not path.is_file()]:
            raise Refusal(f"plots: FILE must be a file, got {', '.join(missing)}: not there")
        if args.files:
            return [load_own(path) for path in args.files]
        if not args.results.is_dir():
            raise Refusal(f"plots: --results must be a folder of ledgers, got {args.results}")
        return collect(args.results)
    except LedgerError as error:
        if args.files:
            raise Refusal(f"plots: {error}") from error
        raise Refusal(
            "plots: --results must be a folder of ledgers, which campaign writes; what --json of "
            f"another command wrote is drawn by its own name, plots FILE: {error}"
        ) from error


def main(args: argparse.Namespace) -> int:
    need("matplotlib", "plots")
    plots = plots_of(_ledgers(args), ops())
    if not plots:
        raise Refusal(
            f"plots: {', '.join(map(str, args.files)) or args.results} has no times to draw; "
            "time --json FILE, on a GPU, takes them: of two token counts or more for a curve"
        )
    write(plots, args.out)
    print(*(f"wrote {args.out / plot.name}.svg" for plot in plots), sep="\n")
    return 0


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "plots",
        "draw times that time --json wrote, or the ledgers that campaign wrote",
        ("plots times.json", "plots --results results --out plots"),
        main,
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="what --json of time, or of no command, wrote")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR",
                        help="of ledgers, without FILE; default: a checkout's")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR",
                        help="default: plots, in the current folder")  # fmt: skip
