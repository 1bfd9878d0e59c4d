"""Blocks of packed weights with adapters: a projection w x becomes w x + s b (a x), beside bits that
stay as they are.

| block | forward |
|---|---|
| one-bit | g = x Wg' + bg + d_gate, u likewise, h = act(g) * u, y = h Wd' + bd + d_down |
| masked | g_i = x (m_i * w)' + d_gate, u_i = x w' - x (m_i * w)' + d_up, h = sum_i act(g_i) * u_i, y likewise |

d = s (x a') b'. Partly fused: each projection is one call, then PyTorch adds its adapter by one
addmm, then gated_act. Saved for backward: x, g and u (of each mask), h where down has an adapter or
its weight trains, and x a' (M, r). Backward: those calls' own, so that frozen weights and frozen
bits get no gradient. Source: Hu et al., arXiv 2106.09685.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends.derivatives import differentiable, save
from ..invariance import invariant
from ..packing import rows
from ..reference.lora import Adapter, Lora
from ..reference.masked import products
from ..weights.binary import BinaryWeight
from . import masked_gated_linear
from .binary_linear import binary_linear
from .gated_act import gated_act


def _plus(y: Tensor, x: Tensor, adapter: Adapter | None) -> Tensor:
    """y + scale (x a') b'."""
    if adapter is None:
        return y
    return torch.addmm(y, x @ adapter.a.t(), adapter.b.t(), alpha=adapter.scale)


def check_mode(op: str) -> None:
    if invariant():
        raise RuntimeError(
            f"{op}: lora must be None inside batch_invariant(), whose products a x are PyTorch's, "
            "got adapters; call it outside, or use backend('reference')"
        )


def binary(
    x: Tensor,
    weights: tuple[BinaryWeight, BinaryWeight, BinaryWeight],
    biases: tuple[Tensor | None, ...],
    activation: str,
    lora: Lora,
) -> Tensor:
    """The one-bit block of gate, up and down; (M, D_out)."""
    x = rows(x)
    g, u = (
        _plus(binary_linear(x, w, b), x, adapter)
        for w, b, adapter in zip(weights[:2], biases[:2], lora[:2], strict=True)
    )
    h = gated_act(g, u, activation=activation)
    return _plus(binary_linear(h, weights[2], biases[2]), h, lora.down)


def _products(x: Tensor, w: Tensor, masks: Tensor) -> Tensor:
    return torch.stack(products(x, w, masked_gated_linear.masks_of(masks, w)))


class MaskedProductsFunction(Function):
    """x w', x (m_1 * w)', ... as (1 + n_m, M, H). Their gradients take the places of V and e_i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, masks: Tensor) -> Tensor:
        planes = masked_gated_linear.planes_of(masks)
        _, gt = masked_gated_linear.fwd(x, w, planes, "silu", False, True)
        save(ctx, (x, w, masks), (), planes)
        return gt

    @staticmethod
    @differentiable(_products)
    def backward(ctx: Any, dgt: Tensor) -> tuple[Tensor | None, ...]:
        x, w, masks, planes = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return masked_gated_linear.projection_grads(dgt, x, w, planes, masks.dtype, needed)


def masked(
    x: Tensor,
    w: Tensor,
    masks: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    lora: Lora,
) -> Tensor:
    """The masked block of one weight, masks as logits or planes; (M, D_out)."""
    x = rows(x)
    total, *gates = MaskedProductsFunction.apply(x, w, masks).unbind()
    d_gate, d_up = (_plus(x.new_zeros(1), x, adapter) for adapter in lora[:2])
    each = (gated_act(g + d_gate, total - g + d_up, activation=activation) for g in gates)
    h = sum(each, start=next(each))
    return _plus(F.linear(h, w_down, b_down), h, lora.down)
