"""y[t] = x[t] w[e]' + b[e] with e = expert[t]: one linear map a token, chosen among E.

| tensor | shape | |
|---|---|---|
| x | (..., K) | flattened to (T, K) |
| routing | | of T tokens to E maps; its prob is not used |
| w, b | (E, N, K), (E, N) | any strides |
| y | (..., N) | 0 for a dropped token |

dtype: one floating dtype for all, kept. Saved for backward: x, w and the routing. Backward: dx =
dy w (moe_down), dw[e] = dy' x over the expert's tokens (moe_wgrad), db[e] the sum of dy over them
(moe_bias_grad), each only if its gradient is wanted. No copy of a weight for each token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice
from ..backends.cpu import traced as cpu
from ..backends.derivatives import differentiable, save
from ..backends.flops import rows_times
from ..backends.op import Op, kernel, register
from ..check.experts import check_one_choice, check_routing
from ..packing import rows, unrows
from ..reference import Routing
from . import _experts

OP = "moe_linear"


def _forward(x: Tensor, w: Tensor, b: Tensor | None, tokens: Tensor, offsets: Tensor) -> Tensor:
    return _experts.down(x, tokens, offsets, w, None, None, b, None, True)


def _formula(x: Tensor, w: Tensor, b: Tensor | None, tokens: Tensor, offsets: Tensor) -> Tensor:
    return reference.moe_linear(x, _experts.routing_of(x[:, 0], tokens, offsets), w, b)


class MoELinearFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, tokens: Tensor, offsets: Tensor
    ) -> Tensor:
        save(ctx, (x, w, b, tokens, offsets), ())
        return _forward(x, w, b, tokens, offsets)

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, _, tokens, offsets = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx = _forward(dy, w.mT, None, tokens, offsets) if need_x else None
        dw = _experts.wgrad(dy, x, tokens, offsets, True, True) if need_w else None
        db = _experts.bias_grad(dy, tokens, offsets) if need_b else None
        return dx, dw, db, None, None


def moe_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w[e]' + b[e] with each token's own e; `routing.prob` is not used.

    Args:
        x: (..., K). Read in place where its leading dimensions merge by strides.
        routing: of x's tokens to one of E maps each, from `top1_route` or `route_to`.
        w, b: (E, N, K), any strides, and (E, N) or None.

    Returns y (..., N) in x's dtype (under autocast: the autocast dtype); a dropped token's row is
    0.

    Raises ValueError (shape, device, a routing of k > 1) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and sum
    products in float32.

    Examples:
        >>> import torch
        >>> from fusedmlp import moe_linear, route_to
        >>> x, w = torch.randn(3, 64), torch.randn(4, 128, 64)
        >>> y = moe_linear(x, route_to(torch.tensor([2, 0, 2]), torch.ones(3), 4), w)
        >>> torch.allclose(y[1], x[1] @ w[0].T, rtol=1e-3, atol=1e-3)
        True
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w, b = check.cast(dtype, x, w, b)  # type: ignore[assignment]
    check.like_x(OP, x, ("w",), w=w, b=b)
    if w.dim() != 3 or not w.shape[0]:
        raise ValueError(f"{OP}: w must be (E, N, K), E at least 1, got {tuple(w.shape)}")
    E, N, K = w.shape
    check.columns(OP, "x", x, w.shape, "K", "w")
    if b is not None:
        check.shape(OP, "b", b, E, N)
    check_one_choice(OP, routing)
    check_routing(OP, x, routing, E, uses_prob=False)
    flat = rows(x)
    if choice.pick(OP, x) == "reference":
        formula = cpu.moe_linear if choice.for_cpu(x) else reference.moe_linear
        y = formula(flat, routing, w, b)
    else:
        run = MoELinearFunction.apply if check.wants_grad(x, w, b) else _forward
        y = run(flat, w, b, routing.tokens, routing.offsets)
    return unrows(y, x)


register(
    Op(
        OP,
        moe_linear,
        reference.moe_linear,
        forward=(kernel(_experts.down, "MH"),),
        backward=(kernel(_experts.down), kernel(_experts.wgrad), kernel(_experts.bias_grad)),
        flops=rows_times("w"),
    )
)
