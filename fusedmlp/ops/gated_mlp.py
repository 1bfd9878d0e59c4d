"""y = (act(x Wg' + bg) * (x Wu' + bu)) Wd' + bd: a whole gated block, forward and backward.

| tensor | shape | |
|---|---|---|
| x, y | (..., D) | flattened to (M, D) |
| w_gate, w_up | (H, D) | or w_gate (2H, D) with both halves, w_up = None |
| w_down | (D_out, H) | |
| b_gate, b_up, b_down | (H,), (H,), (D_out,) | |

dtype: one floating dtype for all, kept. Memory plan: saves x, the weights, g and u; h is made again
in the epilogue of the dh GEMM. With recompute=True it saves x and the weights alone.

| step | computes | by |
|---|---|---|
| forward | h (and g, u) | gated_linear |
| | y = h Wd' + bd | cuBLAS |
| backward | dh = dy Wd in registers -> dg, du, h, column sums of dg, du | gated_linear_bwd |
| | dWd = dy' h, dbd = sum dy | cuBLAS |
| | dx = [dg du] [Wg; Wu], dW = [dg du]' x | cuBLAS |

Source: Shazeer, GLU Variants, arXiv 2002.05202.
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
from ..packing import Packed, join_pair, rows, split_pair, unrows
from ..reference.lora import Lora
from . import gated_act, gated_linear
from ._lora import adapted_block
from .linear_act import product

OP = "gated_mlp"


class GatedMLPFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor | None,
        w_down: Tensor,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        b_down: Tensor | None,
        activation: str,
        packed: Packed | None,
        recompute: bool,
    ) -> Tensor:
        h, gu = gated_linear.project(
            x, w_gate, w_up, b_gate, b_up, activation, packed, want_gu=not recompute
        )
        inputs = (x, w_gate, w_up, w_down, b_gate, b_up, b_down)
        save(ctx, inputs, (activation, packed), None if recompute else gu)
        return product(h, w_down, b_down)

    @staticmethod
    @differentiable(reference.gated_mlp)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate, w_up, w_down, b_gate, b_up, _, gu = ctx.saved_tensors
        activation, packed = ctx.options
        need_x, need_wg, need_wu, need_wd, need_bg, need_bu, need_bd = ctx.needs_input_grad[:7]
        need_dgu = need_x or need_wg or need_wu or need_bg or need_bu
        if gu is None and (need_dgu or need_wd):
            _, gu = gated_linear.project(
                x, w_gate, w_up, b_gate, b_up, activation, packed, want_h=False, want_gu=True
            )
        dx = dw_gate = dw_up = dw_down = db_gate = db_up = None
        if need_dgu:
            need_db = need_bg or need_bu
            dgu, h, db = gated_linear.bwd(dy, w_down, gu, activation, packed, need_wd, need_db)
            dx, dw_gate, dw_up = gated_linear.projection_grads(
                x, w_gate, w_up, dgu, packed, (need_x, need_wg, need_wu)
            )
            if packed:
                db_gate = join_pair(db, packed) if need_bg else None
            else:
                # Clones: a view would keep both halves alive for one.
                db_gate = db[0].clone() if need_bg else None
                db_up = db[1].clone() if need_bu else None
        elif need_wd:
            h = gated_act.fwd(*split_pair(gu, None), activation)
        if need_wd:
            dw_down = gated_linear.weight_grad(w_down, dy, h)
        db_down = dy.sum(0) if need_bd else None
        return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down, None, None, None


def gated_mlp(
    x: Tensor,
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
    lora: Lora | None = None,
) -> Tensor:
    """(act(x w_gate' + b_gate) * (x w_up' + b_up)) w_down' + b_down.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w_gate, w_up: (H, D) each, any strides; or, with `packed`, w_gate (2H, D) and w_up None.
        w_down: (D_out, H), any strides.
        b_gate, b_up: (H,) or None each; or, with `packed`, b_gate (2H,) and b_up None.
        b_down: (D_out,).
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: order of the halves of a packed weight: "gate_up" or "up_gate", one behind the
            other, or "interleaved", where rows 0, 2, 4, ... of w_gate and b_gate are gate and rows
            1, 3, 5, ... are up. No copy is made, be the weight contiguous along D or along 2H, and
            its gradient comes from one GEMM.
        recompute: save x alone for backward and run the first GEMM again there, instead of saving g
            and u: 2 M H values less, 4 M D H FLOPs more.
        lora: `Lora(gate=, up=, down=)`, adapters of any of the three: a projection w x becomes
            w x + scale b (a x), inside the same kernels. Of frozen weights no gradient is made.

    Returns y (..., D_out) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and sum
    products in float32. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp import gated_mlp
        >>> x = torch.randn(2, 8, 64)
        >>> w_gate, w_up = torch.randn(2, 128, 64, requires_grad=True)
        >>> w_down = torch.randn(64, 128, requires_grad=True)
        >>> y = gated_mlp(x, w_gate, w_up, w_down, activation="silu", recompute=True)
        >>> y.shape
        torch.Size([2, 8, 64])
        >>> y.sum().backward()
        >>> w_down.grad.shape
        torch.Size([64, 128])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, w_gate, w_up, w_down, b_gate, b_up, b_down = check.cast(  # type: ignore[assignment]
            dtype, x, w_gate, w_up, w_down, b_gate, b_up, b_down
        )
        lora = None if lora is None else adapters.cast(dtype, lora)
    check.like_x(
        OP, x, ("w_gate", "w_down"), w_gate=w_gate, w_up=w_up, w_down=w_down,
        b_gate=b_gate, b_up=b_up, b_down=b_down,
    )  # fmt: skip
    H = gated_linear.check_projection(OP, x, w_gate, w_up, b_gate, b_up, activation, packed)
    check.down(OP, "w_down", w_down, H, "b_down", b_down)
    tensors = (x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    if lora is not None:
        first, down = (H, x.shape[-1]), (w_down.shape[0], H)
        adapters.check(OP, x, lora, {"gate": first, "up": first, "down": down})
        if choice.pick(OP, x) != "reference":
            return unrows(adapted_block(tensors, lora, activation, packed, False, recompute), x)
    if choice.pick(OP, x) == "reference":
        rest = (*tensors[1:], *adapters.tensors_of(lora))
        if not recompute and remade.keeps_less(x, *rest):
            return remade.gated_mlp(*tensors, activation, packed, lora)
        again = recompute and check.wants_grad(x, *rest)
        arguments = (*tensors, activation, packed, lora)
        return by_reference(reference.gated_mlp, *arguments, recompute=again)
    if check.wants_grad(*tensors):
        y = GatedMLPFunction.apply(rows(x), *tensors[1:], activation, packed, recompute)
    else:
        h, _ = gated_linear.project(rows(x), w_gate, w_up, b_gate, b_up, activation, packed)
        y = product(h, w_down, b_down)
    return unrows(y, x)


register(
    Op(
        OP,
        gated_mlp,
        reference.gated_mlp,
        forward=(kernel(gated_linear.fwd),),
        backward=(kernel(gated_linear.bwd),),
        flops=rows_times("w_gate", "w_up", "w_down", *lora_names("gate", "up", "down")),
        remade=rows_times("w_gate", "w_up", "w_gate_b", "w_up_b"),
    )
)
