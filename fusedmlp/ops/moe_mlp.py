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
Source: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import experts as cpu
from ..backends.derivatives import by_reference, differentiable, save
from ..backends.flops import Shape, Shapes, no_products, rows_times
from ..backends.op import Op, kernel, register
from ..check.experts import autocast_prob, check_experts, check_routing
from ..kernels.later import Later
from ..kernels.launches import moe as launches
from ..kernels.moe import moe_mlp as _triton
from ..packing import Packed, halves, join_pair, rows, unrows
from ..reference import Routing
from .gated_linear import transposed

OP = "moe_mlp"
_triton_bwd = Later("moe.backward")


def _up_fake(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
) -> tuple[Tensor, Tensor]:
    return _triton.moe_up_results(x, tokens, w_gate, w_up, want_h, want_gu)


def _down_fake(
    a: Tensor,
    tokens: Tensor | None,
    offsets: Tensor,
    w: Tensor,
    a2: Tensor | None,
    w2: Tensor | None,
    b: Tensor | None,
    prob: Tensor | None,
    gather: bool,
) -> Tensor:
    return _triton.moe_down_result(a, w)


def _combine_fake(r: Tensor, rows: Tensor, offsets: Tensor, prob: Tensor | None, k: int) -> Tensor:
    return _triton.moe_combine_result(r, rows, k)


def _dh_fake(
    dy: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    prob: Tensor,
    w_down: Tensor,
    gu: Tensor,
    b_down: Tensor | None,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_dprob: bool,
    want_db: bool,
    want_db_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (want_h, want_db, want_db_down)
    return _triton_bwd.moe_dh_results(dy, prob, w_down, gu, packed, *wanted)


def _wgrad_fake(
    a: Tensor, b: Tensor, tokens: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool
) -> Tensor:
    return _triton_bwd.wgrad_result(a, b, offsets)


def _bias_grad_fake(dy: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    return _triton_bwd.bias_result(dy, offsets)


def _up_flops(
    x: Shape, tokens: Shape, offsets: Shape, w_gate: Shape, w_up: Shape | None, *rest: object
) -> int:
    """Every row meets one expert; a dropped choice's counts too."""
    return 2 * tokens[0] * (prod(w_gate[1:]) + (0 if w_up is None else prod(w_up[1:])))


def _down_flops(
    a: Shape, tokens: Shape, offsets: Shape, w: Shape, a2: Shape | None, *rest: object
) -> int:
    return 2 * a[0] * prod(w[1:]) * (1 if a2 is None else 2)


# x (T, D) -> h (T, H), gu (2 or 1, T, H) in expert order, each with no rows if not wanted.
up = library.define(
    "moe_up(Tensor x, Tensor tokens, Tensor offsets, Tensor w_gate, Tensor? w_up, Tensor? b_gate, "
    "Tensor? b_up, str activation, bool want_h, bool want_gu) -> (Tensor, Tensor)",
    _triton.moe_up,
    _up_fake,
    flops=_up_flops,
    result="MH",
    grouped=True,
    launches=(launches.UP,),
)
# prob (a w' + a2 w2' + b) in token order.
down = library.define(
    "moe_down(Tensor a, Tensor? tokens, Tensor offsets, Tensor w, Tensor? a2, Tensor? w2, "
    "Tensor? b, Tensor? prob, bool gather) -> Tensor",
    _triton.moe_down,
    _down_fake,
    flops=_down_flops,
    result="MD",
    grouped=True,
    launches=(launches.DOWN,),
)
# r (T k, N) in expert order -> (T, N): prob times a token's k rows, summed.
combine = library.define(
    "moe_combine(Tensor r, Tensor rows, Tensor offsets, Tensor? prob, SymInt k) -> Tensor",
    _triton.moe_combine,
    _combine_fake,
    flops=no_products,
    launches=(launches.COMBINE,),
)
# -> dgu, prob h, dprob, db, db_down
dh = library.define(
    "moe_dh(Tensor dy, Tensor tokens, Tensor offsets, Tensor prob, Tensor w_down, Tensor gu, "
    "Tensor? b_down, str activation, str? packed, bool want_h, bool want_dprob, bool want_db, "
    "bool want_db_down) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _triton_bwd.moe_dh,
    _dh_fake,
    flops=lambda dy, tokens, offsets, prob, w_down, *_: 2 * tokens[0] * prod(w_down[1:]),
    result="MH",
    grouped=True,
    launches=(launches.DH,),
)
# a (R, N), b (R, K), (T, ...) where gathered -> a' b of each expert's rows, (E, N, K)
wgrad = library.define(
    "moe_wgrad(Tensor a, Tensor b, Tensor tokens, Tensor offsets, bool gather_a, bool gather_b) "
    "-> Tensor",
    _triton_bwd.moe_wgrad,
    _wgrad_fake,
    flops=lambda a, b, tokens, *_: 2 * tokens[0] * a[1] * b[1],
    result="HD",
    grouped=True,
    launches=(launches.WGRAD,),
)
# dy (T, N) in token order -> its sums over each expert's tokens, (E, N)
bias_grad = library.define(
    "moe_bias_grad(Tensor dy, Tensor tokens, Tensor offsets) -> Tensor",
    _triton_bwd.moe_bias_grad,
    _bias_grad_fake,
    flops=no_products,
    launches=(launches.BIAS,),
)


def _first(
    x: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_gu: bool,
) -> tuple[Tensor, Tensor]:
    """The up op; halves of packed weights are handed over as views."""
    if packed:
        w_gate, w_up = halves(w_gate, packed, 1)
        if b_gate is not None:
            b_gate, b_up = halves(b_gate, packed, 1)
    return up(x, tokens, offsets, w_gate, w_up, b_gate, b_up, activation, want_h, want_gu)


class Order(NamedTuple):
    """What the kernels know of a routing. rows: None for k = 1, where they are not read."""

    tokens: Tensor
    offsets: Tensor
    rows: Tensor | None
    k: int


def _second(
    a: Tensor, order: Order, w: Tensor, a2: Tensor | None, w2: Tensor | None, b: Tensor | None,
    prob: Tensor | None,
) -> Tensor:  # fmt: skip
    """prob (a w' + a2 w2' + b) in token order, a token's choices summed."""
    if order.rows is None:
        return down(a, order.tokens, order.offsets, w, a2, w2, b, prob, False)
    r = down(a, None, order.offsets, w, a2, w2, b, None, False)
    return combine(r, order.rows, order.offsets, prob, order.k)


def _weight_grad(
    w: Tensor, a: Tensor, b: Tensor, tokens: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool
) -> Tensor:
    """a' b of each expert's rows, laid out as w is: autograd copies another layout into a
    parameter's own."""
    if transposed(w):
        return wgrad(b, a, tokens, offsets, gather_b, gather_a).mT
    return wgrad(a, b, tokens, offsets, gather_a, gather_b)


def _dx(dgu: Tensor, order: Order, w_gate: Tensor, w_up: Tensor | None) -> Tensor:
    """dgu packed goes with a packed weight, by one product."""
    if dgu.dim() == 2:
        return _second(dgu, order, w_gate.mT, None, None, None, None)
    du, up_t = (None, None) if w_up is None else (dgu[1], w_up.mT)
    return _second(dgu[0], order, w_gate.mT, du, up_t, None, None)


def routing_of(prob: Tensor, tokens: Tensor, offsets: Tensor, k: int = 1) -> Routing:
    """The routing that has these fields, prob (T k,); the expert of a dropped choice is not known
    and reads E."""
    place = torch.arange(tokens.shape[0], dtype=offsets.dtype, device=offsets.device)
    rows = torch.empty_like(tokens).scatter_(0, tokens.long(), place)
    expert = torch.searchsorted(offsets[1:-1], rows, right=True)
    if k > 1:
        expert, prob = expert.view(-1, k), prob.view(-1, k)
    return Routing(expert, prob, tokens, rows, offsets, offsets[:-1].diff())


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
        h, gu = _first(
            x, tokens, offsets, w_gate, w_up, b_gate, b_up, activation, packed, True, not recompute
        )
        inputs = (x, prob, w_gate, w_up, w_down, b_gate, b_up, b_down, tokens, offsets, rows)
        save(ctx, inputs, (k, activation, packed), None if recompute else gu)
        order = Order(tokens, offsets, rows, k)
        return _second(h, order, w_down, None, None, b_down, prob)

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
            _, gu = _first(
                x, tokens, offsets, w_gate, w_up, b_gate, b_up, activation, packed, False, True
            )
        dgu, h, dprob, db, db_down = dh(
            dy, tokens, offsets, prob, w_down, gu, b_down, activation, packed,
            need_wd, need_p, need_bg or need_bu, need_bd,
        )  # fmt: skip
        dw = lambda w, a: _weight_grad(w, a, x, tokens, offsets, False, True)  # noqa: E731
        dx = _dx(dgu, Order(tokens, offsets, rows, k), w_gate, w_up) if need_x else None
        dw_gate = dw_up = dw_down = db_gate = db_up = None
        if need_wg:
            dw_gate = dw(w_gate, dgu if packed else dgu[0])
        if need_wu:
            dw_up = dw(w_up, dgu[1])
        if need_wd:
            dw_down = _weight_grad(w_down, dy, h, tokens, offsets, True, False)
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
    tensors = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    E = check_experts(OP, x, tensors, activation, packed)
    if dtype and isinstance(routing, Routing):
        routing = autocast_prob(routing, dtype)
    check_routing(OP, x, routing, E)
    wants_grad = check.wants_grad(x, routing.prob, *tensors)
    flat = rows(x)
    if choice.pick(OP, x) == "reference":
        arguments = (flat, routing, *tensors, activation, packed)
        formula = cpu.moe_mlp if choice.for_cpu(x) else reference.moe_mlp
        y = by_reference(formula, *arguments, recompute=recompute and wants_grad)
        return unrows(y, x)
    k = routing.k
    order = Order(routing.tokens, routing.offsets, None if k == 1 else routing.rows, k)
    prob = routing.prob if routing.prob.dim() == 1 else routing.prob.reshape(-1)
    if wants_grad:
        y = MoEMLPFunction.apply(flat, prob, *tensors, *order, activation, packed, recompute)
    else:
        h, _ = _first(flat, *order[:2], w_gate, w_up, b_gate, b_up, activation, packed, True, False)
        y = _second(h, order, w_down, None, None, b_down, prob)
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
        flops=_choices_times("w_gate", "w_up", "w_down"),
        remade=_choices_times("w_gate", "w_up"),
    )
)
