"""The products of experts, registered, and how a routing's rows go through them. moe_mlp,
moe_linear and adapters of experts are made of these. T tokens, R = T k rows in expert order."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import library
from ..backends.flops import Shape, no_products
from ..kernels.later import Later
from ..kernels.launches import moe as launches
from ..kernels.moe import moe_mlp as _triton
from ..packing import Packed, halves
from ..reference import Routing
from .gated_linear import transposed

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


def first(
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


def second(
    a: Tensor, order: Order, w: Tensor, a2: Tensor | None, w2: Tensor | None, b: Tensor | None,
    prob: Tensor | None,
) -> Tensor:  # fmt: skip
    """prob (a w' + a2 w2' + b) in token order, a token's choices summed."""
    if order.rows is None:
        return down(a, order.tokens, order.offsets, w, a2, w2, b, prob, False)
    r = down(a, None, order.offsets, w, a2, w2, b, None, False)
    return combine(r, order.rows, order.offsets, prob, order.k)


def weight_grad(
    w: Tensor, a: Tensor, b: Tensor, tokens: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool
) -> Tensor:
    """a' b of each expert's rows, laid out as w is: autograd copies another layout into a
    parameter's own."""
    if transposed(w):
        return wgrad(b, a, tokens, offsets, gather_b, gather_a).mT
    return wgrad(a, b, tokens, offsets, gather_a, gather_b)


def x_grad(dgu: Tensor, order: Order, w_gate: Tensor, w_up: Tensor | None) -> Tensor:
    """dgu packed goes with a packed weight, by one product."""
    if dgu.dim() == 2:
        return second(dgu, order, w_gate.mT, None, None, None, None)
    du, up_t = (None, None) if w_up is None else (dgu[1], w_up.mT)
    return second(dgu[0], order, w_gate.mT, du, up_t, None, None)


def routing_of(prob: Tensor, tokens: Tensor, offsets: Tensor, k: int = 1) -> Routing:
    """The routing that has these fields, prob (T k,); the expert of a dropped choice is not known
    and reads E."""
    place = torch.arange(tokens.shape[0], dtype=offsets.dtype, device=offsets.device)
    rows = torch.empty_like(tokens).scatter_(0, tokens.long(), place)
    expert = torch.searchsorted(offsets[1:-1], rows, right=True)
    if k > 1:
        expert, prob = expert.view(-1, k), prob.view(-1, k)
    return Routing(expert, prob, tokens, rows, offsets, offsets[:-1].diff())
