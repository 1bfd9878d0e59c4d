"""y[t] = sum_j prob[t, j] * MLP_e(x[t]) with e = expert[t, j]: k experts a token, forward and
backward.

MLP_e is (act(x Wg[e]' + bg[e]) * (x Wu[e]' + bu[e])) Wd[e]' + bd[e], or without an up weight
act(x Wg[e]' + bg[e]) Wd[e]' + bd[e]. A dropped choice adds nothing.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (T, D) |
| routing | | of T tokens to E experts, k each; prob in x's dtype or float32 |
| w_gate, w_up | (E, H, D) | or w_gate (E, 2H, D) packed and w_up None; plain: w_up None |
| w_down | (E, D_out, H) | |
| b_gate, b_up, b_down | (E, H), (E, H), (E, D_out) | or b_gate (E, 2H) packed |
| y | (..., D_out) | |

dtype: one floating dtype for all but prob, kept. Memory plan: saves x (once, whatever k), the
routing, the weights, g and u (T k, H); with recompute=True not g and u. Rows of g, u, h lie in
expert order.

| step | computes | by |
|---|---|---|
| forward | h (and g, u) from gathered rows of x | moe_up |
| | y = prob (h Wd' + bd), to token order | moe_down; for k > 1 its rows stay in expert order and moe_combine sums a token's, times prob, in the order of its choices |
| backward | c = dy Wd in registers -> dg, du, prob h, bias sums, dprob = c . h + dy . bd | moe_dh |
| | dWd[e] = dy' (prob h), dWg[e] = dg' x, dWu[e] = du' x over the expert's rows | moe_wgrad |
| | dx = dg Wg + du Wu, to token order | moe_down; for k > 1 and moe_combine |

Each is skipped unless its gradient is wanted. x and dy are gathered by the kernels, never repeated.
The products are registered in _experts.py; with adapters the block is _moe_lora.py's.
Source: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice
from ..backends.cpu import experts as cpu
from ..backends.derivatives import by_reference, differentiable, save
from ..backends.flops import Shapes, lora_names, rows_times
from ..backends.op import Op, kernel, register
from ..check import lora as adapters
from ..check.experts import autocast_prob, check_adapters, check_experts, check_routing
from ..packing import Packed, join_pair, rows, unrows
from ..reference import Routing
from ..reference.lora import Lora
from ._experts import (
    Order,
    combine,
    dh,
    down,
    first,
    routing_of,
    second,
    up,
    weight_grad,
    wgrad,
    x_grad,
)
from ._moe_lora import adapted_experts

OP = "moe_mlp"


def _formula(x: Tensor, prob: Tensor, *rest: Any) -> Tensor:
    *weights, tokens, offsets, _, k, activation, packed = rest
    arguments = (routing_of(prob, tokens, offsets, k), *weights, activation, packed)
    return reference.moe_mlp(x, *arguments)


class MoEMLPFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        prob: Tensor,
        w_gate: Tensor,
        w_up: Tensor | None,
        w_down: Tensor,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        b_down: Tensor | None,
        tokens: Tensor,
        offsets: Tensor,
        rows: Tensor | None,
        k: int,
        activation: str,
        packed: Packed | None,
        recompute: bool,
    ) -> Tensor:
        h, gu = first(
            x, tokens, offsets, w_gate, w_up, b_gate, b_up, activation, packed, True, not recompute
        )
        inputs = (x, prob, w_gate, w_up, w_down, b_gate, b_up, b_down, tokens, offsets, rows)
        save(ctx, inputs, (k, activation, packed), None if recompute else gu)
        order = Order(tokens, offsets, rows, k)
        return second(h, order, w_down, None, None, b_down, prob)

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, prob, w_gate, w_up, w_down, b_gate, b_up, b_down, tokens, offsets, rows, gu
        ) = ctx.saved_tensors  # fmt: skip
        k, activation, packed = ctx.options
        need_x, need_p, need_wg, need_wu, need_wd, need_bg, need_bu, need_bd = ctx.needs_input_grad[
            :8
        ]
        if gu is None:
            _, gu = first(
                x, tokens, offsets, w_gate, w_up, b_gate, b_up, activation, packed, False, True
            )
        dgu, h, dprob, db, db_down = dh(
            dy, tokens, offsets, prob, w_down, gu, b_down, activation, packed,
            need_wd, need_p, need_bg or need_bu, need_bd,
        )  # fmt: skip
        dw = lambda w, a: weight_grad(w, a, x, tokens, offsets, False, True)  # noqa: E731
        dx = x_grad(dgu, Order(tokens, offsets, rows, k), w_gate, w_up) if need_x else None
        dw_gate = dw_up = dw_down = db_gate = db_up = None
        if need_wg:
            dw_gate = dw(w_gate, dgu if packed else dgu[0])
        if need_wu:
            dw_up = dw(w_up, dgu[1])
        if need_wd:
            dw_down = weight_grad(w_down, dy, h, tokens, offsets, True, False)
        if packed and need_bg:
            db_gate = join_pair(db, packed)
        elif need_bg or need_bu:
            # Clones: a view would keep both halves alive for one.
            db_gate = db[0].clone() if need_bg else None
            db_up = db[1].clone() if need_bu else None
        return (
            dx, dprob if need_p else None, dw_gate, dw_up, dw_down, db_gate, db_up,
            db_down if need_bd else None, None, None, None, None, None, None, None,
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
    *,
    activation: str = "silu",
    packed: Packed | None = None,
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """prob * ((act(x w_gate[e]' + b_gate[e]) * (x w_up[e]' + b_up[e])) w_down[e]' + b_down[e]),
    summed over the experts of each token.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides.
        routing: of x's tokens to E experts, from `topk_route`, `top1_route` or `route_to`.
        w_gate, w_up: (E, H, D) each, any strides; with `packed`, w_gate (E, 2H, D) and w_up None;
            without, w_up None means plain experts: act(x w_gate[e]' + b_gate[e]) w_down[e]'.
        w_down: (E, D_out, H), any strides.
        b_gate, b_up: (E, H) or None each; b_up None where w_up is, and b_gate (E, 2H) with
            `packed`.
        b_down: (E, D_out).
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
            Without up weights no gate such as that.
        packed: order of the halves of a packed weight: "gate_up" or "up_gate", one behind the
            other, or "interleaved", where rows 0, 2, 4, ... of an expert's w_gate and b_gate are
            gate and rows 1, 3, 5, ... are up. No copy is made; experts stored (E, D, 2H) and
            (E, H, D_out) are given as `w.mT`, and their gradients are laid out as they are.
        recompute: save neither g nor u for backward and run the first GEMM again there.
        lora: `Lora(gate=, up=, down=)`, adapters of any of the three (plain experts: gate and
            down) with a (E, r, in) and b (E, out, r): a projection w[e] x becomes
            w[e] x + scale b[e] (a[e] x). Of frozen weights no gradient is made.

    Returns y (..., D_out) in x's dtype (under autocast: the autocast dtype); a dropped choice adds
    nothing to its token's row.

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    All tensors but prob, which may be float32, have one floating dtype; the kernels take bfloat16,
    float16 and float32 and sum products in float32. Source: Fedus, Zoph, Shazeer, Switch
    Transformers, arXiv 2101.03961.

    Examples:
        >>> import torch
        >>> from fusedmlp import moe_mlp, top1_route
        >>> x, router = torch.randn(2, 8, 64), torch.randn(4, 64)
        >>> w_gate, w_up = torch.randn(2, 4, 128, 64)  # 4 experts of hidden width 128
        >>> w_down = torch.randn(4, 64, 128)
        >>> y = moe_mlp(x, top1_route(x @ router.T), w_gate, w_up, w_down, activation="silu")
        >>> y.shape
        torch.Size([2, 8, 64])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w_gate, w_up, w_down, b_gate, b_up, b_down = check.cast(  # type: ignore[assignment]
            dtype, x, w_gate, w_up, w_down, b_gate, b_up, b_down
        )
        lora = None if lora is None else adapters.cast(dtype, lora)
    tensors = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    E = check_experts(OP, x, tensors, activation, packed)
    if dtype and isinstance(routing, Routing):
        routing = autocast_prob(routing, dtype)
    check_routing(OP, x, routing, E)
    if lora is not None:
        check_adapters(OP, x, lora, tensors, packed)
    wants_grad = check.wants_grad(x, routing.prob, *tensors)
    flat = rows(x)
    if choice.pick(OP, x) == "reference":
        wants_grad = wants_grad or check.wants_grad(*adapters.tensors_of(lora))
        arguments = (flat, routing, *tensors, activation, packed, lora)
        formula = cpu.moe_mlp if choice.for_cpu(x) else reference.moe_mlp
        y = by_reference(formula, *arguments, recompute=recompute and wants_grad)
        return unrows(y, x)
    k = routing.k
    order = Order(routing.tokens, routing.offsets, None if k == 1 else routing.rows, k)
    prob = routing.prob if routing.prob.dim() == 1 else routing.prob.reshape(-1)
    if lora is not None:
        y = adapted_experts((flat, *tensors), prob, order, lora, activation, packed, recompute)
    elif wants_grad:
        y = MoEMLPFunction.apply(flat, prob, *tensors, *order, activation, packed, recompute)
    else:
        h, _ = first(flat, *order[:2], w_gate, w_up, b_gate, b_up, activation, packed, True, False)
        y = second(h, order, w_down, None, None, b_down, prob)
    return unrows(y, x)


def _choices_times(*weights: str) -> Callable[[Shapes], int]:
    """Each of a token's choices times these weights of its expert."""
    one = rows_times(*weights)
    return lambda shapes: one(shapes) * prod(shapes["prob"][1:])


register(
    Op(
        OP,
        moe_mlp,
        reference.moe_mlp,
        forward=(kernel(up), kernel(down), kernel(combine)),
        backward=(kernel(dh), kernel(down), kernel(wgrad)),
        flops=_choices_times("w_gate", "w_up", "w_down", *lora_names("gate", "up", "down")),
        remade=_choices_times("w_gate", "w_up", *lora_names("gate", "up")[1::2]),
    )
)
