"""Experts on the CPU where the host may read the routing: their rows alone, in expert order.

A block is one node of autograd's graph, which keeps x, g and u, so that a training step costs
little beside its products; what needs more derivatives goes by the operations of traced.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...packing import Packed, halves
from ...reference import Routing
from ...reference.activations import resolve
from ...reference.lora import Lora
from ..derivatives import differentiable, save
from . import traced
from .eager import needs_grad, readable
from .grouped import busy, outer_of, product_of, weight_grad

Weights = Sequence[Tensor | None]  # of moe_mlp, in its order


class Kept:
    """The rows that experts take."""

    def __init__(self, routing: Routing) -> None:
        ends: list[int] = routing.offsets.tolist()
        self.routing = routing
        self.offsets, self.rows, self.k = routing.offsets, routing.rows, routing.k
        self.parts, self.count, self.all = busy(ends), ends[-2], ends[-1]
        self.choices = routing.tokens[: self.count]

    @functools.cached_property
    def expert(self) -> Tensor:
        """Each row's expert."""
        return self.routing.expert.reshape(-1).index_select(0, self.choices)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Each row's token."""
        return self.choices if self.k == 1 else self.choices // self.k

    def gather(self, t: Tensor) -> Tensor:
        """Each row's token of t (T, N)."""
        if len(t) == 1:
            return t.expand(self.count, -1)
        return t.index_select(0, self.tokens)

    def each(self, t: Tensor) -> Tensor:
        """Each row's value of t, shaped as routing.prob: (count, 1)."""
        t = t.reshape(-1, 1)
        return t if self.all == self.count == 1 else t.index_select(0, self.choices)

    def back(self, t: Tensor) -> Tensor:
        """(T k, N): rows in the order of choices, 0 for those that no expert takes."""
        if self.count == self.all:
            return t if self.all == 1 else t.index_select(0, self.rows)
        padded = torch.cat((t, t.new_zeros(1, t.shape[1])))
        return padded.index_select(0, self.rows.clamp(max=self.count))

    def sum(self, t: Tensor) -> Tensor:
        """(T, N): the sum of each token's rows."""
        if self.all == self.k:  # one token
            return t if self.count == 1 else t.sum(0, keepdim=True)
        t = self.back(t)
        if self.k == 1:
            return t
        own = t.view(-1, self.k, t.shape[1])
        return torch.add(*own.unbind(1)) if self.k == 2 else own.sum(1)  # of two, half the time

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        return product_of(a, w, self.offsets, self.parts)

    def biased(self, y: Tensor, b: Tensor | None) -> Tensor:
        return y if b is None else y + b.index_select(0, self.expert)

    def wgrad(self, dy: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return weight_grad(dy, a, w, lambda dy, a: outer_of(dy, a, self.offsets, self.parts))

    def bgrad(self, dy: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(b).index_add_(0, self.expert, dy)


def _times(share: Tensor, rows: Tensor) -> Tensor:
    """share * rows, in place where that has their dtype: rows are the caller's own."""
    if share.dtype is rows.dtype:
        return rows.mul_(share)
    return (share * rows).to(rows.dtype)


def _forward(
    x: Tensor, prob: Tensor, weights: Weights, kept: Kept, activation: str, packed: Packed | None
) -> tuple[Tensor, list[Tensor]]:
    """y, and g and u of its rows."""
    w_gate, w_up, w_down, b_gate, b_up, b_down = weights
    a, first = kept.gather(x), ((w_gate, b_gate), (w_up, b_up))
    pre = [kept.biased(kept.product(a, w), b) for w, b in first if w is not None]
    h = traced.activated(pre, activation, packed)
    assert w_down is not None
    return kept.sum(_times(kept.each(prob), kept.biased(kept.product(h, w_down), b_down))), pre


Pull = Callable[[Tensor], Tensor]
# Gradients by one operation; of other activations autograd makes them, whose engine costs more than
# all that is done for one token.
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
    "relu": lambda d, t: torch.ops.aten.threshold_backward.default(d, t, 0),
}


def _pulled(formula: Callable[[Tensor], Tensor], t: Tensor, name: str) -> tuple[Tensor, Pull]:
    """formula(t), and from a gradient of it to that of t."""
    slope = _SLOPES.get(name)
    if slope is not None:
        return formula(t), lambda d: slope(d, t)
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        made = formula(leaf)
    return made.detach(), lambda d: torch.autograd.grad(made, leaf, d)[0]


def _activated_again(
    pre: Sequence[Tensor], activation: str, packed: Packed | None
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """h of g and u, and from a gradient of it to theirs."""
    gate = resolve(activation)
    if len(pre) == 1 and packed is None:
        h, pull = _pulled(gate.phi, pre[0], activation)
        return h, lambda dh: [pull(dh)]
    g, u = pre if packed is None else halves(pre[0], packed)
    phi, pull = _pulled(gate.phi, g, activation)
    psi, pull_up = (u, None) if gate.row.up is None else _pulled(gate.psi, u, activation)

    def back(dh: Tensor) -> Sequence[Tensor]:
        if packed is None:
            dg, du = pull(dh * psi), dh * phi
            return dg, du if pull_up is None else pull_up(du)
        joined = torch.empty_like(pre[0])
        dg, du = halves(joined, packed)
        dg.copy_(pull(dh * psi))
        if pull_up is None:
            torch.mul(dh, phi, out=du)
        else:
            du.copy_(pull_up(dh * phi))
        return [joined]

    return phi * psi, back


def _formula(x: Tensor, prob: Tensor, *rest: Any) -> Tensor:
    *weights, kept, activation, packed = rest
    arguments = (kept.routing._replace(prob=prob), *weights, activation, packed)
    return traced.moe_mlp(x, *arguments)


class ExpertsFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prob: Tensor, *rest: Any) -> Tensor:
        *weights, kept, activation, packed = rest
        y, pre = _forward(x, prob, weights, kept, activation, packed)
        save(ctx, (x, prob, *weights), (kept, activation, packed), *pre)
        return y

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, prob, w_gate, w_up, w_down, b_gate, b_up, b_down, *pre = ctx.saved_tensors
        need_x, need_prob, need_wg, need_wu, need_wd, need_bg, need_bu, need_bd, *_ = (
            ctx.needs_input_grad
        )
        kept, activation, packed = ctx.options
        need_first = need_x or need_wg or need_wu or need_bg or need_bu
        rows, share = kept.gather(dy), kept.each(prob)
        h, back = _activated_again(pre, activation, packed)
        dx = dprob = dw_gate = dw_up = dw_down = scaled = None
        if need_wd or need_bd or not need_prob:
            scaled = (share * rows).to(dy.dtype)
        if need_prob:
            # With the rows' own sums, which are not kept: dy . (h w' + b) = (dy w) . h + dy . b.
            dh = kept.product(rows, w_down.mT)
            own = (dh * h).sum(1, keepdim=True)
            if b_down is not None:
                own = own + (rows * b_down.index_select(0, kept.expert)).sum(1, keepdim=True)
            dprob = kept.back(own).view(prob.shape).to(prob.dtype)
            dh = _times(share, dh)
        elif need_first:
            dh = kept.product(scaled, w_down.mT)
        dg, du = (*back(dh), None)[:2] if need_first else (None, None)
        if need_x:
            dx = kept.product(dg, w_gate.mT)
            if w_up is not None:
                dx += kept.product(du, w_up.mT)
            dx = kept.sum(dx)
        if need_wg or need_wu:
            a = kept.gather(x)
            dw_gate = kept.wgrad(dg, a, w_gate) if need_wg else None
            dw_up = kept.wgrad(du, a, w_up) if need_wu else None
        if need_wd:
            dw_down = kept.wgrad(scaled, h, w_down)
        return (
            dx, dprob, dw_gate, dw_up, dw_down,
            kept.bgrad(dg, b_gate) if need_bg else None,
            kept.bgrad(du, b_up) if need_bu else None,
            kept.bgrad(scaled, b_down) if need_bd else None, None, None, None,
        )  # fmt: skip


def moe_mlp(
    x: Tensor,
    routing: Routing,
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
    """The sum over a token's choices of prob * the expert's MLP; x (T, D)."""
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    if lora is not None or not readable(routing.offsets):
        return traced.moe_mlp(x, routing, *weights, activation, packed, lora)
    prob, kept = routing.prob, Kept(routing)
    if not needs_grad(x, prob, *weights):
        return _forward(x, prob, weights, kept, activation, packed)[0]
    return ExpertsFunction.apply(x, prob, *weights, kept, activation, packed)
