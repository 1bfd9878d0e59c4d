"""Experts with stacked adapters: a projection w[e] x becomes w[e] x + s b[e] (a[e] x).

| step | computes | by |
|---|---|---|
| forward | g, u of the weights themselves; t = s x a' of gate and up | moe_up |
| | g += t b', u += t b', h | moe_down, gated_act or linear_act |
| | y = prob (h Wd' + bd), t_d = s h a_d', y += prob (t_d b_d') | moe_down |
| backward | dg, du, prob h, dprob of dy Wd, and those of c_d a_d added, c_d = s dy b_d | moe_dh |
| | c = s dg b, da = c' x, db = dg' t over an expert's rows, dx += c a | moe_down, moe_wgrad |
| | da_d = c_d' (prob h), db_d = dy' (prob t_d) | moe_wgrad |

Shapes: a (E, r, in), b (E, out, r), t and c (R, r) in expert order. Rows are gathered by the
kernels, and no weight is formed. Partly fused: g and u gain their adapters' products in memory, not
in an epilogue. Memory plan: saves x, the routing, the parameters, g and u, and the t; with
recompute=True not g and u. No gradient of a frozen weight is made. Source: Hu et al., arXiv
2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..backends.derivatives import differentiable, save
from ..check import wants_grad
from ..check.lora import lora_of, scales_of, tensors_of
from ..packing import Packed, join_pair, split_pair
from ..reference.lora import Adapter, Lora
from . import _experts, gated_act, linear_act
from ._experts import Order, first, second, weight_grad, x_grad

Block = tuple[Any, ...]  # x, w_gate, w_up, w_down, b_gate, b_up, b_down
Pair = tuple[Tensor | None, Tensor | None]


def _formula(x: Tensor, prob: Tensor, *rest: Any) -> Tensor:
    *tensors, tokens, offsets, _, k, activation, packed, scales = rest
    routing, lora = _experts.routing_of(prob, tokens, offsets, k), lora_of(tensors[6:], scales)
    arguments = (routing, *tensors[:6], activation, packed, lora)
    return reference.moe_mlp(x, *arguments)


def _gathered(x: Tensor, order: Order, w: Tensor, scale: float) -> Tensor:
    """scale x w[e]' of each row's token, in expert order; rows of dropped choices hold nothing."""
    t, _ = _experts.up(
        x, order.tokens, order.offsets, w, None, None, None, "identity", True, False
    )  # fmt: skip
    return t if scale == 1 else t * scale


def _product(a: Tensor, order: Order, w: Tensor, scale: float = 1.0) -> Tensor:
    """scale a w[e]' of rows that are in expert order and stay so; 0 for dropped choices."""
    t = _experts.down(a, None, order.offsets, w, None, None, None, None, False)
    return t if scale == 1 else t * scale


def _first_products(x: Tensor, order: Order, gate: Adapter | None, up: Adapter | None) -> Pair:
    """s x a' of gate and of up; one pass over x where their ranks agree."""
    if gate is None or up is None or gate.a.shape != up.a.shape:
        made = (None if p is None else _gathered(x, order, p.a, p.scale) for p in (gate, up))
        return next(made), next(made)
    _, both = _experts.up(
        x, order.tokens, order.offsets, gate.a, up.a, None, None, "silu", False, True
    )
    return both[0].mul_(gate.scale), both[1].mul_(up.scale)


def _first(
    block: Block,
    order: Order,
    t: Pair,
    lora: Lora,
    activation: str,
    packed: Packed | None,
    *wanted: bool,
) -> tuple[Tensor, Tensor]:
    """h, and g and u, whichever are `wanted`, in expert order."""
    x, w_gate, w_up, _, b_gate, b_up, _ = block
    projections = (x, *order[:2], w_gate, w_up, b_gate, b_up, activation, packed)
    if lora.gate is None and lora.up is None:
        return first(*projections, *wanted)
    h, gu = first(*projections, False, True)
    for i, adapter in enumerate(lora[:2]):
        if adapter is not None:
            gu[i].add_(_product(t[i], order, adapter.b))  # type: ignore[arg-type]
    if wanted[0]:
        h = gated_act.fwd(*gu, activation) if len(gu) == 2 else linear_act.act(gu[0], activation)
    return h, gu


def _forward(
    block: Block, prob: Tensor, order: Order, lora: Lora, options: tuple[Any, ...], want_gu: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """y, g and u, and the three t."""
    t = _first_products(block[0], order, *lora[:2])
    h, gu = _first(block, order, t, lora, *options, True, want_gu)
    y = second(h, order, block[3], None, None, block[6], prob)
    if lora.down is None:
        return y, gu, (*t, None)
    t_down = _product(h, order, lora.down.a, lora.down.scale)
    y += second(t_down, order, lora.down.b, None, None, None, prob)
    return y, gu, (*t, t_down)


class MoELoraFunction(Function):
    """Arguments: x, prob, the six of the experts, a and b of gate, up and down, the four of their
    order, activation, packed, the scales, recompute."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, k, activation, packed, scales, recompute = arguments
        x, prob, *rest, tokens, offsets, rows = tensors
        order, lora = Order(tokens, offsets, rows, k), lora_of(rest[6:], scales)
        block = (x, *rest[:6])
        y, gu, t = _forward(block, prob, order, lora, (activation, packed), not recompute)
        save(ctx, tensors, (k, activation, packed, scales), None if recompute else gu, *t)
        return y

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, prob, *rest, tokens, offsets, rows, gu, t_gate, t_up, t_down = ctx.saved_tensors
        k, activation, packed, scales = ctx.options
        order, lora = Order(tokens, offsets, rows, k), lora_of(rest[6:], scales)
        w_gate, w_up, w_down, *_, b_down = rest[:6]
        need = ctx.needs_input_grad
        if gu is None:
            block, t = (x, *rest[:6]), (t_gate, t_up)
            _, gu = _first(block, order, t, lora, activation, packed, False, True)
        grads: list[Tensor | None] = [None] * len(need)
        dgu, h, dprob, db, db_down = _experts.dh(
            dy, tokens, offsets, prob, w_down, gu, b_down, activation, packed,
            need[4] or need[12], need[1], need[5] or need[6], need[7],
        )  # fmt: skip
        if lora.down is not None:
            c = _gathered(dy, order, lora.down.b.mT, lora.down.scale)
            wanted = (need[1], need[5] or need[6])
            more = _through_down(c, order, lora.down, prob, gu, activation, packed, *wanted)
            for t, other in zip((dgu, dprob, db), more, strict=True):
                t += other
            if need[12]:
                grads[12] = weight_grad(lora.down.a, c, h, tokens, offsets, False, False)
            if need[13]:
                own = t_down * prob.index_select(0, tokens).unsqueeze(1)
                grads[13] = weight_grad(
                    lora.down.b, dy, own.to(t_down.dtype), tokens, offsets, True, False
                )
        if need[0]:
            grads[0] = x_grad(dgu, order, w_gate, w_up)
        grads[1] = dprob if need[1] else None
        pair: tuple[Any, ...] = split_pair(dgu, packed) if len(gu) == 2 else (dgu[0], None)
        for i, w, d in ((2, w_gate, dgu if packed else pair[0]), (3, w_up, pair[1])):
            grads[i] = weight_grad(w, d, x, tokens, offsets, False, True) if need[i] else None
        if need[4]:
            grads[4] = weight_grad(w_down, dy, h, tokens, offsets, True, False)
        if packed and need[5]:
            grads[5] = join_pair(db, packed)
        else:
            # Clones: a view would keep both halves alive for one.
            grads[5] = db[0].clone() if need[5] else None
            grads[6] = db[1].clone() if need[6] else None
        grads[7] = db_down if need[7] else None
        for i, d, adapter, t in zip((8, 10), pair, lora[:2], (t_gate, t_up), strict=True):
            if adapter is None:
                continue
            if need[0] or need[i]:
                c = _product(d, order, adapter.b.mT, adapter.scale)
                if need[i]:
                    grads[i] = weight_grad(adapter.a, c, x, tokens, offsets, False, True)
                if grads[0] is not None:
                    grads[0] += second(c, order, adapter.a.mT, None, None, None, None)
            if need[i + 1]:
                grads[i + 1] = weight_grad(adapter.b, d, t, tokens, offsets, False, False)
        return tuple(grads)


def _through_down(
    c: Tensor,
    order: Order,
    adapter: Adapter,
    prob: Tensor,
    gu: Tensor,
    activation: str,
    packed: Packed | None,
    want_dprob: bool,
    want_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What dgu, dprob and db gain by dh = c a. All of them are linear in dh, so that moe_dh makes
    them, of rows that each choice has for itself."""
    by_choice = torch.empty_like(c).index_copy_(0, order.tokens.long(), c)
    dgu, _, dprob, db, _ = _experts.dh(
        by_choice, *order[:2], prob, adapter.a, gu, None, activation, packed,
        False, want_dprob, want_db, False,
    )  # fmt: skip
    return dgu, dprob, db


def adapted_experts(
    block: Block,
    prob: Tensor,
    order: Order,
    lora: Lora,
    activation: str,
    packed: Packed | None,
    recompute: bool,
) -> Tensor:
    """The experts of x (T, D) to b_down on the kernels, (T, D_out); prob (R,)."""
    x, *weights = block
    pairs = tensors_of(lora)
    if not wants_grad(x, prob, *weights, *pairs):
        return _forward(block, prob, order, lora, (activation, packed), False)[0]
    return MoELoraFunction.apply(
        x, prob, *weights, *pairs, *order, activation, packed, scales_of(lora), recompute
    )
