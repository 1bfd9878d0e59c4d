"""Routings of few choices, whose rows the host sorts: a list costs less than a dozen calls. What
they hold is what the formulas give."""

from __future__ import annotations

import functools
import math
from array import array

import torch
from torch import Tensor

from ...reference import Routing, top1_route

FEW = 32  # choices; the formula catches up at 64


def _places(chosen: list[int], E: int, capacity: int | None) -> bytes:
    """tokens, rows, offsets and counts, one behind the other."""
    counts, bucket = array("i", bytes(4 * E)), []
    for e in chosen:
        taken = 0 <= e < E
        if taken:
            counts[e] += 1
            taken = capacity is None or counts[e] <= capacity
        bucket.append(e if taken else E)
    R = len(chosen)
    order = array("i", sorted(range(R), key=bucket.__getitem__))
    rows, offsets = array("i", order), array("i")
    for row, choice in enumerate(order):
        rows[choice] = row
        offsets += array("i", (row,)) * (bucket[choice] + 1 - len(offsets))
    offsets += array("i", (R,)) * (E + 2 - len(offsets))
    return (order + rows + offsets + counts).tobytes()


@functools.lru_cache(maxsize=1024)
def _place_of_one(e: int, E: int) -> bytes:
    return _places([e], E, None)


def _tensors(places: bytes, R: int, E: int) -> tuple[Tensor, ...]:
    whole = torch.frombuffer(bytearray(places), dtype=torch.int32)
    # Integers have no gradient for which they would have to be known as views.
    return whole.unsafe_split_with_sizes((R, R, E + 2, E))


def route_few(expert: Tensor, prob: Tensor, num_experts: int, capacity: int | None) -> Routing:
    """`route_to` of few choices."""
    chosen = expert.reshape(-1).tolist()
    places = _places(chosen, num_experts, capacity)
    tokens, rows, offsets, counts = _tensors(places, len(chosen), num_experts)
    return Routing(expert, prob, tokens, rows, offsets, counts)


def top1_route_one(logits: Tensor) -> Routing:
    """`top1_route` of one token, (1, E)."""
    dtype = logits.dtype
    z = logits.squeeze(0)
    if dtype is not torch.float32 and dtype is not torch.float64:
        z = z.float()
    values = z.tolist()
    largest = max(values)
    e = values.index(largest)
    p = z.softmax(-1)
    prob = p[e : e + 1]
    share = prob.item()
    if not share > 0:  # NaN
        return top1_route(logits)
    if p.requires_grad:
        lse = z[e : e + 1] - prob.log()
    else:
        # Memory of the host's own, here and below: half of what a tensor's new_full costs.
        code = "f" if z.dtype is torch.float32 else "d"
        lse = torch.frombuffer(array(code, (largest - math.log(share),)), dtype=z.dtype)
    if z.dtype is not dtype:
        prob = prob.to(dtype)
    expert = torch.frombuffer(array("q", (e,)), dtype=torch.int64)
    E = len(values)
    tokens, rows, offsets, counts = _tensors(_place_of_one(e, E), 1, E)
    return Routing(expert, prob, tokens, rows, offsets, counts, p, lse)
