"""h = sum_i act(x (m_i * w)') * (x ((1 - m_i) * w)'): a gated linear whose gate and value share one
weight, told apart by binary masks over its elements (MGLU; FlashMGLU).

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w | (H, D) | any strides |
| masks | (n_m, H, D) | logits, n_m from 1 to 16: m_i = 1 where masks[i] > 0; or PackedMasks |
| h | (..., H) | |

dtype: one floating dtype for x and w, kept; logits may have another, their sign is all that counts.
Products accumulate in float32; with t = x w' and g_i = x (m_i * w)' the complement is t - g_i,
there. Forward: the logits become bit planes, n_m bits a weight, then one pass over x and w. Saved
for backward: x, w, the planes, t and g_i.

| backward | by |
|---|---|
| dv_i = dh act(g_i), e_i = dh act'(g_i) (t - g_i) - dv_i, V = sum dv_i | masked_gated_linear_ev |
| dx = V w + sum e_i (m_i * w) | masked_gated_linear_dx |
| G_i = e_i' x, dw = V' x + sum m_i * G_i, dmasks_i = w * G_i | masked_gated_linear_dw |

A logit's gradient is that of its mask, straight through. Source: Tajima et al., Masked Gated Linear
Unit, arXiv 2506.23225, equations 2 and 3 and algorithm 2.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import remade
from ..backends.cuda import masked as cuda_masked
from ..backends.derivatives import differentiable, save
from ..backends.flops import Shapes, no_products, rows_times
from ..backends.op import BIT_PLANES, Cuda, Op, kernel, register
from ..kernels.later import Later
from ..kernels.launches import masked as launches
from ..kernels.masked import masked_gated_linear as _triton
from ..packing import rows, unrows
from ..weights.masks import PackedMasks, check_logits, pack

OP = "masked_gated_linear"
_triton_bwd = Later("masked.backward")


def check_projection(
    op: str, x: Tensor, w: Tensor, masks: Tensor | PackedMasks, activation: str, packed: None
) -> int:
    """The shape rule of x, w and masks, for this op and for whole blocks. Returns H."""
    check.activation(op, activation)
    check.apart(op, packed, "one weight w (H, D) is gate and up, and masks tell them apart")
    H, D = check.matrix(op, "w", w, "(H, D)")
    check.columns(op, "x", x, w.shape, "D", "w")
    if not isinstance(masks, PackedMasks):
        check_logits(op, "masks", masks)
    n_m, *size = masks.shape
    if size != [H, D]:
        hint = check.transposed("masks", size, (H, D))
        raise ValueError(
            f"{op}: masks must be {(n_m, H, D)}: of w's shape, got {(n_m, *size)}{hint}"
        )
    if (device := tensor_of(masks).device) != x.device:
        raise ValueError(f"{op}: masks must be on x's device {x.device}, got {device}")
    return H


def _fwd_fake(
    x: Tensor, w: Tensor, planes: Tensor, activation: str, want_h: bool, want_gt: bool
) -> tuple[Tensor, Tensor]:
    return _triton.masked_gated_linear_results(x, w, planes, want_h, want_gt)


def _ev_fake(dh: Tensor, gt: Tensor, activation: str, want_h: bool) -> tuple[Tensor, Tensor]:
    return _triton_bwd.masked_gated_linear_ev_results(gt, want_h)


def _dx_fake(ev: Tensor, w: Tensor, planes: Tensor) -> Tensor:
    return ev.new_empty((ev.shape[1], w.shape[1]))


def _dw_fake(
    ev: Tensor,
    x: Tensor,
    w: Tensor,
    planes: Tensor,
    want_dw: bool,
    want_dmasks: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _triton_bwd.masked_gated_linear_dw_results(w, planes, want_dw, want_dmasks, dtype)


# x (M, D), planes (H, ceil(D / 8), n_m) -> h (M, H) and t, g_1, .. as gt (1 + n_m, M, H), each with
# M = 0 if not wanted.
fwd = library.define(
    "masked_gated_linear_fwd(Tensor x, Tensor w, Tensor planes, str activation, bool want_h, "
    "bool want_gt) -> (Tensor, Tensor)",
    _triton.masked_gated_linear_fwd,
    _fwd_fake,
    flops=lambda x, w, planes, *_: 2 * (1 + planes[2]) * x[0] * prod(w),
    result="MH",
    cuda=Cuda(cuda_masked.masked_gated_linear_fwd, decodes=True),
    launches=(
        launches.ONE,
        launches.GROUP,
    ),
)
# dh (M, H) -> V, e_1, .. as ev (1 + n_m, M, H), and h (M, H) again, with M = 0 if not wanted.
ev = library.define(
    "masked_gated_linear_ev(Tensor dh, Tensor gt, str activation, bool want_h) -> (Tensor, Tensor)",
    _triton_bwd.masked_gated_linear_ev,
    _ev_fake,
    flops=no_products,
    launches=(launches.EV,),
)
dx = library.define(
    "masked_gated_linear_dx(Tensor ev, Tensor w, Tensor planes) -> Tensor",
    _triton_bwd.masked_gated_linear_dx,
    _dx_fake,
    flops=lambda ev, w, planes: 2 * prod(ev[:2]) * prod(w),
    result="MD",
    launches=(launches.DX,),
)
# -> dw (H, D) and dmasks (n_m, H, D) in `dtype`, each with no rows if not wanted.
dw = library.define(
    "masked_gated_linear_dw(Tensor ev, Tensor x, Tensor w, Tensor planes, bool want_dw, "
    "bool want_dmasks, ScalarType dtype) -> (Tensor, Tensor)",
    _triton_bwd.masked_gated_linear_dw,
    _dw_fake,
    flops=lambda ev, x, w, planes, want_dw, *_: 2 * (ev[0] - 1 + want_dw) * x[0] * prod(w),
    result="HD",
    launches=(launches.DW,),
)


def tensor_of(masks: Tensor | PackedMasks) -> Tensor:
    """Logits, or bit planes."""
    return masks.planes if isinstance(masks, PackedMasks) else masks


def unpacked(masks: Tensor | PackedMasks) -> Tensor:
    """Logits, or bool masks."""
    return masks.unpack() if isinstance(masks, PackedMasks) else masks


def planes_of(masks: Tensor) -> Tensor:
    """Bit planes of logits; planes as they are."""
    return pack(masks) if masks.is_floating_point() else masks


def projection_grads(
    evs: Tensor,
    x: Tensor,
    w: Tensor,
    planes: Tensor,
    masks_dtype: torch.dtype,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw, dmasks where `needed`, from V and e_i."""
    need_x, need_w, need_masks = needed
    grad_x = dx(evs, w, planes) if need_x else None
    if not (need_w or need_masks):
        return grad_x, None, None
    grad_w, grad_masks = dw(evs, x, w, planes, need_w, need_masks, masks_dtype)
    return grad_x, grad_w if need_w else None, grad_masks if need_masks else None


def masks_of(masks: Tensor, w: Tensor) -> Tensor:
    """Logits as they are; of bit planes, the bool masks."""
    return masks if masks.is_floating_point() else reference.unpack_masks(masks, w.shape[1])


def _formula(x: Tensor, w: Tensor, masks: Tensor, activation: str) -> Tensor:
    return reference.masked_gated_linear(x, w, masks_of(masks, w), activation)


class MaskedGatedLinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, masks: Tensor, activation: str) -> Tensor:
        planes = planes_of(masks)
        h, gt = fwd(x, w, planes, activation, True, True)
        save(ctx, (x, w, masks), (activation,), planes, gt)
        return h

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, w, masks, planes, gt = ctx.saved_tensors
        evs, _ = ev(dh, gt, *ctx.options, False)
        needed = ctx.needs_input_grad[:3]
        return *projection_grads(evs, x, w, planes, masks.dtype, needed), None


def masked_gated_linear(
    x: Tensor,
    w: Tensor,
    masks: Tensor | PackedMasks,
    *,
    activation: str = "silu",
    packed: None = None,
) -> Tensor:
    """sum_i act(x (m_i * w)') * (x ((1 - m_i) * w)').

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w: (H, D), any strides.
        masks: logits (n_m, H, D), n_m from 1 to 16, of any floating dtype, which autocast leaves:
            mask i is 1 where masks[i] > 0, and its gradient is the logit's. Or PackedMasks, which
            have none and are read as they are; logits are packed in every call.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: None. One weight is gate and up, so that a packed order is refused.

    Returns h (..., H) in x's dtype (under autocast: the autocast dtype). A logit that is NaN counts
    as 0 in the kernels and is NaN in the reference; `pack_masks` refuses it.

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    x and w have one floating dtype; the kernels take bfloat16, float16 and float32 and sum products
    in float32. Source: Tajima et al., Masked Gated Linear Unit, arXiv 2506.23225.

    Examples:
        >>> import torch
        >>> from fusedmlp import masked_gated_linear, pack_masks
        >>> x, w = torch.randn(4, 64), torch.randn(128, 64)
        >>> logits = torch.randn(2, 128, 64)  # two masks
        >>> h = masked_gated_linear(x, w, logits, activation="silu")
        >>> torch.equal(h, masked_gated_linear(x, w, pack_masks(logits)))
        True
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w = check.cast(dtype, x, w)  # type: ignore[assignment]
    check.like_x(OP, x, ("w",), w=w)
    check_projection(OP, x, w, masks, activation, packed)
    if choice.pick(OP, x) == "reference":
        if remade.keeps_less(x, w, tensor_of(masks)):
            return remade.masked_gated_mlp(x, w, tensor_of(masks), None, None, activation)
        return reference.masked_gated_linear(x, w, unpacked(masks), activation)
    tensor = tensor_of(masks)
    if check.wants_grad(x, w, tensor):
        h = MaskedGatedLinearFunction.apply(rows(x), w, tensor, activation)
    else:
        h, _ = fwd(rows(x), w, planes_of(tensor), activation, True, False)
    return unrows(h, x)


def projection_flops(shapes: Shapes) -> int:
    """The value is the total less the gate, so n_m masks cost n_m + 1 products."""
    w, masks = tuple(shapes["w"]), tuple(shapes["masks"])
    n_m = masks[0] if masks[1:] == w else masks[2]  # of logits, or of bit planes
    return (1 + n_m) * rows_times("w")(shapes)


register(
    Op(
        OP,
        masked_gated_linear,
        reference.masked_gated_linear,
        forward=(kernel(pack), kernel(fwd)),
        backward=(kernel(ev), kernel(dx), kernel(dw)),
        flops=projection_flops,
        own_bytes=BIT_PLANES,
    )
)
