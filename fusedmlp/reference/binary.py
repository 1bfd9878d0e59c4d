"""One-bit weights (Q1_0): signs in words of 32, one scale for each 128 neighbours of a row.
Shapes: x (..., D), qweight int32 (H, 4 G), scales (H, G) with G = ceil(D / 128), biases (H,).
Bit k % 32 of word (h, k // 32) is the sign of weight (h, k), 1 for +; bits past D are not read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import gated_act
from .lora import Lora, adapted
from .rows import linear

__all__ = [
    "binary_gated_linear",
    "binary_gated_mlp",
    "binary_linear",
    "dequantize_binary",
    "unpack_signs",
]

GROUP, WORD = 128, 32  # weights that share a scale; weights of one word


def binary_scales(w: Tensor) -> Tensor:
    """mean |w| of each group of a row, (H, G), in float32 (float64 of float64); of a last group
    that is cut short, of what there is."""
    D, wide = w.shape[1], torch.promote_types(w.dtype, torch.float32)
    sums = F.pad(w.abs(), (0, -D % GROUP)).unflatten(1, (-1, GROUP)).sum(2, dtype=wide)
    counts = (D - GROUP * torch.arange(sums.shape[1], device=w.device)).clamp(max=GROUP)
    return sums / counts


def pack_signs(w: Tensor) -> Tensor:
    """qweight of the signs of w (H, D), 1 where w >= 0, which both zeros are; 1 past D."""
    bits = (F.pad(w, (0, -w.shape[1] % GROUP)) >= 0).unflatten(1, (-1, WORD))
    weights = 1 << torch.arange(WORD, device=w.device)
    # The highest bit makes a word negative: 2^31 wraps around.
    return (bits * weights).sum(2).to(torch.int32)


def unpack_signs(qweight: Tensor, D: int) -> Tensor:
    """Bool (H, D), True for +."""
    bits = qweight.unsqueeze(2) >> torch.arange(WORD, dtype=torch.int32, device=qweight.device)
    return (bits & 1).bool().flatten(1)[:, :D]


def dequantize_binary(qweight: Tensor, scales: Tensor, D: int) -> Tensor:
    """+-scale, (H, D), in the dtype of the scales."""
    each = scales.repeat_interleave(GROUP, 1)[:, :D]
    return torch.where(unpack_signs(qweight, D), each, -each)


def binary_linear(x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None = None) -> Tensor:
    """x w' + b, w the dequantised weight. bfloat16 cannot hold float16 scales: that product is
    taken in float32, which holds both, and rounded once."""
    wide = torch.promote_types(x.dtype, scales.dtype)
    w = dequantize_binary(qweight, scales, x.shape[-1]).to(wide)
    if wide == x.dtype:
        return linear(x, w, b)
    with torch.autocast(x.device.type, enabled=False):  # which would round w to its own dtype
        return linear(x.to(wide), w, None if b is None else b.to(wide)).to(x.dtype)


def binary_gated_linear(
    x: Tensor,
    q_gate: Tensor,
    s_gate: Tensor,
    q_up: Tensor,
    s_up: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    activation: str = "silu",
    *,
    project: Callable[..., Tensor] = binary_linear,
) -> Tensor:
    """act(x w_gate' + b_gate) * (x w_up' + b_up), products by `project`."""
    g = project(x, q_gate, s_gate, b_gate)
    return gated_act(g, project(x, q_up, s_up, b_up), activation)


def binary_gated_mlp(
    x: Tensor,
    q_gate: Tensor,
    s_gate: Tensor,
    q_up: Tensor,
    s_up: Tensor,
    q_down: Tensor,
    s_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    lora: Lora | None = None,
    *,
    project: Callable[..., Tensor] = binary_linear,
) -> Tensor:
    """binary_gated_linear(x) w_down' + b_down; an adapter adds scale b (a x) to its projection."""
    of_gate, of_up, of_down = lora or Lora()
    g = adapted(project(x, q_gate, s_gate, b_gate), x, of_gate)
    h = gated_act(g, adapted(project(x, q_up, s_up, b_up), x, of_up), activation)
    return adapted(project(h, q_down, s_down, b_down), h, of_down)
