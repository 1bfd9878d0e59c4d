"""A gated or a plain block with adapters: each projection w x becomes w x + s b (a x).

| step | computes | by |
|---|---|---|
| forward | t = s x a' of gate and up, (M, r): one product where their scales agree | cuBLAS |
| | h (and g, u), with t b' added in the accumulators | gated_linear or linear_act |
| | y = h Wd' + bd, t_d = s h a_d', y += t_d b_d' | cuBLAS |
| backward | c_d = s dy b_d; dh = dy Wd + c_d a_d in registers -> dg, du, h | their backward |
| | c = s dg b, da = c' x, db = dg' t, dx += c a; da_d = c_d' h, db_d = dy' t_d | cuBLAS |

Shapes: a (r, in), b (out, r), t and c (M, r). Memory plan: saves x, the parameters, g and u (z of a
plain block) and the t; with recompute=True not g and u. No gradient of a frozen weight is made.
Source: Hu et al., arXiv 2106.09685.
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
from ..invariance import STATE
from ..packing import Packed, halves, join_pair, rows, split_pair
from ..reference.lora import Lora
from . import gated_act, gated_linear, linear_act


def _formula(*arguments: Any) -> Tensor:
    *block, activation, packed, plain, scales = arguments
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = block[:7]
    lora = lora_of(tuple(block[7:]), scales)
    if plain:
        lora = Lora(up=lora.gate, down=lora.down)
        return reference.mlp(x, w_gate, w_down, b_gate, b_down, activation, lora)
    return reference.gated_mlp(
        x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, packed, lora
    )


def _scaled(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale x w', rounded once where it is PyTorch's. By beta=0 the first argument is not read."""
    if STATE.on or not w.shape[1]:
        return linear_act.product(x, w).mul_(scale)
    return torch.addmm(w[:, 0], x, w.t(), beta=0, alpha=scale)


def _plus(y: Tensor, t: Tensor, w: Tensor) -> None:
    """y += t w', counted as torch's counter does not count addmm_."""
    if STATE.on:
        y += linear_act.product(t, w)
    else:
        torch.addmm(y, t, w.t(), out=y)


def _first_products(x: Tensor, lora: Lora) -> tuple[Tensor | None, Tensor | None]:
    """s x a' of gate and of up."""
    gate, up, _ = lora
    if gate is None or up is None or gate.scale != up.scale:
        made = (None if p is None else _scaled(x, p.a, p.scale) for p in (gate, up))
        return next(made), next(made)
    both = _scaled(x, torch.cat((gate.a, up.a)), gate.scale)
    r = gate.a.shape[0]
    return both[:, :r], both[:, r:]


def _first(
    block: tuple[Any, ...],
    t: tuple[Tensor | None, Tensor | None],
    lora: Lora,
    activation: str,
    packed: Packed | None,
    plain: bool,
    *wanted: bool,
) -> tuple[Tensor, Tensor]:
    """h, and g and u or z, whichever of the two are `wanted`."""
    x, w_gate, w_up, _, b_gate, b_up, _ = block
    low_gate, low_up = (None if p is None else p.b for p in lora[:2])
    if plain:
        return linear_act.fwd(x, w_gate, b_gate, activation, *wanted, t[0], low_gate)
    if packed:
        w_gate, w_up = halves(w_gate, packed, 0)
        if b_gate is not None:
            b_gate, b_up = halves(b_gate, packed, 0)
    return gated_linear.fwd(
        x, w_gate, w_up, b_gate, b_up, activation, *wanted, *t, low_gate, low_up
    )


def _forward(
    block: tuple[Any, ...], lora: Lora, options: tuple[Any, ...], want_gu: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """y, g and u, and the three t."""
    t = _first_products(block[0], lora)
    h, gu = _first(block, t, lora, *options, True, want_gu)
    y = linear_act.product(h, block[3], block[6])
    t_down = None
    if lora.down is not None:
        t_down = _scaled(h, lora.down.a, lora.down.scale)
        _plus(y, t_down, lora.down.b)
    return y, gu, (*t, t_down)


class LoraFunction(Function):
    """Arguments: those of a block, x to b_down; a and b of gate, up, down; activation, packed,
    plain, the scales, recompute. A plain block's first projection stands in the gate's place."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, activation, packed, plain, scales, recompute = arguments
        block, lora = tuple(tensors[:7]), lora_of(tuple(tensors[7:]), scales)
        y, gu, t = _forward(block, lora, (activation, packed, plain), not recompute)
        options = (activation, packed, plain, scales)
        save(ctx, tensors, options, None if recompute else gu, *t)
        return y

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, gu, t_gate, t_up, t_down = ctx.saved_tensors
        activation, packed, plain, scales = ctx.options
        block, lora, need = tuple(tensors[:7]), lora_of(tuple(tensors[7:]), scales), _Needs(ctx)
        x, w_gate, w_up, w_down = block[:4]
        if gu is None and (need.dgu or need.h):
            options = (activation, packed, plain)
            _, gu = _first(block, (t_gate, t_up), lora, *options, False, True)
        grads: list[Tensor | None] = [None] * len(need)
        c_down = low_down = None
        if lora.down is not None and (need.dgu or need[11]):
            c_down = _scaled(dy, lora.down.b.t(), lora.down.scale)
            low_down = lora.down.a.t()
        h = None
        if need.dgu:
            last = (need.h, need.db, c_down, low_down)
            if plain:
                dgu, h, db = linear_act.bwd(dy, w_down, gu, activation, *last)
                grads[0] = linear_act.product(dgu, w_gate.t()) if need[0] else None
                grads[1] = linear_act.outer(dgu, x) if need[1] else None
                pair: tuple[Any, ...] = (dgu, None)
            else:
                dgu, h, db = gated_linear.bwd(dy, w_down, gu, activation, packed, *last)
                grads[:3] = gated_linear.projection_grads(
                    x, w_gate, w_up, dgu, packed, (need[0], need[1], need[2])
                )
                pair = split_pair(dgu, packed)
            _bias_grads(grads, db, packed, need)
            for at, d, adapter, t in zip((7, 9), pair, lora[:2], (t_gate, t_up), strict=True):
                if adapter is None:
                    continue
                if need[0] or need[at]:
                    c = _scaled(d, adapter.b.t(), adapter.scale)
                    grads[at] = linear_act.outer(c, x) if need[at] else None
                    if grads[0] is not None:
                        _plus(grads[0], c, adapter.a.t())
                grads[at + 1] = linear_act.outer(d, t) if need[at + 1] else None
        elif need.h:
            h = linear_act.act(gu, activation) if plain else gated_act.fwd(*gu, activation)
        if need[3]:
            assert h is not None
            grads[3] = gated_linear.weight_grad(w_down, dy, h)
        grads[6] = dy.sum(0) if need[6] else None
        if need[11]:
            assert c_down is not None and h is not None
            grads[11] = linear_act.outer(c_down, h)
        grads[12] = linear_act.outer(dy, t_down) if need[12] else None
        return tuple(grads)


class _Needs(tuple[bool, ...]):
    """Which arguments need a gradient, and what of the backward those need."""

    def __new__(cls, ctx: Any) -> _Needs:
        return super().__new__(cls, ctx.needs_input_grad)

    @property
    def db(self) -> bool:
        return self[4] or self[5]

    @property
    def dgu(self) -> bool:
        return any(self[i] for i in (0, 1, 2, 4, 5, 7, 8, 9, 10))

    @property
    def h(self) -> bool:
        return self[3] or self[11]


def _bias_grads(
    grads: list[Tensor | None], db: Tensor, packed: Packed | None, need: _Needs
) -> None:
    if packed:
        grads[4] = join_pair(db, packed) if need[4] else None
        return
    # Clones: a view would keep both halves alive for one.
    grads[4] = db[0].clone() if need[4] else None
    grads[5] = db[1].clone() if need[5] else None


def adapted_block(
    block: tuple[Tensor | None, ...],
    lora: Lora,
    activation: str,
    packed: Packed | None,
    plain: bool,
    recompute: bool,
) -> Tensor:
    """The block of x to b_down on the kernels, (M, D_out)."""
    if plain:
        lora = Lora(gate=lora.up, down=lora.down)
    assert block[0] is not None
    block = (rows(block[0]), *block[1:])
    pairs = tensors_of(lora)
    if not wants_grad(*block, *pairs):
        return _forward(block, lora, (activation, packed, plain), False)[0]
    scales = scales_of(lora)
    return LoraFunction.apply(*block, *pairs, activation, packed, plain, scales, recompute)
