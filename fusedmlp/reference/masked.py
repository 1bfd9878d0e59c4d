"""Masked gated linears (MGLU). Shapes: x (..., D), w (H, D), masks (n_m, H, D), w_down (D, H),
b_down (D,). Masks are float logits, whose sign counts, or the bool masks themselves; packed, they
are bit planes (H, ceil(D / 8), n_m) whose byte (h, j, i) holds mask i of the weights
(h, 8 j .. 8 j + 7), lowest bit first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import resolve
from .lora import Lora, adapted
from .rows import linear

__all__ = [
    "masked_gated_linear",
    "masked_gated_mlp",
    "pack_masks",
    "unpack_masks",
]


def hard_masks(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where a logit is > 0, else 0; the gradient goes straight through to the logits."""
    if not masks.is_floating_point():
        return masks.to(dtype)
    # The difference is 0; a cast of the logit itself could overflow.
    return (masks > 0).to(dtype) + (masks - masks.detach()).to(dtype)


def products(x: Tensor, w: Tensor, masks: Tensor) -> list[Tensor]:
    """x w', then x (m_i * w)' of each mask."""
    return [linear(x, w), *(linear(x, m * w) for m in hard_masks(masks, w.dtype))]


def masked_gated_linear(x: Tensor, w: Tensor, masks: Tensor, activation: str = "silu") -> Tensor:
    """sum_i act(x (m_i * w)') * (x ((1 - m_i) * w)'), m_i = 1 where masks[i] > 0.

    The second factor is x w' less the first product: n_m + 1 products instead of 2 n_m.
    """
    gate = resolve(activation)
    total, *gates = products(x, w, masks)
    h = torch.zeros_like(total)
    for g in gates:
        h = h + gate.phi(g) * gate.psi(total - g)
    return h


def masked_gated_mlp(
    x: Tensor,
    w: Tensor,
    masks: Tensor,
    w_down: Tensor,
    b_down: Tensor | None = None,
    activation: str = "silu",
    lora: Lora | None = None,
) -> Tensor:
    """masked_gated_linear(x) w_down' + b_down. Adapters of gate and up add to every mask's first
    and second factor."""
    if lora is None:
        return linear(masked_gated_linear(x, w, masks, activation), w_down, b_down)
    gate = resolve(activation)
    total, *gates = products(x, w, masks)
    h = zero = torch.zeros_like(total)
    d_gate, d_up = (adapted(zero, x, adapter) for adapter in lora[:2])
    for g in gates:
        h = h + gate.phi(g + d_gate) * gate.psi(total - g + d_up)
    return adapted(linear(h, w_down, b_down), h, lora.down)


def pack_masks(masks: Tensor) -> Tensor:
    """Bit planes (H, ceil(D / 8), n_m) of logits or bool masks (n_m, H, D)."""
    bits = F.pad((masks > 0).to(torch.uint8), (0, -masks.shape[2] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=masks.device)
    octets = (bits.unflatten(2, (-1, 8)) * weights).sum(3, dtype=torch.uint8)
    return octets.permute(1, 2, 0).contiguous()


def unpack_masks(planes: Tensor, D: int) -> Tensor:
    """Bool masks (n_m, H, D) of bit planes."""
    bits = planes.permute(2, 0, 1).unsqueeze(3) >> torch.arange(
        8, dtype=torch.uint8, device=planes.device
    )
    return (bits & 1).bool().flatten(2)[..., :D]
