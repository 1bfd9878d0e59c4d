"""h = act(g) * u with g = x w_gate' + b_gate and u = x w_up' + b_up: one pass over x, h made in
registers.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w_gate, w_up | (H, D) | any strides; or w_gate (2H, D) with both halves, w_up = None |
| b_gate, b_up | (H,) | either, both or neither; or b_gate (2H,), b_up = None |
| h | (..., H) | |

dtype: one floating dtype for all, kept; products accumulate in float32. Saved for backward: x, the
weights, g and u; h is not. Backward of this op alone: dg, du from dh, g, u (the gated_act kernel),
then dx = dg Wg + du Wu, dWg = dg' x, dWu = du' x by cuBLAS, each only if its gradient is wanted.
Source: Shazeer, GLU Variants, arXiv 2002.05202.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cuda import gated_linear as cuda_gated_linear
from ..backends.cutlass import dense as by_cutlass
from ..backends.derivatives import differentiable, save
from ..backends.flops import rows_times
from ..backends.op import HOPPER_AND_NEWER, Cuda, Op, kernel, register
from ..invariance import invariant
from ..kernels.dense import gated_linear as _triton
from ..kernels.launches import dense as launches
from ..packing import Packed, empty_gated, halves, rows, split_pair, unrows
from . import gated_act
from .linear_act import outer, product

OP = "gated_linear"


def check_projection(
    op: str,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    packed: Packed | None,
) -> int:
    """The shape rule of x, gate and up, for this op and for whole blocks. Returns H."""
    check.activation(op, activation)
    if packed is not None or w_up is None:
        check.packed(op, "w_gate", "w_up", w_up is None, packed)
    N, D = check.matrix(op, "w_gate", w_gate, "(H, D), or (2H, D) when packed")
    check.columns(op, "x", x, w_gate.shape, "D", "w_gate")
    if packed:
        if N % 2:
            raise ValueError(f"{op}: w_gate must be (2H, D) when packed, got {tuple(w_gate.shape)}")
        if b_up is not None:
            raise ValueError(f"{op}: b_up must be None when packed (b_gate is (2H,)), got a tensor")
    else:
        check.shape(op, "w_up", w_up, N, D)  # type: ignore[arg-type]
        if b_up is not None:
            check.shape(op, "b_up", b_up, N)
    if b_gate is not None:
        check.shape(op, "b_gate", b_gate, N)
    return N // 2 if packed else N


def _fwd_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
    *adapters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return empty_gated(x, x.shape[0], w_gate.shape[0], want_h, want_gu)


def _bwd_fake(
    dy: Tensor,
    w_down: Tensor,
    gu: Tensor,
    activation: str,
    packed: Packed | None,
    want_h: bool,
    want_db: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dgu, h = _triton.gated_linear_grads(dy, w_down, packed, want_h)
    return dgu, h, dy.new_empty((2 if want_db else 0, w_down.shape[1]))


# x (M, D) -> h (M, H) and gu (2, M, H), each with M = 0 if not wanted. An adapter adds t low',
# t (M, r) and low (H, r).
fwd = library.define(
    "gated_linear_fwd(Tensor x, Tensor w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up, "
    "str activation, bool want_h, bool want_gu, Tensor? t_gate=None, Tensor? t_up=None, "
    "Tensor? low_gate=None, Tensor? low_up=None) -> (Tensor, Tensor)",
    _triton.gated_linear_fwd,
    _fwd_fake,
    flops=lambda x, w_gate, w_up, *rest: (
        2 * x[0] * (prod(w_gate) + prod(w_up) + sum(prod(low) for low in rest[7:] if low))
    ),
    result="MH",
    cuda=Cuda(cuda_gated_linear.gated_linear_fwd, HOPPER_AND_NEWER, few_rows=False),
    cutlass=by_cutlass.gated_linear_fwd,
    launches=(launches.GATED_FWD, launches.GATED_FWD_ADAPTED),
)
# dy (M, D), w_down (D, H) -> with dh = dy w_down: dgu, h, and the column sums of dg and of du,
# (2, H). An adapter adds t low' to dh.
bwd = library.define(
    "gated_linear_bwd(Tensor dy, Tensor w_down, Tensor gu, str activation, str? packed, "
    "bool want_h, bool want_db, Tensor? t=None, Tensor? low=None) -> (Tensor, Tensor, Tensor)",
    _triton.gated_linear_bwd,
    _bwd_fake,
    flops=lambda dy, w_down, *rest: 2 * dy[0] * sum(map(prod, (w_down, *rest[6:]))),
    result="MH",
    cuda=Cuda(cuda_gated_linear.gated_linear_bwd, HOPPER_AND_NEWER),
    launches=(launches.GATED_BWD, launches.GATED_BWD_ADAPTED),
)


def project(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    packed: Packed | None,
    *,
    want_h: bool = True,
    want_gu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The forward op on x (M, D); halves of packed weights are handed over as views."""
    if packed:
        w_gate, w_up = halves(w_gate, packed, 0)
        if b_gate is not None:
            b_gate, b_up = halves(b_gate, packed, 0)
    return fwd(x, w_gate, w_up, b_gate, b_up, activation, want_h, want_gu)


def transposed(w: Tensor) -> bool:
    """Whether the rows of each matrix are contiguous in its columns' stead."""
    return w.stride(-2) == 1 and w.stride(-1) != 1


def weight_grad(w: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """dy' x, laid out as w is: autograd copies another layout into a parameter's own."""
    return outer(x, dy).t() if transposed(w) else outer(dy, x)


def projection_grads(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    dgu: Tensor,
    packed: Packed | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw_gate, dw_up where `needed`, from dgu; a packed weight gets one gradient by one
    GEMM."""
    need_x, need_gate, need_up = needed
    if packed:
        dx = product(dgu, w_gate.t()) if need_x else None
        return dx, weight_grad(w_gate, dgu, x) if need_gate else None, None
    assert w_up is not None
    dg, du = split_pair(dgu, None)
    dx = product(dg, w_gate.t()) if need_x else None
    if dx is not None and invariant():
        dx += product(du, w_up.t())
    elif dx is not None:
        # In place as addmm_ is, whose FLOPs PyTorch's counter leaves out.
        torch.addmm(dx, du, w_up, out=dx)
    dw_gate = weight_grad(w_gate, dg, x) if need_gate else None
    return dx, dw_gate, weight_grad(w_up, du, x) if need_up else None


class GatedLinearFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor | None,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        activation: str,
        packed: Packed | None,
    ) -> Tensor:
        h, gu = project(x, w_gate, w_up, b_gate, b_up, activation, packed, want_gu=True)
        save(ctx, (x, w_gate, w_up, b_gate, b_up), (activation, packed), gu)
        return h

    @staticmethod
    @differentiable(reference.gated_linear)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate, w_up, _, _, gu = ctx.saved_tensors
        activation, packed = ctx.options
        need_x, need_wg, need_wu, need_bg, need_bu = ctx.needs_input_grad[:5]
        g, u = split_pair(gu, None)
        dgu = gated_act.bwd(dh, g, u, activation, packed)
        dx, dw_gate, dw_up = projection_grads(
            x, w_gate, w_up, dgu, packed, (need_x, need_wg, need_wu)
        )
        if packed:
            db_gate, db_up = (dgu.sum(0) if need_bg else None), None
        else:
            db_gate = dgu[0].sum(0) if need_bg else None
            db_up = dgu[1].sum(0) if need_bu else None
        return dx, dw_gate, dw_up, db_gate, db_up, None, None


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "silu",
    packed: Packed | None = None,
) -> Tensor:
    """act(x w_gate' + b_gate) * (x w_up' + b_up).

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w_gate, w_up: (H, D) each, any strides; or, with `packed`, w_gate (2H, D) and w_up None.
        b_gate, b_up: (H,) or None each; or, with `packed`, b_gate (2H,) and b_up None.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: order of the halves of a packed weight: "gate_up" or "up_gate", one behind the
            other, or "interleaved", where rows 0, 2, 4, ... of w_gate and b_gate are gate and rows
            1, 3, 5, ... are up. No copy is made, be the weight contiguous along D or along 2H.

    Returns h (..., H) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and sum
    products in float32. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp import gated_linear
        >>> x, w_gate, w_up = torch.randn(4, 64), torch.randn(128, 64), torch.randn(128, 64)
        >>> h = gated_linear(x, w_gate, w_up, activation="silu")
        >>> expected = torch.nn.functional.silu(x @ w_gate.T) * (x @ w_up.T)
        >>> torch.allclose(h, expected, rtol=1e-3, atol=1e-3)
        True
        >>> both = torch.cat((w_gate, w_up))  # one packed weight, (256, 64)
        >>> torch.allclose(h, gated_linear(x, both, packed="gate_up"), rtol=1e-3, atol=1e-3)
        True
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w_gate, w_up, b_gate, b_up = check.cast(  # type: ignore[assignment]
            dtype, x, w_gate, w_up, b_gate, b_up
        )
    check.like_x(OP, x, ("w_gate",), w_gate=w_gate, w_up=w_up, b_gate=b_gate, b_up=b_up)
    check_projection(OP, x, w_gate, w_up, b_gate, b_up, activation, packed)
    if choice.pick(OP, x) == "reference":
        return reference.gated_linear(x, w_gate, w_up, b_gate, b_up, activation, packed)
    if check.wants_grad(x, w_gate, w_up, b_gate, b_up):
        h = GatedLinearFunction.apply(rows(x), w_gate, w_up, b_gate, b_up, activation, packed)
    else:
        h, _ = project(rows(x), w_gate, w_up, b_gate, b_up, activation, packed)
    return unrows(h, x)


register(
    Op(
        OP,
        gated_linear,
        reference.gated_linear,
        forward=(kernel(fwd),),
        backward=(kernel(gated_act.bwd),),
        flops=rows_times("w_gate", "w_up"),
    )
)
