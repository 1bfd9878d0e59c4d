"""h = act(x w' + b): the first half of a plain MLP, activated in registers.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w | (H, D) | any strides |
| b | (H,) | |
| h | (..., H) | |

dtype: one floating dtype for all, kept; products accumulate in float32. Saved for backward: x, w
and the pre-activation z = x w' + b. Backward of this op alone: dz = dh * act'(z) elementwise, then
dx = dz w, dw = dz' x by cuBLAS, each only if its gradient is wanted.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cuda import gated_linear as cuda_gated_linear
from ..backends.cutlass import dense as by_cutlass
from ..backends.derivatives import differentiable, save
from ..backends.flops import no_products, rows_times
from ..backends.op import HOPPER_AND_NEWER, Cuda, Op, kernel, register
from ..invariance import STATE
from ..kernels.dense import linear_act as _triton
from ..kernels.launches import dense as launches
from ..packing import rows, unrows

OP = "linear_act"


def check_projection(
    op: str, x: Tensor, w_name: str, w: Tensor, b_name: str, b: Tensor | None, activation: str
) -> int:
    """The shape rule of x, w, b, for this op and for whole blocks. Returns H."""
    check.activation(op, activation, gated=False)
    H, D = check.matrix(op, w_name, w, "(H, D)")
    check.columns(op, "x", x, w.shape, "D", w_name)
    if b is not None:
        check.shape(op, b_name, b, H)
    return H


def _fwd_fake(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    want_h: bool,
    want_z: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _triton.linear_act_results(x, w, want_h, want_z)


def _bwd_fake(
    dy: Tensor,
    w_out: Tensor,
    z: Tensor,
    activation: str,
    want_h: bool,
    want_db: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dz, h = _triton.linear_act_grads(dy, w_out, want_h)
    return dz, h, dy.new_empty((1 if want_db else 0, w_out.shape[1]))


def _dz_fake(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    return dh.new_empty(dh.shape)


def _h_fake(z: Tensor, activation: str) -> Tensor:
    return z.new_empty(z.shape)


# x (M, D) -> h (M, H) and z (M, H), each with M = 0 if not wanted.
fwd = library.define(
    "linear_act_fwd(Tensor x, Tensor w, Tensor? b, str activation, bool want_h, bool want_z, "
    "Tensor? t=None, Tensor? low=None) -> (Tensor, Tensor)",
    _triton.linear_act_fwd,
    _fwd_fake,
    flops=lambda x, w, *rest: 2 * x[0] * sum(map(prod, (w, *rest[5:]))),
    result="MH",
    cuda=Cuda(cuda_gated_linear.linear_act_fwd, HOPPER_AND_NEWER, few_rows=False),
    cutlass=by_cutlass.linear_act_fwd,
    launches=(launches.PLAIN_FWD, launches.PLAIN_FWD_ADAPTED),
)
# dy (M, D), w_out (D, H) -> with dh = dy w_out: dz, h and the column sums of dz (1, H).
bwd = library.define(
    "linear_act_bwd(Tensor dy, Tensor w_out, Tensor z, str activation, bool want_h, bool want_db, "
    "Tensor? t=None, Tensor? low=None) -> (Tensor, Tensor, Tensor)",
    _triton.linear_act_bwd,
    _bwd_fake,
    flops=lambda dy, w_out, *rest: 2 * dy[0] * sum(map(prod, (w_out, *rest[5:]))),
    result="MH",
    cuda=Cuda(cuda_gated_linear.linear_act_bwd, HOPPER_AND_NEWER),
    launches=(launches.PLAIN_BWD, launches.PLAIN_BWD_ADAPTED),
)
# Elementwise: dz from dh when there is no GEMM to fuse it into, h from z.
dz = library.define(
    "linear_act_dz(Tensor dh, Tensor z, str activation) -> Tensor",
    _triton.linear_act_dz,
    _dz_fake,
    flops=no_products,
    launches=(launches.PLAIN_DZ,),
)
act = library.define(
    "linear_act_h(Tensor z, str activation) -> Tensor",
    _triton.linear_act_h,
    _h_fake,
    flops=no_products,
    launches=(launches.PLAIN_H,),
)


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w' + b by cuBLAS; inside batch_invariant() by the forward's kernel."""
    return fwd(x, w, b, "identity", True, False)[0] if STATE.on else F.linear(x, w, b)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a' b, the sum over all rows, likewise. The kernel loads fast where rows are a multiple of 8,
    and the left operand along its rows."""
    if not STATE.on:
        return a.t() @ b
    if more := -a.shape[0] % 8:
        a, b = (F.pad(t, (0, 0, 0, more)) for t in (a, b))
    return product(a.t().contiguous(), b.t())


class LinearActFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
        h, z = fwd(x, w, b, activation, True, True)
        save(ctx, (x, w, b), (activation,), z)
        return h

    @staticmethod
    @differentiable(reference.linear_act)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, w, _, z = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dz_ = dz(dh, z, *ctx.options)
        dx = product(dz_, w.t()) if need_x else None
        return dx, outer(dz_, x) if need_w else None, dz_.sum(0) if need_b else None, None


def linear_act(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, activation: str = "gelu"
) -> Tensor:
    """act(x w' + b).

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w: (H, D), any strides.
        b: (H,) or None.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "elu(alpha=0.5)", but no gate: docs/gates.md.

    Returns h (..., H) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and sum
    products in float32.

    Examples:
        >>> import torch
        >>> from fusedmlp import linear_act
        >>> x, w, b = torch.randn(4, 64), torch.randn(128, 64), torch.randn(128)
        >>> h = linear_act(x, w, b, activation="relu")
        >>> torch.allclose(h, torch.relu(x @ w.T + b), rtol=1e-3, atol=1e-3)
        True
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w, b = check.cast(dtype, x, w, b)  # type: ignore[assignment]
    check.like_x(OP, x, ("w",), w=w, b=b)
    check_projection(OP, x, "w", w, "b", b, activation)
    if choice.pick(OP, x) == "reference":
        return reference.linear_act(x, w, b, activation)
    if check.wants_grad(x, w, b):
        h = LinearActFunction.apply(rows(x), w, b, activation)
    else:
        h, _ = fwd(rows(x), w, b, activation, True, False)
    return unrows(h, x)


register(
    Op(
        OP,
        linear_act,
        reference.linear_act,
        forward=(kernel(fwd),),
        backward=(kernel(dz),),
        flops=rows_times("w"),
    )
)
