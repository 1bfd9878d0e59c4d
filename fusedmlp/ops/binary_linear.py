"""y = x w' + b, w in one bit a weight: y_n = sum_G s_nG (2 sum_{b = 1} x - sum x) over groups G of
128 inputs.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w | (H, D) | BinaryWeight: +-scale, a sign a weight and a scale for 128 of a row |
| b | (H,) | |
| y | (..., H) | |

dtype: one floating dtype for x and b, kept; scales have their own. Products accumulate in float32.
For few rows each group's product with the signs is scaled in float32; for many, scales are rounded
to x's dtype first, as in a weight that was dequantised. Saved for backward: x, where scales have a
gradient; signs have none.

| backward | by |
|---|---|
| dx = dy w | binary_linear_dx |
| dscales_nG = sum over G of sign (dy' x) | binary_linear_ds |
| db = sum dy | PyTorch |

Source: Q1_0 of llama.cpp and Bonsai (see fusedmlp/weights/binary.py), here with x in 16 bits.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import binary as cpu
from ..backends.cuda import binary as cuda_binary
from ..backends.derivatives import differentiable, save
from ..backends.op import ONE_BIT, Cuda, Op, kernel, register
from ..kernels.binary import binary_linear as _triton
from ..kernels.later import Later
from ..kernels.launches import binary as launches
from ..packing import rows, unrows
from ..weights.binary import BinaryWeight

OP = "binary_linear"
_triton_bwd = Later("binary.backward")


def check_weight(op: str, name: str, w: BinaryWeight, device: torch.device) -> tuple[int, int]:
    """`w` is a BinaryWeight on x's device. Returns its shape."""
    if not isinstance(w, BinaryWeight):
        raise TypeError(
            f"{op}: {name} must be a BinaryWeight, got {type(w).__name__}; "
            "fusedmlp.quantize_binary(w) makes one of a matrix"
        )
    if w.qweight.device != device:
        raise ValueError(f"{op}: {name} must be on x's device {device}, got {w.qweight.device}")
    return w.shape


def planes(*weights: BinaryWeight) -> tuple[Tensor, ...]:
    """Words and scales of each."""
    return tuple(t for w in weights for t in (w.qweight, w.scales))


def _fwd_fake(x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None) -> Tensor:
    return _triton.binary_linear_result(x, qweight)


def _dx_fake(
    dy1: Tensor,
    q1: Tensor,
    s1: Tensor,
    dy2: Tensor | None,
    q2: Tensor | None,
    s2: Tensor | None,
    D: int,
) -> Tensor:
    return dy1.new_empty((dy1.shape[0], D))


def _ds_fake(dy: Tensor, x: Tensor, qweight: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((qweight.shape[0], qweight.shape[1] // 4), dtype=dtype)


# x (M, D) -> y (M, H).
fwd = library.define(
    "binary_linear_fwd(Tensor x, Tensor qweight, Tensor scales, Tensor? b) -> Tensor",
    _triton.binary_linear_fwd,
    _fwd_fake,
    flops=lambda x, qweight, *_: 2 * prod(x) * qweight[0],
    result="MH",
    cuda=Cuda(cuda_binary.binary_linear_fwd, decodes=True),
    launches=(launches.FWD,),
)
# dy1, dy2 (M, H), the second or None -> dx = dy1 w1 + dy2 w2 (M, D).
dx = library.define(
    "binary_linear_dx(Tensor dy1, Tensor q1, Tensor s1, Tensor? dy2, Tensor? q2, Tensor? s2, "
    "SymInt D) -> Tensor",
    _triton_bwd.binary_linear_dx,
    _dx_fake,
    flops=lambda dy1, q1, s1, dy2, q2, s2, D: 2 * prod(dy1) * D * (1 if dy2 is None else 2),
    result="MD",
    launches=(launches.DX,),
)
# dy (M, H), x (M, D) -> the gradient of the scales (H, G) in `dtype`.
ds = library.define(
    "binary_linear_ds(Tensor dy, Tensor x, Tensor qweight, ScalarType dtype) -> Tensor",
    _triton_bwd.binary_linear_ds,
    _ds_fake,
    flops=lambda dy, x, *_: 2 * prod(dy) * x[1],
    result="HD",
    launches=(launches.DS,),
)


class BinaryLinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None) -> Tensor:
        need_x, _, need_s, _ = ctx.needs_input_grad
        save(ctx, (x if need_s or not need_x else None, qweight, scales, b), ())
        ctx.width = x.shape[1]
        return fwd(x, qweight, scales, b)

    @staticmethod
    # Linear in x: any of its shape will do.
    @differentiable(reference.binary_linear, lambda ctx, dy: dy.new_zeros(dy.shape[0], ctx.width))
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, qweight, scales, _ = ctx.saved_tensors
        need_x, _, need_s, need_b = ctx.needs_input_grad
        return (
            dx(dy, qweight, scales, None, None, None, ctx.width) if need_x else None,
            None,
            ds(dy, x, qweight, scales.dtype) if need_s else None,
            dy.sum(0) if need_b else None,
        )


def binary_linear(x: Tensor, w: BinaryWeight, b: Tensor | None = None) -> Tensor:
    """x w' + b over one-bit weights.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w: (H, D); `quantize_binary` makes one. Its signs are frozen, its scales get a gradient if
            they require one.
        b: (H,).

    Returns y (..., H) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device) or TypeError (dtype, type), naming the argument.

    x and b have one floating dtype, scales their own; the kernels take bfloat16, float16 and
    float32 and sum products in float32. Source: Q1_0 of llama.cpp and Bonsai.

    Examples:
        >>> import torch
        >>> from fusedmlp import binary_linear, quantize_binary
        >>> x, w = torch.randn(4, 256), quantize_binary(torch.randn(64, 256))
        >>> y = binary_linear(x, w)
        >>> torch.allclose(y, x @ w.dequantize(torch.float32).T, rtol=1e-3, atol=1e-3)
        True
    """
    if dtype := check.autocast_dtype(OP, x):
        x, b = check.cast(dtype, x, b)  # type: ignore[assignment]
    check.like_x(OP, x, b=b)
    H, D = check_weight(OP, "w", w, x.device)
    check.columns(OP, "x", x, w.shape, "D", "w")
    if b is not None:
        check.shape(OP, "b", b, H)
    if choice.pick(OP, x) == "reference":
        return cpu.binary_linear(x, w.qweight, w.scales, b)
    apply = BinaryLinearFunction.apply if check.wants_grad(x, w.scales, b) else fwd
    y = apply(rows(x), *planes(w), b)
    return unrows(y, x)


register(
    Op(
        OP,
        binary_linear,
        reference.binary_linear,
        forward=(kernel(fwd),),
        backward=(kernel(dx), kernel(ds)),
        flops=lambda shapes: 2 * prod(shapes["x"]) * shapes["q_weight"][0],
        own_bytes=ONE_BIT,
    )
)
