"""Experts on the CPU where the host may read the routing: their rows alone, in expert order.

Each projection is one node of autograd's graph, so that a training step costs little beside its
products; what needs more derivatives goes by the operations of traced.py. One token's experts are
dense blocks, whose weights are one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...packing import Packed
from ...reference import Routing
from ...reference.dense import gated_mlp, mlp
from ...reference.lora import Lora
from ..derivatives import differentiable, save
from . import traced
from .eager import needs_grad, readable
from .grouped import busy, outer_of, product_of, product_op, stacked, weight_grad

Product = Callable[..., Tensor]


class Kept:
    """The rows that experts take."""

    def __init__(self, routing: Routing) -> None:
        self.offsets, self.rows, self.k = routing.offsets, routing.rows, routing.k
        self.ends: list[int] = routing.offsets.tolist()
        self.count = self.ends[-2]
        self.choices = routing.tokens[: self.count]
        self.tokens = self.choices if self.k == 1 else self.choices // self.k
        self._chosen = routing.expert
        self._expert: Tensor | None = None

    @property
    def expert(self) -> Tensor:
        """Each row's expert."""
        if self._expert is None:
            self._expert = self._chosen.reshape(-1).index_select(0, self.choices)
        return self._expert

    def gather(self, t: Tensor) -> Tensor:
        """Each row's token of t (T, N)."""
        return t.expand(self.count, -1) if len(t) == 1 else t.index_select(0, self.tokens)

    def each(self, t: Tensor) -> Tensor:
        """Each row's value of t, shaped as routing.prob: (count, 1)."""
        return t.reshape(-1).index_select(0, self.choices).unsqueeze(1)

    def back(self, t: Tensor) -> Tensor:
        """(T k, N): rows in the order of choices, 0 for those that no expert takes."""
        if self.count == self.ends[-1]:
            return t.index_select(0, self.rows)
        padded = torch.cat((t, t.new_zeros(1, t.shape[1])))
        return padded.index_select(0, self.rows.clamp(max=self.count))

    def sum(self, t: Tensor) -> Tensor:
        """(T, N): the sum of each token's rows."""
        if self.ends[-1] == self.k:  # one token
            return t if self.count == 1 else t.sum(0, keepdim=True)
        t = self.back(t)
        return t if self.k == 1 else t.view(-1, self.k, t.shape[1]).sum(1)

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        return product_of(a, w, self.offsets, self.ends)

    def traced_product(self, a: Tensor, w: Tensor) -> Tensor:
        return product_op(a, w, self.offsets)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return outer_of(a, b, self.offsets, self.ends)

    def wgrad(self, dy: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return weight_grad(dy, a, w, self.outer)

    def bgrad(self, dy: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(b).index_add_(0, self.expert, dy)


def _biased(y: Tensor, b: Tensor | None, kept: Kept) -> Tensor:
    return y if b is None else y + b.index_select(0, kept.expert)


def _first(x: Tensor, w: Tensor, b: Tensor | None, kept: Kept, product: Product) -> Tensor:
    """x w[e]' + b[e] of each row."""
    return _biased(product(kept.gather(x), w), b, kept)


def _second(
    h: Tensor, prob: Tensor, w: Tensor, b: Tensor | None, kept: Kept, product: Product
) -> Tensor:
    """The sum of a token's prob * (h w[e]' + b[e])."""
    return kept.sum(kept.each(prob) * _biased(product(h, w), b, kept)).to(h.dtype)


def _traced_first(x: Tensor, w: Tensor, b: Tensor | None, kept: Kept) -> Tensor:
    return _first(x, w, b, kept, kept.traced_product)


def _traced_second(h: Tensor, prob: Tensor, w: Tensor, b: Tensor | None, kept: Kept) -> Tensor:
    return _second(h, prob, w, b, kept, kept.traced_product)


class FirstFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, kept: Kept) -> Tensor:
        save(ctx, (x, w, b), (kept,))
        return _first(x, w, b, kept, kept.product)

    @staticmethod
    @differentiable(_traced_first)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        kept: Kept = ctx.options[0]
        dx = kept.sum(kept.product(dy, w.mT)) if need_x else None
        dw = kept.wgrad(dy, kept.gather(x), w) if need_w else None
        return dx, dw, kept.bgrad(dy, b) if need_b else None, None


class SecondFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, prob: Tensor, w: Tensor, b: Tensor | None, kept: Kept
    ) -> Tensor:
        save(ctx, (h, prob, w, b), (kept,))
        return _second(h, prob, w, b, kept, kept.product)

    @staticmethod
    @differentiable(_traced_second)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, prob, w, b = ctx.saved_tensors
        need_h, need_prob, need_w, need_b, _ = ctx.needs_input_grad
        kept: Kept = ctx.options[0]
        dh = dprob = None
        rows = kept.gather(dy)
        scaled = (kept.each(prob) * rows).to(dy.dtype)
        if need_prob:
            # With the rows' own sums, which are not kept: dy . (h w' + b) = (dy w) . h + dy . b.
            c = kept.product(rows, w.mT)
            own = (c * h).sum(1, keepdim=True)
            if b is not None:
                own = own + (rows * b.index_select(0, kept.expert)).sum(1, keepdim=True)
            dprob = kept.back(own).view(prob.shape).to(prob.dtype)
            dh = (kept.each(prob) * c).to(dy.dtype)
        elif need_h:
            dh = kept.product(scaled, w.mT)
        dw = kept.wgrad(scaled, h, w) if need_w else None
        return dh, dprob, dw, kept.bgrad(scaled, b) if need_b else None, None


def _traced_parts(*stacks_and_experts: Any) -> tuple[Tensor, ...]:
    *stacks, experts = stacks_and_experts
    return tuple(t[e] for t in stacks for e in experts)


class PartsFunction(Function):
    """t[e] of each stack t and, for each, of every expert e in use. Backward makes one gradient of
    a stack, where selecting an expert by itself makes one of full size for each."""

    @staticmethod
    def forward(ctx: Any, *stacks_and_experts: Any) -> tuple[Tensor, ...]:
        *stacks, experts = stacks_and_experts
        save(ctx, stacks, (experts,))
        return tuple(t.select(0, e) for t in stacks for e in experts)

    @staticmethod
    @differentiable(_traced_parts)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (experts,), own = ctx.options, iter(grads)
        made = [stacked(t, experts, [next(own) for _ in experts]) for t in ctx.saved_tensors]
        return *made, None


def _parts(stacks: Sequence[Tensor | None], experts: list[int]) -> Iterator[tuple[Any, ...]]:
    """What each of the experts has of the stacks."""
    trained = [needs_grad(t) for t in stacks]
    made = iter(PartsFunction.apply(*compress(stacks, trained), experts) if any(trained) else ())
    columns = [
        [next(made) if own else None if t is None else t.select(0, e) for e in experts]
        for t, own in zip(stacks, trained, strict=True)
    ]
    return zip(*columns, strict=True)


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
    if len(x) == 1 and (used := list(busy(routing.offsets.tolist()))):
        return _one_token(x, routing, used, weights, activation, packed)
    prob, first, kept = routing.prob, ((w_gate, b_gate), (w_up, b_up)), Kept(routing)
    if not needs_grad(x, prob, *weights):
        pre = [_first(x, w, b, kept, kept.product) for w, b in first if w is not None]
        h = traced.activated(pre, activation, packed)
        return _second(h, prob, w_down, b_down, kept, kept.product)
    pre = [FirstFunction.apply(x, w, b, kept) for w, b in first if w is not None]
    h = traced.activated(pre, activation, packed)
    return SecondFunction.apply(h, prob, w_down, b_down, kept)


def _one_token(
    x: Tensor,
    routing: Routing,
    used: list[tuple[int, int, int]],
    weights: Sequence[Tensor | None],
    activation: str,
    packed: Packed | None,
) -> Tensor:
    """Each of its experts is a dense block, for which nothing is gathered."""
    made: list[Tensor] = []
    parts = _parts(weights, [e for e, _, _ in used])
    for (_, start, end), (gate, up, down, bg, bu, bd) in zip(used, parts, strict=True):
        if up is None and packed is None:
            y = mlp(x, gate, down, bg, bd, activation)
        else:
            y = gated_mlp(x, gate, up, down, bg, bu, bd, activation, packed)
        made += (end - start) * [y]
    if routing.k == 1:
        return (routing.prob.view(1, 1) * made[0]).to(x.dtype)
    shares = routing.prob.view(-1).index_select(0, routing.tokens[: len(made)])
    return (shares.unsqueeze(1) * torch.cat(made)).sum(0, keepdim=True).to(x.dtype)
