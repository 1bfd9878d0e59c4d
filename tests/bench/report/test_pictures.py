"""The pictures that are published or that a user draws: what a stranger needs to read them."""

import functools
import itertools
import re
from pathlib import Path

import pytest

from fusedmlp.bench.experiments import lm, lm_page
from fusedmlp.bench.report import drawing, ledger as book, plots

ROOT = Path(__file__).parents[3]
WIDTHS = ((1536, 4096), (2048, 8192), (4096, 11008), (4096, 14336))
TOKENS = (1, 16, 64, 256, 2048, 8192, 16384)
PROVIDERS = ("fusedmlp", "fusedmlp-cuda", "eager", "eager-packed", "compile", "compile-packed",
             "quack", "liger", "flash-swiglu")  # fmt: skip
OPS = ("gated_act", "gated_linear", "gated_mlp", "linear_act", "mlp", "moe_mlp", "binary_linear")


def crowded() -> book.Ledger:
    """Made up, as full as a long campaign's: seven ops, four widths, seven token counts, nine
    providers; a copy limits few tokens, cuBLAS many."""
    ledger = book.load(ROOT / "tests/data/synthetic.json")
    one = ledger.of_kind("time")[0]
    ledger.records = ledger.of_kind("peak")
    for i, (op, (d, h), m) in enumerate(itertools.product(OPS, WIDTHS, TOKENS)):
        flops, moved = (4 * m * d * h, 4 * d * h + 2 * m * (d + 2 * h))
        if op == "gated_act":
            flops, moved = 5 * m * h, 6 * m * h
        by_gemm, by_copy = flops / 686e9, moved / 3e9
        for rank, name in enumerate(PROVIDERS):
            ms = max(by_gemm, by_copy) * (1 + 0.1 * rank + 0.02 * (i % 3)) + 1e-3
            ledger.records.append(one | {
                "case": op, "op": op, "M": m, "D": d, "H": h, "provider": name, "flops": flops,
                "bytes": moved, "median_ms": ms, "q20_ms": 0.98 * ms, "q80_ms": 1.03 * ms,
                "tflops": flops / ms / 1e9, "gbps": moved / ms / 1e6, "model": None,
                "of_cublas": None if op == "gated_act" else by_gemm / ms, "of_copy": by_copy / ms,
            })  # fmt: skip
    return ledger


def narrow() -> book.Ledger:
    """Two token counts that take as long."""
    ledger = book.load(ROOT / "tests/data/synthetic.json")
    ledger.records = [r for r in ledger.records if r.get("M") in (1, 16)]
    return ledger


LOSSES = lm_page.plots(lm.read(ROOT / "bench/results/lm"))
SMALL = plots.plots_of([book.load(ROOT / "tests/data/synthetic.json")], OPS)
FULL = plots.plots_of([crowded()], OPS)
NARROW = plots.plots_of([narrow()], ["gated_linear"])
EVERY = {f"{where}:{plot.name}": plot for where, some in
         (("lm", LOSSES), ("small", SMALL), ("full", FULL), ("narrow", NARROW)) for plot in some
         # Ops differ in numbers alone: one of each limit will do.
         if where != "full" or plot.data.get("op") in (None, "gated_act", "mlp")}  # fmt: skip
TIMES = [key for key in EVERY if "providers" in EVERY[key].data]
ROOFLINES = [key for key in EVERY if "roofs" in EVERY[key].data]


@pytest.fixture(scope="module")
def drawn():
    """A function of a picture's key: the figure, laid out."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    @functools.cache
    def draw(key):
        figure = Figure(layout="constrained", dpi=72)
        FigureCanvasAgg(figure)
        plot = EVERY[key]
        plot.draw(figure, plot.title, plot.data)
        figure.canvas.draw()
        return figure

    return draw


def texts(figure):
    from matplotlib.text import Text

    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def shown_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [
        label for place, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        if low <= place <= high
    ]  # fmt: skip


def overlap(a, b):
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


@pytest.mark.parametrize("key", EVERY)
def test_a_picture_can_be_read(key, drawn):
    figure = drawn(key)
    assert figure.get_size_inches()[0] == drawing.WIDTH  # shown in a README at its own size
    assert min(text.get_fontsize() for text in texts(figure)) >= 7
    page = figure.bbox
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = shown_ticks(axis)
            assert len(ticks) >= (2 if key.startswith("narrow") and axis is axes.xaxis else 3), axis
            assert all(re.fullmatch(r"[\d.]+k?", t.get_text()) for t in ticks), ticks
            boxes = [t.get_window_extent() for t in ticks]
            assert not any(overlap(*pair) for pair in itertools.pairwise(boxes)), ticks
            assert not axis.get_minorticklocs().size
            assert axis.get_label_text()
            boxes.append(axis.label.get_window_extent())
            for box in boxes:
                assert page.x0 <= box.x0 and box.x1 <= page.x1, key
                assert page.y0 <= box.y0 and box.y1 <= page.y1, key


@pytest.mark.parametrize("key", EVERY)
def test_the_legend_lies_outside_with_six_lines_at_most(key, drawn):
    figure = drawn(key)
    (legend,) = figure.legends
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert 1 <= len(legend.get_texts()) <= 6
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    for axes in figure.axes:
        assert not overlap(box, axes.get_tightbbox())
    above = [*figure.texts, *([figure._suptitle] if figure._suptitle else [])]
    for title in (*above, *(axes.title for axes in figure.axes)):
        assert not overlap(box, title.get_window_extent())


@pytest.mark.parametrize("key", [key for key in EVERY if key.startswith("lm:")])
def test_losses_are_sorted_and_their_bands_explained(key, drawn):
    figure, data = drawn(key), EVERY[key].data
    (axes,) = figure.axes
    assert "bands: from the lowest seed to the highest" in axes.get_title()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    last = [float(label.split()[0]) for label in labels]
    assert last == sorted(last)
    black = [line.get_label() for line in axes.lines if line.get_color() == "black"]
    assert [data["baseline"] in label for label in black] == [True]
    for label, (model, runs) in zip(labels, data["curves"].items(), strict=True):
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        assert label == f"{label.split()[0]}  {model}, {seeds}"
    assert len(axes.collections) == sum(len(runs) > 1 for runs in data["curves"].values())


def test_every_model_has_a_picture_in_which_the_baseline_is():
    by_name = dict(lm_page.comparisons(lm.read(ROOT / "bench/results/lm")))
    for name, models in by_name.items():
        mine = [plot for plot in LOSSES if plot.name.startswith(name)]
        shown = [model for plot in mine for model in plot.data["curves"]]
        baseline = next(iter(models))
        assert {*shown} == {*models} and shown.count(baseline) == len(mine)
        assert len(shown) == len(models) + len(mine) - 1
        assert len({tuple(plot.data["limits"]) for plot in mine}) == 1


@pytest.mark.parametrize("key", TIMES)
def test_times_are_in_milliseconds_and_as_shares_of_a_marked_yardstick(key, drawn):
    figure, data = drawn(key), EVERY[key].data
    assert len(data["panels"]) <= plots.WIDTHS
    assert "cuBLAS or, in grey, a device copy" in figure._suptitle.get_text()
    assert all(name in figure._suptitle.get_text() for name in data["left_out"])
    pairs = [figure.axes[i : i + 2] for i in range(0, len(figure.axes), 2)]
    for (left, right), panel in zip(pairs, data["panels"].values(), strict=True):
        assert left.get_ylabel() == "milliseconds" and right.get_ylabel().startswith("% of cuBLAS")
        assert len(left.lines) == len(panel["lines"]) <= drawing.MOST
        drawn_ms = {tuple(line.get_ydata()) for line in left.lines}
        assert drawn_ms == {tuple(p[1] for p in line) for line in panel["lines"].values()}
        spans = [[bar.get_x(), bar.get_x() + bar.get_width()] for bar in right.patches]
        assert spans == panel["copy"]


def test_the_yardstick_is_marked_where_it_changes():
    panels = next(p for p in FULL if p.name == "gated_linear-forward-synthetic-1").data["panels"]
    copies = {d: [m for m in TOKENS if 4 * m * d * h / 686 < (4 * d * h + 2 * m * (d + 2 * h)) / 3]
              for d, h in WIDTHS}  # fmt: skip
    assert {1, 16, 64} <= {*copies[4096]} and 16384 not in copies[4096]
    for width, panel in panels.items():
        grey = [m for m in TOKENS if any(low < m < high for low, high in panel["copy"])]
        assert grey == copies[int(width.split()[0])]
    assert plots._spans({1: False, 4: True, 16: False, 64: True}) == [[2, 8], [32, 128]]


def test_the_slowest_are_left_out_and_named():
    (first, *_) = [p for p in FULL if p.name.startswith("gated_mlp-forward")]
    assert first.data["providers"] == [*PROVIDERS[:6]]
    assert first.data["left_out"] == sorted(PROVIDERS[6:])


@pytest.mark.parametrize("key", ROOFLINES)
def test_rooflines_name_the_size_of_each_point(key, drawn):
    figure, data = drawn(key), EVERY[key].data
    (axes,) = figure.axes
    labels = [t for t in axes.texts if "/s" not in t.get_text()]
    said = {text for label in labels for text in label.get_text().split(" to ")}
    for points in data["ops"].values():  # of points on each other, the ends of the range
        assert drawing.short(points[0][0]) in said and drawing.short(points[-1][0]) in said
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    for text in figure.legends[0].get_texts():
        assert re.fullmatch(r"\w+, \d+ x \d+", text.get_text())


def test_pictures_speak_plain_words(drawn):
    for key in EVERY:
        said = " ".join(text.get_text() for text in texts(drawn(key)))
        assert not re.search(r"stick|dglu|nearer|\$|10\^", said, re.IGNORECASE), said
