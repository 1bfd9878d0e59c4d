"""Order statistics of samples, and the order in which samples are taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Median and the 20% and 80% quantiles, in the samples' unit."""

    median: float
    q20: float
    q80: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, linear between the two nearest samples."""
    if not samples:
        raise ValueError("quantile of no samples")
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarize(samples: Sequence[float]) -> Summary:
    return Summary(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8))


def interleave(
    samplers: Mapping[Key, Callable[[], float]],
    rounds: int,
    after_round: Callable[[], None] = lambda: None,
) -> dict[Key, list[float]]:
    """`rounds` samples of each sampler, one of each per round, so that a drifting clock meets all
    alike.

    Each round starts one further on: nobody always runs behind the same neighbour.
    """
    samples: dict[Key, list[float]] = {key: [] for key in samplers}
    order = list(samplers)
    for _ in range(rounds):
        for key in order:
            samples[key].append(samplers[key]())
        order = order[1:] + order[:1]
        after_round()
    return samples
