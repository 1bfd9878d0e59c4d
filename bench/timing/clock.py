"""One sample on a GPU: CUDA events around rotated calls, in a CUDA graph where they are short."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]

WARMUP = 3
# A sample lasts this long at least: an event's resolution is half a microsecond.
SAMPLE_MS = 2.0
# Roughly half a millisecond: the host queues up a whole sample meanwhile, so that its gaps are not
# timed.
SPIN_CYCLES = 1_000_000


class Timer(Protocol):
    """What timing needs of a device. Tests put a fake in its place."""

    device: str
    l2_bytes: int

    def session(self) -> AbstractContextManager[None]:
        """Everything timed, its preparation included, runs inside."""

    def sampler(self, calls: Sequence[Call], graph: bool) -> Sampler:
        """A function that takes one sample: milliseconds of one call, averaged over `calls`."""

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds at once, beyond what is held already."""


class CaptureFailed(RuntimeError):
    """A CUDA graph could not be captured. torch leaves its allocator and its generator capturing
    then, so nothing more can be timed in this process."""


class CudaTimer:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = "cuda"
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes: int = properties.L2_cache_size
        self._stream = torch.cuda.Stream()

    @contextmanager
    def session(self) -> Iterator[None]:
        """One side stream for all: autograd runs a backward on its forward's stream, and a backward
        can be captured only on the stream that captures."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def sampler(self, calls: Sequence[Call], graph: bool) -> Sampler:
        for _ in range(WARMUP):
            for call in calls:
                call()
        torch.cuda.synchronize()
        if graph:
            _refuse_to_wait(calls[0])
        run = self._captured(calls) if graph else lambda: _all(calls)
        once = self._milliseconds(run, 1)
        repeats = max(1, math.ceil(SAMPLE_MS / once))
        return lambda: self._milliseconds(run, repeats) / (repeats * len(calls))

    def _captured(self, calls: Sequence[Call]) -> Call:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=self._stream):
                _all(calls)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:160]
            raise CaptureFailed(f"a CUDA graph could not be captured: {first}") from error
        captured.replay()
        torch.cuda.synchronize()
        return captured.replay

    def _milliseconds(self, run: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak_bytes(self, call: Call) -> int:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before


def _refuse_to_wait(call: Call) -> None:
    """Raise, as torch words it, where a call waits for the GPU: no such call can be captured, and
    to try would leave torch capturing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


def note_clock(seen: list[int]) -> None:
    """Add the SM clock of this moment, in MHz, where it can be read in a millisecond."""
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # without NVML's Python package there is none
            seen.append(int(torch.cuda.clock_rate()))


def clock_range(seen: Sequence[int]) -> dict[str, float] | None:
    """SM clocks that were seen under load."""
    if not seen:
        return None
    return {
        "samples": len(seen), "min_mhz": min(seen), "median_mhz": statistics.median(seen),
        "max_mhz": max(seen),
    }  # fmt: skip


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
