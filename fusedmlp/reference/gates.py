"""The factors of gates that are more than act(g) times u, in PyTorch: phi of the gate
pre-activation, psi of the up projection. Bounds are `clamp`'s, as the models have them: a value at
a bound has the slope of the inside, and a NaN stays one.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["clip", "oai_gate", "oai_up"]


def clip(u: Tensor, limit: float) -> Tensor:
    """u between -limit and limit."""
    return u.clamp(-limit, limit)


def oai_gate(g: Tensor, limit: float, alpha: float) -> Tensor:
    """min(g, limit) sigmoid(alpha min(g, limit))."""
    g = g.clamp(max=limit)
    return g * (alpha * g).sigmoid()


def oai_up(u: Tensor, limit: float, alpha: float) -> Tensor:
    """clip(u, limit) + 1."""
    return clip(u, limit) + 1
