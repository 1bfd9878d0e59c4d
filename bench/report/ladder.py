"""The ladder: what each variant of the sm_90a gated linear kernels was expected to do before any of
them had run on a GPU, beside what the ledgers say.

Every figure here is a prediction. Bytes a clock are computed: a multiprocessor multiplies a tile of
M x N by K in M N K / 2048 clocks, and reads what it needs of both operands from L2 meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..work import DGLU
from .ledger import Record
from .summary import CUDA, place

# The phase that times a kernel alone, and the op whose records hold it.
TIMED = {
    "gated_linear_fwd": ("gated_linear", "forward"),
    "gated_linear_bwd": ("gated_mlp", DGLU),
}


@dataclass(frozen=True)
class Rung:
    """A prediction: at the sizes named, `variant` takes low to high times as long as `over`.

    widths: the least and the largest D; always at M of 4096 or more.
    """

    kernel: str
    variant: str
    over: str
    widths: tuple[int, float]
    low: float
    high: float
    why: str

    @property
    def sizes(self) -> str:
        low, high = self.widths
        bounds = [f"D >= {low}"] * (low > 1) + [f"D <= {high:.0f}"] * (high < math.inf)
        return ", ".join(["M >= 4096", *bounds])

    @property
    def predicted(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f} x" if self.low else f"below {self.high:.2f} x"

    def covers(self, record: Record) -> bool:
        low, high = self.widths
        about = (record["case"], record["phase"]) == TIMED[self.kernel]
        return about and record["M"] >= 4096 and low <= record["D"] <= high


_ANY, _WIDE, _NARROW = (1, math.inf), (4096, math.inf), (1, 2048)

LADDER = (
    Rung("gated_linear_fwd", "cooperative-cluster1", "cooperative-cluster2", _ANY, 1.02, 1.05,
         "no multicast: 48 bytes a clock from L2, not 32"),
    Rung("gated_linear_fwd", "pingpong-cluster2", "cooperative-cluster2", _WIDE, 1.0, 1.03,
         "48 bytes a clock from L2, not 32; the epilogue that it hides is short here"),
    Rung("gated_linear_fwd", "pingpong-cluster2", "cooperative-cluster2", _NARROW, 0.0, 1.0,
         "it hides its epilogue; a cooperative tile exposes 3000 to 5000 clocks beside 16 D"),
    Rung("gated_linear_fwd", "pingpong-cluster1", "pingpong-cluster2", _ANY, 1.02, 1.05,
         "no multicast: 64 bytes a clock from L2, not 48"),
    Rung("gated_linear_bwd", "pingpong-cluster1", "pingpong-cluster2", _ANY, 1.03, 1.08,
         "no multicast: 64 bytes a clock from L2, not 48, beside what the epilogue moves"),
)  # fmt: skip

KERNELS = tuple(dict.fromkeys(rung.kernel for rung in LADDER))


def variants_of(kernel: str) -> tuple[str, ...]:
    """In the order of the extension's own table."""
    of = (name for r in LADDER if r.kernel == kernel for name in (r.over, r.variant))
    return tuple(dict.fromkeys(of))


VARIANTS = tuple(dict.fromkeys(name for kernel in KERNELS for name in variants_of(kernel)))


def provider(variant: str) -> str:
    return f"{CUDA}-{variant}"


def measure(rung: Rung, records: Sequence[Record]) -> list[tuple[float, Record]]:
    """Of each size that one GPU's records have both of: times as long, and the variant's record."""
    timed = [r for r in records if r["skipped"] is None and rung.covers(r)]
    base = {place(r): r["median_ms"] for r in timed if r["provider"] == provider(rung.over)}
    return [
        (r["median_ms"] / base[place(r)], r)
        for r in timed
        if r["provider"] == provider(rung.variant) and place(r) in base
    ]


def verdict(rung: Rung, measured: Sequence[tuple[float, Record]]) -> str:
    if not measured:
        return "not measured"
    held = sum(rung.low <= ratio <= rung.high for ratio, _ in measured)
    return "as predicted" if held == len(measured) else f"held at {held} of {len(measured)} sizes"
