"""How the pictures look: as wide as a README's column, plain ticks, the legend outside.

matplotlib is imported where something is drawn, so that a check of pictures works without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..variants import CUDA, DEFAULT

WIDTH = 8.0  # inches: at 100 dots each, a README's column, where 8 points can be read
SMALL = 8
MOST = 6  # lines in a picture
# Okabe and Ito's palette, which colour-blind readers can tell apart; black is ours or the baseline.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X")
# In points of 1/72 inch from the lower left corner of the axes: a place; and left, lower, right,
# upper.
Spot = tuple[float, float]
Box = tuple[float, float, float, float]
PHASES = {"both": "forward and backward", "dglu": "the backward GEMM that ends in the gate"}


def phase(name: str) -> str:
    return PHASES.get(name, name)


def chunks(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, max(1, len(items)), most):
        yield items[start : start + most]


def short(tokens: int) -> str:
    """4096 -> "4k"."""
    return str(tokens) if tokens % 1024 or not tokens else f"{tokens // 1024}k"


def _decades(axis: Any) -> None:
    """Ticks of a logarithmic axis: 0.5, 1, 2; where it spans three decades or more, 0.1, 1, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _token_axis(axes: Any, tokens: Iterable[int]) -> None:
    """A tick at each count of tokens, but for those whose labels would touch."""
    counts = sorted(set(tokens))
    apart = math.log2(4 * counts[-1] / counts[0]) / 18
    ticks: list[int] = []
    for count in counts:
        if not ticks or math.log2(count / ticks[-1]) > apart:
            ticks.append(count)
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] / 2, counts[-1] * 2)
    axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens M (1k = 1024)", fontsize=SMALL)


def times(figure: Any, title: str, data: dict[str, Any]) -> None:
    """A row a width: milliseconds, and shares of what limits that size."""
    panels, names = data["panels"], data["providers"]
    figure.set_size_inches(WIDTH, 2.4 * len(panels) + 1.7)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), (width, panel) in zip(grid, panels.items(), strict=True):
        lines = {name: panel["lines"][name] for name in reversed(names) if name in panel["lines"]}
        tokens = [point[0] for points in lines.values() for point in points]
        for name, points in lines.items():  # ours on top
            xs, ms, shares, lows, highs = zip(*points, strict=True)
            left.plot(xs, ms, **_look(name, names))
            spread = [[y - a for y, a in zip(shares, lows, strict=True)],
                      [b - y for y, b in zip(shares, highs, strict=True)]]  # fmt: skip
            handles[name] = right.errorbar(xs, shares, spread, capsize=2, **_look(name, names))
        left.set_ylabel("milliseconds", fontsize=SMALL)
        every = [point[1] for points in lines.values() for point in points]
        if max(every) > 5 * min(every):
            left.set_yscale("log")
            _decades(left.yaxis)
        else:
            left.set_ylim(0, 1.05 * max(every))
        right.axhline(100, color="black", linewidth=1, linestyle=":")
        right.set_ylim(0, 1.05 * max(100, *(p[4] for points in lines.values() for p in points)))
        right.set_ylabel("% of cuBLAS; grey: of copy", fontsize=SMALL)
        for axes in (left, right):
            _token_axis(axes, tokens)
            axes.set_title(f"D x H = {width}", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)
            axes.grid(True, alpha=0.3)
        for low, high in panel["copy"]:
            right.axvspan(low, high, color="#DDDDDD", zorder=0, linewidth=0)
    more = "100% is what cuBLAS or, in grey, a device copy reached in the same run"
    more += "\nbars: 20% to 80% of the samples"
    if data["left_out"]:
        more += f"; left out as slower: {', '.join(data['left_out'])}"
    figure.suptitle(f"{title}\n{more}", fontsize=9)
    order = [name for name in names if name in handles]
    figure.legend(
        [handles[n] for n in order], order, fontsize=SMALL, ncols=3, loc="outside lower center"
    )


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Ours in black, its CUDA kernels dashed, the baselines by their place among the baselines."""
    look: dict[str, Any] = {"markersize": 4, "color": "black", "marker": "o", "linewidth": 2}
    if name.startswith(DEFAULT):
        return look | ({"linestyle": "--"} if name == CUDA else {})
    i = sorted(n for n in names if not n.startswith(DEFAULT)).index(name)
    return look | {"color": COLOURS[i], "marker": MARKERS[i], "linewidth": 1}


# Where a roofline's axes lie, in inches: fixed, so that labels can be placed.
_LEFT, _AXES_WIDTH, _AXES_HEIGHT, _ABOVE, _BELOW = 0.65, 7.2, 3.4, 0.75, 0.5


def roofline(figure: Any, title: str, data: dict[str, Any]) -> None:
    rows = -(-len(data["ops"]) // 2)
    bottom = _BELOW + 0.4 + 0.18 * rows
    height = bottom + _AXES_HEIGHT + _ABOVE
    figure.set_layout_engine("none")
    figure.set_size_inches(WIDTH, height)
    axes = figure.add_axes(
        (_LEFT / WIDTH, bottom / height, _AXES_WIDTH / WIDTH, _AXES_HEIGHT / height)
    )
    peak, rate = data["roofs"]["tflops"], data["roofs"]["gbps"] / 1000
    every = [point for points in data["ops"].values() for point in points]
    left = min([p[1] for p in every] + [peak / rate]) / 2
    right = max([p[1] for p in every] + [peak / rate]) * 2
    low, high = min([p[2] for p in every] + [left * rate]) / 2, 2 * peak
    axes.plot([left, peak / rate, right], [left * rate, peak, peak], color="black", linewidth=1.2)
    roofs = f"cuBLAS {peak:.0f} TFLOP/s", f"copy {rate * 1000:.0f} GB/s"
    middle = (left * peak / rate) ** 0.5
    axes.annotate(roofs[0], (right, peak), xytext=(-4, 4), ha="right", fontsize=SMALL,
                  textcoords="offset points")  # fmt: skip
    axes.annotate(roofs[1], (middle, middle * rate), xytext=(-6, 4), ha="right", fontsize=SMALL,
                  textcoords="offset points")  # fmt: skip

    def spot(point: Sequence[float]) -> Spot:
        x = math.log(point[1] / left) / math.log(right / left)
        y = math.log(point[2] / low) / math.log(high / low)
        return 72 * _AXES_WIDTH * x, 72 * _AXES_HEIGHT * y

    for i, (name, points) in enumerate(data["ops"].items()):
        axes.plot([p[1] for p in points], [p[2] for p in points], linestyle="", markersize=6,
                  marker=MARKERS[i], color=COLOURS[i], label=name)  # fmt: skip
    labelled = labels([[(p[0], spot(p)) for p in points] for points in data["ops"].values()])
    x, y = spot((0, right, peak))
    taken = [(x - 5 * len(roofs[0]), y, x, y + 12)]
    for (at, text), place in zip(labelled, offsets(labelled, map(spot, every), taken), strict=True):
        axes.annotate(text, at, xycoords="axes points", xytext=place, textcoords="offset points",
                      fontsize=7, ha="center", va="center")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set_xlabel("useful FLOP per byte that must move", fontsize=SMALL)
    axes.set_ylabel("TFLOP/s", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    _decades(axes.xaxis)
    _decades(axes.yaxis)
    axes.grid(True, alpha=0.3)
    figure.suptitle(f"{title}\nat each point: tokens M (1k = 1024)", fontsize=9)
    figure.legend(fontsize=SMALL, ncols=2, loc="lower center", title="op, D x H",
                  title_fontsize=SMALL)  # fmt: skip


def labels(ops: Iterable[Sequence[tuple[int, Spot]]]) -> list[tuple[Spot, str]]:
    """(where, text). An op's points that lie on each other share a label, "256 to 16k", and so do
    points of several ops that are side by side and have as many tokens."""
    found: list[tuple[Spot, str]] = []
    for points in ops:
        groups: list[list[tuple[int, Spot]]] = []
        for tokens, at in points:
            if groups and math.dist(at, groups[-1][0][1]) < 5:
                groups[-1].append((tokens, at))
            else:
                groups.append([(tokens, at)])
        for group in groups:
            at, ends = group[0][1], (group[0][0], group[-1][0])
            text = " to ".join(map(short, dict.fromkeys(ends)))
            if not any(text == other and math.dist(at, spot) < 16 for spot, other in found):
                found.append((at, text))
    return found


def offsets(
    labelled: Sequence[tuple[Spot, str]], markers: Iterable[Spot], taken: Iterable[Box] = ()
) -> list[Spot]:
    """Where to write each text, in points from its spot, so that it lies on no marker, on no other
    text and on nothing in `taken`: below where it can, for the roof is above."""
    boxes = [*taken, *((x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in markers)]
    found = []
    for (x, y), text in labelled:
        half_w, half_h = 2.1 * len(text) + 1, 3.5
        tried: list[tuple[int, int, Spot, Box]] = []
        for sides in (((0, -1), (1, -1), (-1, -1), (1, 0), (-1, 0)), ((0, 1), (1, 1), (-1, 1))):
            for far in (0, 5, 10, 15):
                for side in sides:
                    dx = side[0] * (5 + half_w + far)
                    dy = side[1] * (4.5 + half_h + far)
                    box = x + dx - half_w, y + dy - half_h, x + dx + half_w, y + dy + half_h
                    tried.append((sum(_meet(box, b) for b in boxes), len(tried), (dx, dy), box))
        _, _, place, box = min(tried)
        boxes.append(box)
        found.append(place)
    return found


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def losses(figure: Any, title: str, data: dict[str, Any]) -> None:
    """A line a model, the best last loss first in the legend; the baseline in black."""
    figure.set_size_inches(WIDTH, 4.2)
    axes = figure.add_subplot()
    colours = iter(COLOURS)
    for model, curves in data["curves"].items():
        steps = [step for step, _ in curves[0]]
        at = list(zip(*([loss for _, loss in curve] for curve in curves), strict=True))
        mean = [sum(some) / len(some) for some in at]
        colour = "black" if model == data["baseline"] else next(colours)
        seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
        axes.plot(steps, mean, color=colour, label=f"{mean[-1]:.3f}  {model}, {seeds}")
        if len(curves) > 1:
            axes.fill_between(steps, list(map(min, at)), list(map(max, at)), color=colour,
                              alpha=0.25, linewidth=0)  # fmt: skip
    axes.set_ylim(data["limits"])
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("held-out loss, bits a byte", fontsize=9)
    axes.tick_params(labelsize=SMALL)
    axes.grid(True, alpha=0.3)
    band = "lines: mean over seeds; bands: from the lowest seed to the highest"
    axes.set_title(f"{title}\n{band}", fontsize=9)
    figure.legend(fontsize=SMALL, loc="outside right upper", title=f"after {steps[-1]} steps",
                  title_fontsize=SMALL)  # fmt: skip
