"""Routings of one token, whose rows need no sorting. What they hold is what the formulas give."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...reference import Routing, top1_route


@functools.lru_cache(maxsize=64)
def _steps(E: int) -> tuple[Tensor, Tensor]:
    """Windows of the first are the counts, of the second the offsets, of one choice."""
    counts = torch.zeros(2 * E, dtype=torch.int32, device="cpu")
    counts[E] = 1
    return counts, (torch.arange(2 * E + 3, device="cpu") >= E + 1).to(torch.int32)


def _one(chosen: int, expert: Tensor, prob: Tensor, E: int, *rest: Tensor) -> Routing:
    from_end = E - chosen if 0 <= chosen < E else 0
    counts, offsets = _steps(E)
    counts = counts[from_end : from_end + E].clone()
    offsets = offsets[from_end : from_end + E + 2].clone()
    only = torch.zeros(1, dtype=torch.int32, device="cpu")
    return Routing(expert, prob, only, only, offsets, counts, *rest)


def route_one(expert: Tensor, prob: Tensor, num_experts: int) -> Routing:
    """`route_to` of one choice."""
    return _one(int(expert), expert, prob, num_experts)


def top1_route_one(logits: Tensor) -> Routing:
    """`top1_route` of one token, (1, E)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    expert = z.argmax(-1)
    e = int(expert)
    p = z.softmax(-1)[0]
    prob = p[e : e + 1]
    if not prob.item() > 0:  # NaN
        return top1_route(logits)
    lse = z[0, e : e + 1] - prob.log()
    if z is not logits:
        prob = prob.to(logits.dtype)
    return _one(e, expert, prob, logits.shape[1], p, lse)
