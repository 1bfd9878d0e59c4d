"""How time and peak memory grow with tokens, experts, depth, masks and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ... import masked_gated_mlp, reference
from ...layers import PathWeightedFFF
from . import clock, yardsticks
from .targets import WIDTH, experts_of, step_of, tree_of

Calls = Mapping[str, Callable[[], object]]
Record = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """name: what runs. axis: what grows, over `points`. make: the calls at a point, by whose."""

    name: str
    axis: str
    points: tuple[int, ...]
    make: Callable[[int], Calls]


def _experts(T: int) -> Calls:
    torch._dynamo.reset()
    _, calls = experts_of(64, T)
    return {**calls, "ours, compiled": torch.compile(calls["ours"])}


def _tree(depth: int) -> Calls:
    tree, x = tree_of(depth), torch.randn(1, WIDTH)
    return {
        "ours": lambda: tree(x),
        "mlp_utils' algorithm": lambda: yardsticks.leaves_by_mask(tree, x),
    }


def _path(depth: int) -> Calls:
    tree, x = PathWeightedFFF(WIDTH, depth, WIDTH), torch.randn(64, WIDTH)
    return {
        "ours": lambda: tree(x),
        "mlp_utils' algorithm": lambda: yardsticks.path_by_gathers(tree, x),
    }


def _masks(n_m: int) -> Calls:
    x, w, down = torch.randn(256, WIDTH), torch.randn(1024, WIDTH), torch.randn(WIDTH, 1024)
    tensors: Any = [x, w, torch.randn(n_m, 1024, WIDTH), down]
    torch._dynamo.reset()
    formula = torch.compile(reference.masked_gated_mlp)
    return {
        "ours": lambda: masked_gated_mlp(*tensors),
        "the formula, compiled": lambda: formula(*tensors),
    }


def sweeps() -> list[Sweep]:
    return [
        Sweep("moe_mlp, E 64, k 2", "tokens T", (1, 32, 1024), _experts),
        Sweep("FastFeedForward, one token", "depth; 2^depth experts", (1, 4, 7, 10), _tree),
        Sweep("PathWeightedFFF, 64 tokens", "depth", (1, 3, 5), _path),
        Sweep("masked_gated_mlp, 256 tokens", "masks n_m", (1, 4, 8), _masks),
        Sweep(
            "HyperGLU.step at position 64", "block_size L", (128, 1024, 4096),
            lambda L: {"ours": step_of(L, 64)},
        ),
        Sweep(
            "HyperGLU.step, block_size 4096", "position", (64, 1024, 4095),
            lambda t: {"ours": step_of(4096, t)},
        ),
    ]  # fmt: skip


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that PyTorch's allocator held at once for the call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(rounds: int, chosen: Sequence[Sweep]) -> Iterator[Record]:
    """A record for each point and caller: forward, without gradients."""
    for sweep in chosen:
        for point in sweep.points:
            torch.manual_seed(0)
            with torch.no_grad():
                calls = sweep.make(point)
                times = clock.turns(calls, rounds)
                for name, call in calls.items():
                    yield {
                        "sweep": sweep.name, "axis": sweep.axis, "point": point, "who": name,
                        "us": round(1e6 * median(times[name]), 1), "peak_bytes": peak_bytes(call),
                    }  # fmt: skip


def plot(records: Sequence[Record], path: Path) -> None:
    """Two rows of panels, time above memory, a column for each sweep."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fusedmlp"
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(record["sweep"] for record in records))
    figure, panels = plt.subplots(
        2, len(names), figsize=(3.4 * len(names), 6.5), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        own = [record for record in records if record["sweep"] == name]
        for row, (field, label) in enumerate((("us", "us"), ("peak_bytes", "peak bytes"))):
            axes = panels[row][column]
            for who in dict.fromkeys(record["who"] for record in own):
                points = [(r["point"], max(r[field], 1)) for r in own if r["who"] == who]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=who)
            axes.set(
                xlabel=own[0]["axis"], ylabel=label, yscale="log", title=name if not row else ""
            )
            if "depth" not in own[0]["axis"]:
                axes.set_xscale("log", base=2)
            axes.legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
