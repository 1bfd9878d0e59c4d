"""Gated and plain linears and the blocks made of them. Shapes: x
(..., D), w_gate and w_up (H, D), w_down (D, H), biases (H,) and (D,). A packed weight holds gate
and up along its first dimension, (2H, D), in the order that `packed` names.
"""

from __future__ import annotations

from torch import Tensor

from ..packing import Packed, halves
from .activations import resolve
from .lora import Lora, adapted
from .rows import linear

__all__ = [
    "gated_act",
    "gated_linear",
    "gated_mlp",
    "linear_act",
    "mlp",
]


def gated_act(
    g: Tensor, u: Tensor | None, activation: str = "silu", packed: Packed | None = None
) -> Tensor:
    """act(g) * u, with a gate phi(g) * psi(u); with `packed`, g holds both halves along its last
    dimension and u is None."""
    if packed is not None:
        g, u = halves(g, packed)
    assert u is not None
    gate = resolve(activation)
    return gate.phi(g) * gate.psi(u)


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    activation: str = "silu",
    packed: Packed | None = None,
) -> Tensor:
    """act(x w_gate' + b_gate) * (x w_up' + b_up)."""
    g = linear(x, w_gate, b_gate)
    u = None if w_up is None else linear(x, w_up, b_up)
    return gated_act(g, u, activation, packed)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    packed: Packed | None = None,
    lora: Lora | None = None,
) -> Tensor:
    """gated_linear(x) w_down' + b_down; an adapter adds scale b (a x) to its projection."""
    if lora is None:
        h = gated_linear(x, w_gate, w_up, b_gate, b_up, activation, packed)
        return linear(h, w_down, b_down)
    g = linear(x, w_gate, b_gate)
    g, u = (g, linear(x, w_up, b_up)) if w_up is not None else halves(g, packed)  # type: ignore[arg-type]
    h = gated_act(adapted(g, x, lora.gate), adapted(u, x, lora.up), activation)
    return adapted(linear(h, w_down, b_down), h, lora.down)


def linear_act(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """act(x w' + b)."""
    return resolve(activation).phi(linear(x, w, b))


def mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "gelu",
    lora: Lora | None = None,
) -> Tensor:
    """linear_act(x) w_out' + b_out; an adapter adds scale b (a x) to its projection."""
    if lora is None:
        return linear(linear_act(x, w_in, b_in, activation), w_out, b_out)
    h = resolve(activation).phi(adapted(linear(x, w_in, b_in), x, lora.up))
    return adapted(linear(h, w_out, b_out), h, lora.down)
