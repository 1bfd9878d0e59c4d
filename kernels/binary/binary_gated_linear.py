"""h = act(x w_gate') * (x w_up') over one-bit weights: the kernels of binary_linear.py with an up
branch."""

from __future__ import annotations

from torch import Tensor

from ...packing import empty_gated, split_pair
from .binary_linear import launch_fwd


def binary_gated_linear_fwd(
    x: Tensor,
    q_gate: Tensor,
    s_gate: Tensor,
    q_up: Tensor,
    s_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
) -> tuple[Tensor, Tensor]:
    h, gu = empty_gated(x, x.shape[0], q_gate.shape[0], want_h, want_gu)
    outputs = h if want_h else None, *(split_pair(gu, None) if want_gu else (None, None))
    weights = (q_gate, s_gate, q_up, s_up)
    launch_fwd("binary_gated_linear_fwd", x, weights, (b_gate, b_up), outputs, activation)
    return h, gu
