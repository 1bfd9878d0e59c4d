"""The plots of RESULTS.md: each GPU's roofline, and each op's speed over tokens beside baselines.

What a plot shows is settled without matplotlib, as plain data; drawing comes after. Each SVG ends
in the digest of its data and of its own text, so that a check needs no matplotlib at all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import Refusal, need, subparser
from ..variants import CUDA, DEFAULT
from ..work import ops
from .ledger import RESULTS, Ledger, LedgerError, Record, collect, load_own
from .summary import is_default, is_variant
from .tables import newest, size

STYLE = 2  # raise it when the drawing changes, so that old plots count as stale
# Okabe and Ito's palette, which colour-blind readers can tell apart; ours is the black one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A000")
# The line at 100%: which of the two it is may change from one token count to the next.
PEAK = "cuBLAS or copy, whichever limits first"
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")


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
    return [*_rooflines(ledgers, ops), *_curves(ledgers, ops)]


def _rooflines(ledgers: Sequence[Ledger], ops: Sequence[str]) -> Iterator[Plot]:
    """A plot for each GPU: our plain cases in bfloat16 under the two peaks of their ledger."""
    by_gpu: dict[str, dict[str, Any]] = {}
    for op in ops:
        for ledger, records in newest(ledgers, op, "time"):
            peaks = ledger.of_kind("peak")
            cublas = [
                r["tflops"] for r in peaks if r["name"] == "cublas" and r["dtype"] == "bfloat16"
            ]
            copy = [r["gbps"] for r in peaks if r["name"] == "copy"]
            points = [
                [r["flops"] / r["bytes"], r["tflops"], r["phase"]]
                for r in _plain(records, op)
                if is_default(r) and r["flops"] and r["bytes"] and r["tflops"]
            ]
            if cublas and copy and points:
                data = by_gpu.setdefault(ledger.gpu, {"roofs": {}, "ops": {}, "sources": []})
                # Two campaigns may have met different clocks; a roof is the best that was seen.
                roofs = data["roofs"]
                roofs["tflops"] = max(roofs.get("tflops", 0), *cublas)
                roofs["gbps"] = max(roofs.get("gbps", 0), *copy)
                data["ops"][op] = points
                if _source(ledger) not in data["sources"]:
                    data["sources"].append(_source(ledger))
    for gpu, data in by_gpu.items():
        title = f"Roofline, bfloat16\n{'; '.join(data['sources'])}"
        yield Plot(f"roofline-{slug(gpu)}", title, data, _draw_roofline)


def _plain(records: Sequence[Record], op: str) -> list[Record]:
    return [
        r for r in records
        if r["case"] == op and r["dtype"] == "bfloat16" and r["skipped"] is None
    ]  # fmt: skip


def _curves(ledgers: Sequence[Ledger], ops: Sequence[str]) -> Iterator[Plot]:
    """A plot for each op, GPU and phase with two token counts or more; a panel a width."""
    for op in ops:
        for ledger, records in newest(ledgers, op, "time"):
            plain = [r for r in _plain(records, op) if not is_variant(r)]
            for phase in dict.fromkeys(r["phase"] for r in plain):
                panels = _panels([r for r in plain if r["phase"] == phase])
                if panels:
                    title = f"{op}, {phase}, bfloat16\n{_source(ledger)}"
                    data = {"op": op, "panels": panels}
                    yield Plot(f"{slug(op)}-{phase}-{slug(ledger.gpu)}", title, data, _draw_curves)


def _panels(records: Sequence[Record]) -> dict[str, dict[str, list[list[float]]]]:
    """width -> provider -> [M, share, share at the 80% time, share at the 20% time], in percent.

    Share of the nearer peak, which one size's providers have in common: so the curves of one panel
    keep their ratios, and few tokens are as legible as many.
    """
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for r in sorted(records, key=lambda r: (r["D"], r["H"], r["M"])):
        share = 100 * max(r["of_cublas"] or 0, r["of_copy"] or 0)
        if share:
            width = size(r).split(" x ", 1)[1]
            spread = [share * r["median_ms"] / r[f] for f in ("q80_ms", "q20_ms")]
            points = panels.setdefault(width, {}).setdefault(r["provider"], [])
            points.append([r["M"], share, *spread])
    return {w: p for w, p in panels.items() if any(len(points) > 1 for points in p.values())}


def _draw_roofline(figure: Any, title: str, data: dict[str, Any]) -> None:
    figure.set_size_inches(8, 5.2)
    axes = figure.add_subplot()
    peak, rate = data["roofs"]["tflops"], data["roofs"]["gbps"] / 1000
    every = [p for points in data["ops"].values() for p in points]
    low = min([p[0] for p in every] + [peak / rate]) / 2
    high = max([p[0] for p in every] + [peak / rate]) * 2
    axes.plot([low, peak / rate, high], [low * rate, peak, peak], color="black", linewidth=1.2)
    axes.annotate(f"cuBLAS {peak:.0f} TFLOP/s", (high, peak), xytext=(-4, 4), ha="right",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    middle = (low * peak / rate) ** 0.5
    axes.annotate(f"copy {rate * 1000:.0f} GB/s", (middle, middle * rate), xytext=(-6, 4),
                  ha="right", textcoords="offset points", fontsize=8)  # fmt: skip
    fills = {"forward": "full", "backward": "none", "both": "left", "dglu": "bottom"}
    for i, (op, points) in enumerate(data["ops"].items()):
        for phase in dict.fromkeys(p[2] for p in points):
            xs, ys = zip(*[(p[0], p[1]) for p in points if p[2] == phase], strict=True)
            axes.plot(xs, ys, linestyle="", marker=MARKERS[i % len(MARKERS)], markersize=6,
                      color=COLOURS[i % len(COLOURS)], fillstyle=fills[phase],
                      label=f"{op}, {phase}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte that must move",
             ylabel="TFLOP/s")  # fmt: skip
    _plain_ticks(axes)
    axes.set_xlim(low, high)
    axes.set_ylim(top=2 * peak)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _draw_curves(figure: Any, title: str, data: dict[str, Any]) -> None:
    panels = data["panels"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(max(5.5, 4 * columns), 3.1 * rows + 1.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = _ours_first({name for providers in panels.values() for name in providers})
    highest = max(p[3] for lines in panels.values() for points in lines.values() for p in points)
    handles: dict[str, Any] = {}
    for axes, (width, providers) in zip(grid.flat, panels.items(), strict=False):
        for name in (n for n in reversed(names) if n in providers):  # ours on top
            xs, ys, lows, highs = map(list, zip(*providers[name], strict=True))
            spread = [[y - a for y, a in zip(ys, lows, strict=True)],
                      [b - y for y, b in zip(ys, highs, strict=True)]]  # fmt: skip
            handles[name] = axes.errorbar(xs, ys, yerr=spread, **_look(name, names))
        handles[PEAK] = axes.axhline(100, color="black", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in providers.values() for p in points})
        axes.set_xticks(ticks, [str(t) for t in ticks], rotation=45)
        axes.minorticks_off()
        axes.set_ylim(0, 1.05 * max(100, highest))
        axes.tick_params(labelsize=8, labelleft=True)
        axes.set_title(f"D x H = {width}", fontsize=8)
        axes.set_xlabel("tokens M", fontsize=8)
        axes.set_ylabel("% of cuBLAS or copy,\nwhichever limits first", fontsize=8)
        axes.grid(True, alpha=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{title}\nbars: 20% to 80% of the samples", fontsize=9)
    order = [name for name in (*names, PEAK) if name in handles]
    figure.legend(
        [handles[n] for n in order], order, fontsize=8, ncols=4, loc="outside lower center"
    )


def _ours_first(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.startswith(DEFAULT), name))


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Ours in black, its CUDA kernels dashed, the baselines by their place among the baselines."""
    if name.startswith(DEFAULT):
        line = {"linestyle": "--", "fillstyle": "none"} if name == CUDA else {}
        look = {"color": "black", "marker": "o", "linewidth": 2, "markersize": 4, "capsize": 2}
        return look | line
    i = [n for n in names if not n.startswith(DEFAULT)].index(name)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 1, "markersize": 4, "capsize": 2}  # fmt: skip


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
        if args.files:
            return [load_own(path) for path in args.files]
        if not args.results.is_dir():
            raise Refusal(f"plots: --results must be a folder of ledgers, got {args.results}")
        return collect(args.results)
    except LedgerError as error:
        raise Refusal(
            "plots draws ledgers, which campaign writes; what --json of another command wrote is "
            f"drawn by its name, plots FILE: {error}"
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
