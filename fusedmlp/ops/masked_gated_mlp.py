"""y = masked_gated_linear(x) Wd' + bd: a whole masked gated block, forward and backward.

| tensor | shape | |
|---|---|---|
| x, y | (..., D) | flattened to (M, D) |
| w | (H, D) | |
| masks | (n_m, H, D) | logits, or PackedMasks |
| w_down, b_down | (D_out, H), (D_out,) | |

dtype: one floating dtype for all, kept; logits may have another. Memory plan: saves x, the weights,
the bit planes, t and g_i (1 + n_m tensors like h); h is made again beside V and e_i. With
recompute=True it saves x, the weights and the planes alone. With adapters the block is
_adapted.py's.

| step | computes | by |
|---|---|---|
| forward | h (and t, g_i) | masked_gated_linear |
| | y = h Wd' + bd | cuBLAS |
| backward | dh = dy Wd | cuBLAS |
| | V, e_i, h | masked_gated_linear_ev |
| | dWd = dy' h, dbd = sum dy | cuBLAS |
| | dx; dw and dmasks | masked_gated_linear_dx, masked_gated_linear_dw |

Source: Tajima et al., Masked Gated Linear Unit, arXiv 2506.23225.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice
from ..backends.cpu import remade
from ..backends.derivatives import by_reference, differentiable, save
from ..backends.flops import lora_names, rows_times
from ..backends.op import BIT_PLANES, OPS, Op, register
from ..check import lora as adapters
from ..packing import rows, unrows
from ..reference.lora import Lora
from ..weights.masks import PackedMasks
from . import _adapted, masked_gated_linear
from .linear_act import outer, product

OP = "masked_gated_mlp"


def _formula(x: Tensor, w: Tensor, masks: Tensor, *rest: Any) -> Tensor:
    return reference.masked_gated_mlp(x, w, masked_gated_linear.masks_of(masks, w), *rest)


class MaskedGatedMLPFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        masks: Tensor,
        w_down: Tensor,
        b_down: Tensor | None,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        planes = masked_gated_linear.planes_of(masks)
        h, gt = masked_gated_linear.fwd(x, w, planes, activation, True, not recompute)
        inputs = (x, w, masks, w_down, b_down)
        save(ctx, inputs, (activation,), planes, None if recompute else gt)
        return product(h, w_down, b_down)

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, masks, w_down, _, planes, gt = ctx.saved_tensors
        (activation,) = ctx.options
        need_x, need_w, need_masks, need_wd, need_bd = ctx.needs_input_grad[:5]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        dw_down = None
        if need_x or need_w or need_masks or need_wd:
            if gt is None:
                _, gt = masked_gated_linear.fwd(x, w, planes, activation, False, True)
            evs, h = masked_gated_linear.ev(product(dy, w_down.t()), gt, activation, need_wd)
            dw_down = outer(dy, h) if need_wd else None
            grads = masked_gated_linear.projection_grads(
                evs, x, w, planes, masks.dtype, (need_x, need_w, need_masks)
            )
        return *grads, dw_down, dy.sum(0) if need_bd else None, None, None


def masked_gated_mlp(
    x: Tensor,
    w: Tensor,
    masks: Tensor | PackedMasks,
    w_down: Tensor,
    b_down: Tensor | None = None,
    *,
    activation: str = "silu",
    packed: None = None,
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """(sum_i act(x (m_i * w)') * (x ((1 - m_i) * w)')) w_down' + b_down.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w: (H, D), any strides.
        masks: logits (n_m, H, D), n_m from 1 to 16, of any floating dtype, which autocast leaves:
            mask i is 1 where masks[i] > 0, and its gradient is the logit's. Or PackedMasks, which
            have none.
        w_down: (D_out, H), any strides.
        b_down: (D_out,).
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: None. One weight is gate and up, so that a packed order is refused.
        recompute: save x alone for backward and run the first product again there: (1 + n_m) M H
            values less, 2 (1 + n_m) M D H FLOPs more.
        lora: `Lora(gate=, up=, down=)`: scale b (a x) is added to the first product of every mask
            by gate, to the second by up, and to the result by down; the masks stay as they are.
            With `recompute` the whole forward runs again.

    Returns y (..., D_out) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    x and the weights have one floating dtype; the kernels take bfloat16, float16 and float32 and
    sum products in float32. Source: Tajima et al., Masked Gated Linear Unit, arXiv 2506.23225.

    Examples:
        >>> import torch
        >>> from fusedmlp import masked_gated_mlp
        >>> x, w, w_down = torch.randn(4, 64), torch.randn(128, 64), torch.randn(64, 128)
        >>> logits = torch.randn(1, 128, 64, requires_grad=True)
        >>> masked_gated_mlp(x, w, logits, w_down).sum().backward()
        >>> logits.grad.shape
        torch.Size([1, 128, 64])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w, w_down, b_down = check.cast(dtype, x, w, w_down, b_down)  # type: ignore[assignment]
        lora = None if lora is None else adapters.cast(dtype, lora)
    check.like_x(OP, x, ("w", "w_down"), w=w, w_down=w_down, b_down=b_down)
    H = masked_gated_linear.check_projection(OP, x, w, masks, activation, packed)
    check.down(OP, "w_down", w_down, H, "b_down", b_down)
    if lora is not None:
        first, last = (H, x.shape[-1]), (w_down.shape[0], H)
        adapters.check(OP, x, lora, {"gate": first, "up": first, "down": last})
    if choice.pick(OP, x) == "reference":
        held = (x, w, masked_gated_linear.tensor_of(masks), w_down, b_down)
        if lora is None and not recompute and remade.keeps_less(*held):
            return remade.masked_gated_mlp(*held, activation)
        plain = (x, w, masked_gated_linear.unpacked(masks), w_down, b_down)
        again = recompute and check.wants_grad(*plain, *adapters.tensors_of(lora))
        return by_reference(reference.masked_gated_mlp, *plain, activation, lora, recompute=again)
    tensors = (rows(x), w, masked_gated_linear.tensor_of(masks), w_down, b_down)
    if lora is not None:
        _adapted.check_mode(OP)
        again = recompute and check.wants_grad(*tensors, *adapters.tensors_of(lora))
        y = by_reference(_adapted.masked, *tensors, activation, lora, recompute=again)
    elif check.wants_grad(*tensors):
        y = MaskedGatedMLPFunction.apply(*tensors, activation, recompute)
    else:
        planes = masked_gated_linear.planes_of(tensors[2])
        h, _ = masked_gated_linear.fwd(tensors[0], w, planes, activation, True, False)
        y = product(h, w_down, b_down)
    return unrows(y, x)


_rest = rows_times("w_down", *lora_names("gate", "up", "down"))
register(
    Op(
        OP,
        masked_gated_mlp,
        reference.masked_gated_mlp,
        forward=OPS[masked_gated_linear.OP].forward,
        backward=OPS[masked_gated_linear.OP].backward,
        flops=lambda s: masked_gated_linear.projection_flops(s) + _rest(s),
        remade=masked_gated_linear.projection_flops,
        own_bytes=BIT_PLANES,
    )
)
