"""The factors of gates that are more than act(g) times u, in PyTorch: phi of the gate
pre-activation, psi of the up projection. Bounds are `clamp`'s, as the models have them: a value at
a bound has the slope of the inside, and a NaN stays one. Each takes all parameters of its row.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "clamped_gate",
    "clip",
    "oai_gate",
    "oai_up",
    "scaled_gate",
    "scaled_up",
    "softcap_gate",
    "softcap_up",
    "step_gate",
]


def clip(u: Tensor, limit: float) -> Tensor:
    """u between -limit and limit."""
    return u.clamp(-limit, limit)


def oai_gate(g: Tensor, limit: float, alpha: float) -> Tensor:
    """m sigmoid(alpha m) with m = min(g, limit)."""
    g = g.clamp(max=limit)
    return g * (alpha * g).sigmoid()


def oai_up(u: Tensor, limit: float, alpha: float) -> Tensor:
    """clip(u, limit) + 1."""
    return clip(u, limit) + 1


def clamped_gate(g: Tensor, limit: float) -> Tensor:
    """silu(min(g, limit))."""
    return F.silu(g.clamp(max=limit))


def step_gate(g: Tensor, limit: float) -> Tensor:
    """min(silu(g), limit)."""
    return F.silu(g).clamp(max=limit)


def _softcap(x: Tensor, cap: float) -> Tensor:
    return cap * (x / cap).tanh()


def softcap_gate(g: Tensor, gate_cap: float, up_cap: float) -> Tensor:
    """gate_cap tanh(g / gate_cap) sigmoid(g): the sigmoid sees g itself."""
    return _softcap(g, gate_cap) * g.sigmoid()


def softcap_up(u: Tensor, gate_cap: float, up_cap: float) -> Tensor:
    """up_cap tanh(u / up_cap)."""
    return _softcap(u, up_cap)


def scaled_gate(g: Tensor, gate_scale: float, up_scale: float) -> Tensor:
    """silu(gate_scale g)."""
    return F.silu(gate_scale * g)


def scaled_up(u: Tensor, gate_scale: float, up_scale: float) -> Tensor:
    """up_scale u."""
    return up_scale * u
