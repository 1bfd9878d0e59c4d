"""h = act(g) * u with g = x w_gate' + b_gate and u = x w_up' + b_up, both weights in one bit each:
one pass over x, h made in registers.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w_gate, w_up | (H, D) | BinaryWeight each |
| b_gate, b_up | (H,) | either, both or neither |
| h | (..., H) | |

dtype: one floating dtype for x and the biases, kept; scales have their own; products accumulate in
float32. Saved for backward: g and u, and x where scales have a gradient. Backward: dg, du from dh,
g, u (the gated_act kernel), then dx = dg w_gate + du w_up in one kernel, and the scales' gradients.
Sources: Shazeer, GLU Variants, arXiv 2002.05202; Q1_0 of llama.cpp and Bonsai.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import binary as cpu
from ..backends.cuda import binary as cuda_binary
from ..backends.derivatives import differentiable, save
from ..backends.flops import Shapes
from ..backends.op import ONE_BIT, Cuda, Op, kernel, register
from ..kernels.binary import binary_gated_linear as _triton
from ..kernels.launches import binary as launches
from ..packing import empty_gated, rows, split_pair, unrows
from ..weights.binary import BinaryWeight
from . import binary_linear, gated_act
from .binary_linear import planes

OP = "binary_gated_linear"


def check_projection(
    op: str,
    x: Tensor,
    w_gate: BinaryWeight,
    w_up: BinaryWeight,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    packed: None,
) -> int:
    """The shape rule of gate and up, for this op and for whole blocks. Returns H."""
    check.activation(op, activation)
    check.apart(op, packed, "quantize gate and up apart: w_gate and w_up are (H, D) each")
    H, D = binary_linear.check_weight(op, "w_gate", w_gate, x.device)
    check.columns(op, "x", x, w_gate.shape, "D", "w_gate")
    if binary_linear.check_weight(op, "w_up", w_up, x.device) != (H, D):
        hint = check.transposed("w_up", w_up.shape, (H, D))
        raise ValueError(f"{op}: w_up must have shape {(H, D)}, got {w_up.shape}{hint}")
    for name, b in (("b_gate", b_gate), ("b_up", b_up)):
        if b is not None:
            check.shape(op, name, b, H)
    return H


def _fwd_fake(
    x: Tensor,
    q_gate: Tensor,
    s_gate: Tensor,
    q_up: Tensor,
    s_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    want_h: bool,
    want_gu: bool,
) -> tuple[Tensor, Tensor]:
    return empty_gated(x, x.shape[0], q_gate.shape[0], want_h, want_gu)


# x (M, D) -> h (M, H) and gu (2, M, H), each with M = 0 if not wanted.
fwd = library.define(
    "binary_gated_linear_fwd(Tensor x, Tensor q_gate, Tensor s_gate, Tensor q_up, Tensor s_up, "
    "Tensor? b_gate, Tensor? b_up, str activation, bool want_h, bool want_gu) -> (Tensor, Tensor)",
    _triton.binary_gated_linear_fwd,
    _fwd_fake,
    flops=lambda x, q_gate, s_gate, q_up, *_: 2 * prod(x) * (q_gate[0] + q_up[0]),
    result="MH",
    cuda=Cuda(cuda_binary.binary_gated_linear_fwd, decodes=True),
    launches=(launches.GATED,),
)


def projection_grads(
    x: Tensor | None,
    weights: tuple[Tensor, ...],
    dgu: Tensor,
    width: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, ds_gate, ds_up where `needed`, from dg and du. weights: q_gate, s_gate, q_up, s_up."""
    q_gate, s_gate, q_up, s_up = weights
    need_x, need_gate, need_up = needed
    dg, du = split_pair(dgu, None)
    return (
        binary_linear.dx(dg, q_gate, s_gate, du, q_up, s_up, width) if need_x else None,
        binary_linear.ds(dg, x, q_gate, s_gate.dtype) if need_gate else None,
        binary_linear.ds(du, x, q_up, s_up.dtype) if need_up else None,
    )


class BinaryGatedLinearFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q_gate: Tensor,
        s_gate: Tensor,
        q_up: Tensor,
        s_up: Tensor,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        activation: str,
    ) -> Tensor:
        weights = (q_gate, s_gate, q_up, s_up)
        h, gu = fwd(x, *weights, b_gate, b_up, activation, True, True)
        need_x, _, need_sg, _, need_su = ctx.needs_input_grad[:5]
        kept = x if need_sg or need_su or not need_x else None
        save(ctx, (kept, *weights, b_gate, b_up), (activation,), gu)
        ctx.width = x.shape[1]
        return h

    @staticmethod
    @differentiable(reference.binary_gated_linear)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, _, _, gu = ctx.saved_tensors
        need_x, _, need_sg, _, need_su, need_bg, need_bu = ctx.needs_input_grad[:7]
        dgu = gated_act.bwd(dh, *split_pair(gu, None), *ctx.options, None)
        needed = (need_x, need_sg, need_su)
        dx, ds_gate, ds_up = projection_grads(x, tuple(weights), dgu, ctx.width, needed)
        db_gate = dgu[0].sum(0) if need_bg else None
        db_up = dgu[1].sum(0) if need_bu else None
        return dx, None, ds_gate, None, ds_up, db_gate, db_up, None


def binary_gated_linear(
    x: Tensor,
    w_gate: BinaryWeight,
    w_up: BinaryWeight,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "silu",
    packed: None = None,
) -> Tensor:
    """act(x w_gate' + b_gate) * (x w_up' + b_up) over one-bit weights.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w_gate, w_up: (H, D) each. Signs are frozen, scales get a gradient if they require one.
        b_gate, b_up: (H,) or None each.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: None. One-bit gate and up are two weights, so that a packed order is refused.

    Returns h (..., H) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype, type), naming the
    argument.

    x and the biases have one floating dtype, scales their own; the kernels take bfloat16, float16
    and float32 and sum products in float32. Source: Q1_0 of llama.cpp and Bonsai.

    Examples:
        >>> import torch
        >>> from fusedmlp import binary_gated_linear, quantize_binary
        >>> w_gate, w_up = (quantize_binary(torch.randn(256, 128)) for _ in range(2))
        >>> binary_gated_linear(torch.randn(4, 128), w_gate, w_up, activation="silu").shape
        torch.Size([4, 256])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, b_gate, b_up = check.cast(dtype, x, b_gate, b_up)  # type: ignore[assignment]
    check.like_x(OP, x, b_gate=b_gate, b_up=b_up)
    check_projection(OP, x, w_gate, w_up, b_gate, b_up, activation, packed)
    tensors = (*planes(w_gate, w_up), b_gate, b_up)
    if choice.pick(OP, x) == "reference":
        arguments: tuple[Any, ...] = (x, *tensors, activation)
        return cpu.binary_gated_linear(*arguments)
    if check.wants_grad(x, *tensors):
        h = BinaryGatedLinearFunction.apply(rows(x), *tensors, activation)
    else:
        h, _ = fwd(rows(x), *tensors, activation, True, False)
    return unrows(h, x)


def projection_flops(shapes: Shapes) -> int:
    return 2 * prod(shapes["x"]) * (shapes["q_gate"][0] + shapes["q_up"][0])


register(
    Op(
        OP,
        binary_gated_linear,
        reference.binary_gated_linear,
        forward=(kernel(fwd),),
        backward=(kernel(gated_act.bwd), kernel(binary_linear.dx), kernel(binary_linear.ds)),
        flops=projection_flops,
        own_bytes=ONE_BIT,
    )
)
