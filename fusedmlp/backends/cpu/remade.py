"""Blocks that keep what an activation reads, not what it makes, on the CPU: the memory plans of the
kernels in PyTorch's operations.

| | kept beside x and the weights, in units of M H | plain autograd |
|---|---|---|
| gated_mlp, mlp | g and u: 2; z: 1; beside them the a x of adapters, (M, r) | 4; 2 |
| masked_gated_mlp, masked_gated_linear | t and g_i: 1 + n_m | 1 + 4 n_m, and n_m weights |

Backward makes the activation's result again beside its slopes; no product is made twice. Compiled
code keeps what the compiler chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ...packing import Packed, join_pair, rows
from ...reference.activations import Resolved, resolve
from ...reference.dense import gated_act
from ...reference.lora import Adapter, Lora, adapted
from ...reference.masked import hard_masks, unpack_masks
from .. import choice
from ..derivatives import differentiable, save
from .eager import needs_grad, readable

Act = Callable[..., Tensor]
_ROWS = 16


def keeps_less(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a block of these, which runs its reference, is one of this file. For few rows it is
    not: there gradients of weights are what takes memory."""
    if not (choice.for_cpu(x) and readable(x)):  # asked first: a trace must not be told of sizes
        return False
    return x.numel() >= _ROWS * x.shape[-1] and needs_grad(x, *tensors)


def _act_down(
    w: Tensor | None, b: Tensor | None, low: Tensor | None, high: Tensor | None, *rest: Any
) -> Tensor:
    *pre, act, scale = rest
    h = act(*pre)
    if w is None:
        return h
    adapter = None if low is None or high is None else Adapter(low, high, scale)
    return adapted(F.linear(h, w, b), h, adapter)


class ActDownFunction(Function):
    """act(*pre) w' + b, with an adapter's scale act(*pre) low' high', or act(*pre) where w is None;
    keeps `pre`. Arguments: w, b, low, high, pre, act, scale."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor | None,
        b: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        *pre, act, scale = rest
        h = y = act(*pre)
        t = None
        if w is not None:
            y = F.linear(h, w, b)
        if low is not None and high is not None:
            t = F.linear(h, low)
            y = y + scale * F.linear(t, high)
        save(ctx, (w, b, low, high, *pre), (act, scale), t)
        return y

    @staticmethod
    @differentiable(_act_down)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w, _, low, high, *pre, t = ctx.saved_tensors
        act, scale = ctx.options
        need_w, need_b, need_low, need_high, *need_pre = ctx.needs_input_grad[:-2]
        with torch.enable_grad():
            pre = [t.detach().requires_grad_(n) for t, n in zip(pre, need_pre, strict=True)]
            h = act(*pre)
        c = None if low is None else scale * (dy @ high)
        grads: list[Tensor | None] = [None] * len(pre)
        if any(need_pre):
            dh = dy if w is None else dy @ w
            dh = dh if c is None else dh + c @ low
            wanted = [t for t in pre if t.requires_grad]
            found = iter(torch.autograd.grad(h, wanted, dh))
            grads = [next(found) if n else None for n in need_pre]
        dw = dy.t() @ h if need_w else None
        d_low = c.t() @ h if c is not None and need_low else None
        d_high = scale * (dy.t() @ t) if need_high else None
        return dw, dy.sum(0) if need_b else None, d_low, d_high, *grads, None, None


def _products(x: Tensor, w: Tensor, masks: Tensor) -> Tensor:
    if not masks.is_floating_point():
        masks = unpack_masks(masks, w.shape[1])
    return torch.stack([F.linear(x, w), *(F.linear(x, m * w) for m in hard_masks(masks, w.dtype))])


class MaskedProductsFunction(Function):
    """x w', x (m_1 * w)', ... as (1 + n_m, M, H) of logits or bit planes; keeps its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, masks: Tensor) -> Tensor:
        save(ctx, (x, w, masks), ())
        hard = _hard(masks, w)
        out = x.new_empty(1 + len(hard), x.shape[0], w.shape[0])
        torch.mm(x, w.t(), out=out[0])
        for one, m in zip(out[1:], hard, strict=True):
            torch.mm(x, (m * w).t(), out=one)
        return out

    @staticmethod
    @differentiable(_products)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, w, masks = ctx.saved_tensors
        need_x, need_w, need_masks = ctx.needs_input_grad
        dx = d[0] @ w if need_x else None
        dw = d[0].t() @ x if need_w else None
        dmasks = torch.empty_like(masks) if need_masks else None
        for i, m in enumerate(_hard(masks, w)):
            if dx is not None:
                dx.addmm_(d[1 + i], m * w)
            if not (need_w or need_masks):
                continue
            own = d[1 + i].t() @ x
            if dmasks is not None:
                dmasks[i] = own * w
            if dw is not None:
                dw.addcmul_(m, own)
        return dx, dw, dmasks


def _hard(masks: Tensor, w: Tensor) -> Tensor:
    """0 and 1, or NaN as the formula has it."""
    if masks.is_floating_point():
        return hard_masks(masks, w.dtype)
    return hard_masks(unpack_masks(masks, w.shape[1]), w.dtype)


def masked_act(products: Tensor, gate: Resolved) -> Tensor:
    total, *gates = products
    each = (gate.phi(g) * gate.psi(total - g) for g in gates)
    return sum(each, start=torch.zeros_like(total))


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    packed: Packed | None,
    lora: Lora | None = None,
) -> Tensor:
    """`reference.gated_mlp`."""
    flat, (gate, up, down) = rows(x), lora or Lora()
    if w_up is not None:
        pre = [adapted(F.linear(flat, w_gate, b_gate), flat, gate)]
        pre.append(adapted(F.linear(flat, w_up, b_up), flat, up))
    else:
        pre = [F.linear(flat, w_gate, b_gate)]
        if packed and (gate or up):
            # One tensor, as its halves are kept: half of it alone would keep it whole.
            zero = flat.new_zeros(flat.shape[0], w_gate.shape[0] // 2)
            pair = [adapted(zero, flat, own) for own in (gate, up)]
            pre = [pre[0] + join_pair(torch.stack(pair), packed)]
    act = lambda g, u=None: gated_act(g, u, activation, packed)  # noqa: E731
    return _block(x, act, w_down, b_down, pre, down)


def mlp(
    x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None,
    activation: str, lora: Lora | None = None,
) -> Tensor:  # fmt: skip
    """`reference.mlp`."""
    flat, (_, up, down) = rows(x), lora or Lora()
    row, scalars = resolve(activation)
    act = lambda z: row.reference(z, *scalars)  # noqa: E731
    return _block(x, act, w_out, b_out, [adapted(F.linear(flat, w_in, b_in), flat, up)], down)


def masked_gated_mlp(
    x: Tensor, w: Tensor, masks: Tensor, w_down: Tensor | None, b_down: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """`reference.masked_gated_mlp` of logits or planes; `masked_gated_linear` without w_down."""
    gate = resolve(activation)
    products = MaskedProductsFunction.apply(rows(x), w, masks)
    return _block(x, lambda t: masked_act(t, gate), w_down, b_down, [products])


def _block(
    x: Tensor,
    act: Act,
    w: Tensor | None,
    b: Tensor | None,
    pre: Sequence[Tensor],
    down: Adapter | None = None,
) -> Tensor:
    low, high, scale = down or (None, None, 1.0)
    y = ActDownFunction.apply(w, b, low, high, *pre, act, scale)
    return y.view(*x.shape[:-1], y.shape[1])
