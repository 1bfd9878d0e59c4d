"""y = act(x Wi' + bi) Wo' + bo: a whole plain block, forward and backward.

| tensor | shape | |
|---|---|---|
| x | (..., D) | flattened to (M, D) |
| w_in, b_in | (H, D), (H,) | |
| w_out, b_out | (D_out, H), (D_out,) | |
| y | (..., D_out) | |

dtype: one floating dtype for all, kept. Memory plan: saves x, the weights and z = x Wi' + bi;
h = act(z) is made again in the epilogue of the dh GEMM. With recompute=True it saves x and the
weights alone. Backward: dh = dy Wo in registers -> dz, h, sum dz (linear_act_bwd);
dWo = dy' h, dx = dz Wi, dWi = dz' x by cuBLAS, each only if its gradient is wanted.
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
from ..backends.op import Op, kernel, register
from ..check import lora as adapters
from ..packing import rows, unrows
from ..reference.lora import Lora
from . import linear_act
from ._lora import adapted_block

OP = "mlp"


class MLPFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        h, z = linear_act.fwd(x, w_in, b_in, activation, True, not recompute)
        save(ctx, (x, w_in, w_out, b_in, b_out), (activation,), None if recompute else z)
        return linear_act.product(h, w_out, b_out)

    @staticmethod
    @differentiable(reference.mlp)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, b_in, _, z = ctx.saved_tensors
        (activation,) = ctx.options
        need_x, need_wi, need_wo, need_bi, need_bo = ctx.needs_input_grad[:5]
        need_dz = need_x or need_wi or need_bi
        if z is None and (need_dz or need_wo):
            _, z = linear_act.fwd(x, w_in, b_in, activation, False, True)
        dx = dw_in = db_in = dw_out = None
        if need_dz:
            dz, h, db = linear_act.bwd(dy, w_out, z, activation, need_wo, need_bi)
            dx = linear_act.product(dz, w_in.t()) if need_x else None
            dw_in = linear_act.outer(dz, x) if need_wi else None
            db_in = db.view(-1) if need_bi else None
        elif need_wo:
            h = linear_act.act(z, activation)
        if need_wo:
            dw_out = linear_act.outer(dy, h)
        db_out = dy.sum(0) if need_bo else None
        return dx, dw_in, dw_out, db_in, db_out, None, None


def mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """act(x w_in' + b_in) w_out' + b_out.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w_in, b_in: (H, D), any strides, and (H,) or None.
        w_out, b_out: (D_out, H), any strides, and (D_out,) or None.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "elu(alpha=0.5)", but no gate: docs/gates.md.
        recompute: save x alone for backward and run the first GEMM again there, instead of saving
            its result: M H values less, 2 M D H FLOPs more.
        lora: `Lora(up=, down=)`, adapters of w_in and w_out: a projection w x becomes
            w x + scale b (a x), inside the same kernels. Of frozen weights no gradient is made.

    Returns y (..., D_out) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and sum
    products in float32.

    Examples:
        >>> import torch
        >>> from fusedmlp import mlp
        >>> x, w_in, w_out = torch.randn(4, 64), torch.randn(128, 64), torch.randn(64, 128)
        >>> mlp(x, w_in, w_out, activation="gelu").shape
        torch.Size([4, 64])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w_in, w_out, b_in, b_out = check.cast(  # type: ignore[assignment]
            dtype, x, w_in, w_out, b_in, b_out
        )
        lora = None if lora is None else adapters.cast(dtype, lora)
    check.like_x(OP, x, ("w_in", "w_out"), w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    H = linear_act.check_projection(OP, x, "w_in", w_in, "b_in", b_in, activation)
    check.down(OP, "w_out", w_out, H, "b_out", b_out)
    tensors = (x, w_in, w_out, b_in, b_out)
    if lora is not None:
        sizes = {"up": (H, x.shape[-1]), "down": (w_out.shape[0], H)}
        adapters.check(OP, x, lora, sizes)
        if choice.pick(OP, x) != "reference":
            block = (x, w_in, None, w_out, b_in, None, b_out)
            return unrows(adapted_block(block, lora, activation, None, True, recompute), x)
    if choice.pick(OP, x) == "reference":
        rest = (*tensors[1:], *adapters.tensors_of(lora))
        if not recompute and remade.keeps_less(x, *rest):
            return remade.mlp(*tensors, activation, lora)
        again = recompute and check.wants_grad(x, *rest)
        return by_reference(reference.mlp, *tensors, activation, lora, recompute=again)
    if check.wants_grad(*tensors):
        y = MLPFunction.apply(rows(x), *tensors[1:], activation, recompute)
    else:
        h, _ = linear_act.fwd(rows(x), w_in, b_in, activation, True, False)
        y = linear_act.product(h, w_out, b_out)
    return unrows(y, x)


register(
    Op(
        OP,
        mlp,
        reference.mlp,
        forward=(kernel(linear_act.fwd),),
        backward=(kernel(linear_act.bwd),),
        flops=rows_times("w_in", "w_out", *lora_names("up", "down")),
        remade=rows_times("w_in", "w_up_b"),
    )
)
