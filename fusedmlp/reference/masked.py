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


def masked_gated_linear(x: Tensor, w: Tensor, masks: Tensor, activation: str = "silu") -> Tensor:
    """sum_i act(x (m_i * w)') * (x ((1 - m_i) * w)'), m_i = 1 where masks[i] > 0.

    The second factor is x w' less the first product: n_m + 1 products instead of 2 n_m.
    """
    gate = resolve(activation)
    total = linear(x, w)
    h = torch.zeros_like(total)
    for m in hard_masks(masks, w.dtype):
        g = linear(x, m * w)
        h = h + gate.phi(g) * gate.psi(total - g)
    return h


def masked_gated_mlp(
    x: Tensor,
    w: Tensor,
    masks: Tensor,
    w_down: Tensor,
    b_down: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """masked_gated_linear(x) w_down' + b_down."""
    return linear(masked_gated_linear(x, w, masks, activation), w_down, b_down)


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
