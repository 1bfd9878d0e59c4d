"""One job executed: in several orders of what the hardware leaves open, and judged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .... import backend
from ....backends.library import serve_cpu
from ....testing.rule import error_of
from ..ptx import Finding, Order, Unknown, emulate
from .jobs import Job, Prepared

__all__ = ["ORDERS", "Executed", "execute"]

# The first three must give the same bits; the last shows that no verdict hangs on the order of a
# sum or on how good an approximation is.
SAME = (Order("late"), Order("once"), Order("seed", 1))
ORDERS = (*SAME, Order("seed", 2, "backwards", 1.0))


@dataclasses.dataclass(frozen=True)
class Executed:
    """One row of the report. job: its name. orders: in which it ran. error and bound: of the result
    that comes nearest to its bound, in the maximum or the RMS, which `result` says. findings: empty
    where all is right. launched: kernels as the compiler names them. run_s: of the machine;
    other_s: Triton's compiler and the reference."""

    job: str
    orders: tuple[str, ...]
    kernel: str
    arch: str
    dtype: str
    what: str
    tile: str
    result: str
    error: float
    bound: float
    findings: tuple[str, ...]
    launched: tuple[str, ...]
    instructions: int
    other_s: float
    run_s: float

    @property
    def passed(self) -> bool:
        return not self.findings


def _worst(
    out: Mapping[str, Tensor], known: Mapping[str, tuple[Tensor, Tensor, Any]]
) -> tuple[str, float, float]:
    """(result, error, bound) with the largest quotient."""
    worst = ("", 0.0, 0.0)
    share = -1.0
    for name, t in out.items():
        exact, eager, rounding = known[name]
        e = error_of(t, exact.reshape(t.shape), eager.to(t.dtype).reshape(t.shape), rounding)
        for what, error, bound in (
            (f"{name} max", e.max, e.max_bound), (f"{name} rms", e.rms, e.rms_bound),
        ):  # fmt: skip
            now = error / bound if bound else float(error > 0) * 2
            if now > share:
                share, worst = now, (what, error, bound)
    return worst


def _same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    """The name of a result that differs, or nothing."""
    for name, t in a.items():
        if not torch.equal(
            t.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)
        ):
            return name
    return ""


def execute(job: Job, orders: Sequence[Order] = ORDERS) -> list[Executed]:
    """Run one job in every order; a row for each kernel that it covers. What the machine finds is
    in the row, not raised."""
    serve_cpu()
    findings: list[str] = []
    worst: tuple[str, float, float] = ("", 0.0, 0.0)
    launched: set[str] = set()
    instructions, run_s = 0, 0.0
    start = time.perf_counter()
    try:
        prepared: Prepared = job.prepare()
        outs = []
        for order in orders:
            with emulate(job.arch, order) as machine, backend("triton"):
                try:
                    out = {n: t.clone() for n, t in prepared.run().items()}
                finally:
                    launched |= {run.kernel for run in machine.runs}
                    instructions += sum(run.instructions for run in machine.runs)
                    run_s += sum(run.seconds for run in machine.runs)
            outs.append(out)
            found = _worst(out, prepared.known)
            if found[1] > found[2]:
                findings.append(f"{order}: {found[0]} error {found[1]:.3e}, bound {found[2]:.3e}")
            worst = max(worst, found, key=lambda w: w[1] / w[2] if w[2] else 0.0)
        for order, out in zip(orders[1:], outs[1:], strict=True):
            if order in SAME and (name := _same_bits(outs[0], out)):
                findings.append(f"{order}: other bits of {name} than in the first order")
    except (Finding, Unknown) as found:
        findings.append(f"{type(found).__name__}: {found}")
    except Exception as error:  # a launcher that raises is a finding of this row alone
        findings.append(f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    row = Executed(
        job.name, tuple(map(str, orders)), "", job.arch.name, str(job.dtype).removeprefix("torch."),
        job.what, "", *worst, tuple(findings), tuple(sorted(launched)), instructions,
        max(seconds - run_s, 0.0), run_s,
    )  # fmt: skip
    return [dataclasses.replace(row, kernel=kernel, tile=tile) for kernel, tile in job.covers]
