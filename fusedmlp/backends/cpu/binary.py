"""One-bit weights on the CPU: `reference.binary_linear` by bytes of signs.

| rows of x | how |
|---|---|
| 1 to 16, no gradient | for each 8 neighbours of x the 256 sums that 8 signs can make; a weight's byte picks one, and its group's scale multiplies the sum of 16 |
| more, or a gradient of x | the weight is written out, 8 values a byte, for one dense product |

Sums are taken in float32, in float64 of float64. Scales that want a gradient go by the formula.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packing import rows
from ...reference import binary as reference
from ...reference.binary import GROUP
from .. import choice
from .eager import needs_grad, readable

_FEW = 16  # rows of x
_BYTES = GROUP // 8  # of a group's signs


@functools.lru_cache(maxsize=4)
def _signs(dtype: torch.dtype) -> Tensor:
    """(256, 8): +1 and -1 of each byte's bits, the lowest first."""
    byte, place = (torch.arange(n, device="cpu") for n in (256, 8))
    bits = (byte.unsqueeze(1) >> place) & 1
    return (2 * bits - 1).to(dtype)


def _bytes(qweight: Tensor) -> Tensor:
    """(H, D / 8) int32."""
    return qweight.view(torch.uint8).to(torch.int32)


def _dequantize(qweight: Tensor, scales: Tensor, D: int) -> Tensor:
    """`reference.dequantize_binary`, in float32 at least."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    w = F.embedding(_bytes(qweight), _signs(wide)).view(*scales.shape, GROUP)
    return w.mul_(scales.to(wide).unsqueeze(2)).flatten(1)[:, :D]


def _few_rows(x: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    (M, D), (H, G) = x.shape, scales.shape
    wide = torch.promote_types(torch.promote_types(x.dtype, scales.dtype), torch.float32)
    octets = F.pad(x.to(wide), (0, G * GROUP - D)).view(M, -1, 8)
    # Byte e of place j has the number 256 j + e.
    sums = (octets @ _signs(wide).t()).view(M, -1)
    places = torch.arange(G * _BYTES, dtype=torch.int32, device="cpu")
    picked = (_bytes(qweight) + 256 * places).view(-1)
    if M == 1:
        each = sums.view(-1).index_select(0, picked).view(H, G, _BYTES).sum(2)
        return (each * scales.to(wide)).sum(1).unsqueeze(0).to(x.dtype)
    factors = scales.to(wide).repeat_interleave(_BYTES, 1).view(-1)
    first = torch.arange(0, H * G * _BYTES, G * _BYTES, dtype=torch.int32, device="cpu")
    y = F.embedding_bag(
        picked, sums.t().contiguous(), first, mode="sum", per_sample_weights=factors
    )
    return y.t().to(x.dtype)


def binary_linear(x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None = None) -> Tensor:
    """`reference.binary_linear`."""
    if not (choice.for_cpu(x) and readable(x)) or scales.requires_grad or not x.numel():
        return reference.binary_linear(x, qweight, scales, b)
    with torch.autocast("cpu", enabled=False):  # which would round w to its own dtype
        return _linear(rows(x), qweight, scales, b).view(*x.shape[:-1], -1)


def _linear(x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None) -> Tensor:
    if x.shape[0] <= _FEW and not needs_grad(x, b):
        y = _few_rows(x, qweight, scales)
        return y if b is None else y + b
    wide = torch.promote_types(x.dtype, scales.dtype)
    w = _dequantize(qweight, scales, x.shape[1]).to(wide)
    return F.linear(x.to(wide), w, None if b is None else b.to(wide)).to(x.dtype)


def binary_gated_linear(*arguments: Any) -> Tensor:
    """`reference.binary_gated_linear`."""
    return reference.binary_gated_linear(*arguments, project=binary_linear)


def binary_gated_mlp(*arguments: Any) -> Tensor:
    """`reference.binary_gated_mlp`."""
    return reference.binary_gated_mlp(*arguments, project=binary_linear)
