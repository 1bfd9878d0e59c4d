"""The record of one provider in one phase: what was measured, or why nothing was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..options import Record
from ..work import Work
from .stats import Summary, summarize


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What this GPU reaches in this run. cublas: TFLOP/s on the work's own first GEMM."""

    cublas: float | None
    copy: float | None


def failure(error: Exception) -> str:
    """A record's reason: the kind of failure and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"failed: {type(error).__name__}: {first}"


def record_of(
    work: Work,
    provider: str,
    phase: str,
    samples: Sequence[float] | None,
    memory: int | None,
    peaks: Peaks,
    skipped: str | None,
) -> Record:
    """A time record; without samples its measured fields are null and `skipped` says why."""
    if (samples is None) == (skipped is None):
        raise ValueError("a time record has either samples or a reason for having none")
    flops, moved = work.flops(phase), work.bytes(phase)
    record: dict[str, Any] = {
        "kind": "time", **work.identity(), "provider": provider, "phase": phase,
        "model": work.model, "flops": flops, "bytes": moved, "skipped": skipped,
    }  # fmt: skip
    summary: Summary | None = None if samples is None else summarize(samples)
    tflops = None if summary is None else flops / summary.median / 1e9
    gbps = None if summary is None else moved / summary.median / 1e6
    return {
        **record,
        "median_ms": None if summary is None else summary.median,
        "q20_ms": None if summary is None else summary.q20,
        "q80_ms": None if summary is None else summary.q80,
        "tflops": tflops,
        "gbps": gbps,
        "of_cublas": None if tflops is None or peaks.cublas is None else tflops / peaks.cublas,
        "of_copy": None if gbps is None or peaks.copy is None else gbps / peaks.copy,
        "peak_memory_bytes": memory,
    }
