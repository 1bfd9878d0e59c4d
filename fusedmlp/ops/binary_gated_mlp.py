"""y = (act(x w_gate' + b_gate) * (x w_up' + b_up)) w_down' + b_down, three weights in one bit each:
a whole gated block, forward and backward.

| tensor | shape | |
|---|---|---|
| x, y | (..., D), (..., D_out) | flattened to (M, D) |
| w_gate, w_up | (H, D) | BinaryWeight each |
| w_down | (D_out, H) | BinaryWeight |
| b_gate, b_up, b_down | (H,), (H,), (D_out,) | |

dtype: one floating dtype for x and the biases, kept; scales have their own. Memory plan: saves g
and u, x where scales of gate or up have a gradient; h is made again in the epilogue of the dh GEMM.
With recompute=True it saves x alone. With adapters the block is _adapted.py's.

| step | computes | by |
|---|---|---|
| forward | h (and g, u) | binary_gated_linear |
| | y = h w_down' + b_down | binary_linear |
| backward | dh = dy w_down in registers -> dg, du, h | binary_gated_mlp_bwd |
| | dx = dg w_gate + du w_up | binary_linear_dx |
| | the scales' gradients, of down from dy and h | binary_linear_ds |

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
from ..backends.derivatives import by_reference, differentiable, save
from ..backends.flops import Shapes, lora_names, rows_times
from ..backends.op import ONE_BIT, Op, kernel, register
from ..check import lora as adapters
from ..kernels.later import Later
from ..kernels.launches import binary as launches
from ..packing import rows, unrows
from ..reference.lora import Lora
from ..weights.binary import BinaryWeight
from . import _adapted, binary_gated_linear, binary_linear
from .binary_linear import planes

OP = "binary_gated_mlp"
_triton_bwd = Later("binary.backward")


def _bwd_fake(
    dy: Tensor, q_down: Tensor, s_down: Tensor, gu: Tensor, activation: str, want_h: bool
) -> tuple[Tensor, Tensor]:
    return _triton_bwd.binary_gated_mlp_grads(dy, gu, want_h)


# dy (M, D_out), gu (2, M, H) -> with dh = dy w_down: dgu, and h (M, or 0 if not wanted, H).
bwd = library.define(
    "binary_gated_mlp_bwd(Tensor dy, Tensor q_down, Tensor s_down, Tensor gu, str activation, "
    "bool want_h) -> (Tensor, Tensor)",
    _triton_bwd.binary_gated_mlp_bwd,
    _bwd_fake,
    flops=lambda dy, q_down, s_down, gu, *_: 2 * prod(dy) * gu[2],
    result="MH",
    launches=(launches.BWD,),
)


class BinaryGatedMLPFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q_gate: Tensor,
        s_gate: Tensor,
        q_up: Tensor,
        s_up: Tensor,
        q_down: Tensor,
        s_down: Tensor,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        b_down: Tensor | None,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        first, down = (q_gate, s_gate, q_up, s_up), (q_down, s_down)
        h, gu = binary_gated_linear.fwd(x, *first, b_gate, b_up, activation, True, not recompute)
        need_x, _, need_sg, _, need_su = ctx.needs_input_grad[:5]
        kept = x if recompute or need_sg or need_su or not need_x else None
        inputs = (kept, *first, *down, b_gate, b_up, b_down)
        save(ctx, inputs, (activation,), None if recompute else gu)
        ctx.width = x.shape[1]
        return binary_linear.fwd(h, *down, b_down)

    @staticmethod
    @differentiable(reference.binary_gated_mlp)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *first, q_down, s_down, b_gate, b_up, _, gu = ctx.saved_tensors
        (activation,) = ctx.options
        need_x, _, need_sg, _, need_su, _, need_sd = ctx.needs_input_grad[:7]
        need_bg, need_bu, need_bd = ctx.needs_input_grad[7:10]
        dx = ds_gate = ds_up = ds_down = db_gate = db_up = None
        if need_x or need_sg or need_su or need_sd or need_bg or need_bu:
            if gu is None:
                _, gu = binary_gated_linear.fwd(x, *first, b_gate, b_up, activation, False, True)
            dgu, h = bwd(dy, q_down, s_down, gu, activation, need_sd)
            needed = (need_x, need_sg, need_su)
            dx, ds_gate, ds_up = binary_gated_linear.projection_grads(
                x, tuple(first), dgu, ctx.width, needed
            )
            ds_down = binary_linear.ds(dy, h, q_down, s_down.dtype) if need_sd else None
            db_gate = dgu[0].sum(0) if need_bg else None
            db_up = dgu[1].sum(0) if need_bu else None
        db_down = dy.sum(0) if need_bd else None
        scales = (None, ds_gate, None, ds_up, None, ds_down)
        return dx, *scales, db_gate, db_up, db_down, None, None


def binary_gated_mlp(
    x: Tensor,
    w_gate: BinaryWeight,
    w_up: BinaryWeight,
    w_down: BinaryWeight,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "silu",
    packed: None = None,
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """(act(x w_gate' + b_gate) * (x w_up' + b_up)) w_down' + b_down over one-bit weights.

    Args:
        x: (..., D). Read in place where its leading dimensions merge by strides, as in F.linear.
        w_gate, w_up: (H, D) each. Signs are frozen, scales get a gradient if they require one.
        w_down: (D_out, H), likewise.
        b_gate, b_up: (H,) or None each.
        b_down: (D_out,).
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: None. One-bit gate and up are two weights, so that a packed order is refused.
        recompute: save x alone for backward and run the first product again there, instead of
            saving g and u: 2 M H values less, 4 M D H FLOPs more.
        lora: `Lora(gate=, up=, down=)`, adapters of any of the three in x's dtype: a projection
            w x becomes w x + scale b (a x), and the signs stay as they are. With `recompute` the
            whole forward runs again.

    Returns y (..., D_out) in x's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype, type), naming the
    argument.

    x and the biases have one floating dtype, scales their own; the kernels take bfloat16, float16
    and float32 and sum products in float32. Source: Q1_0 of llama.cpp and Bonsai.

    Examples:
        >>> import torch
        >>> from fusedmlp import binary_gated_mlp, quantize_binary
        >>> w_gate, w_up = (quantize_binary(torch.randn(256, 128)) for _ in range(2))
        >>> w_down = quantize_binary(torch.randn(128, 256))
        >>> binary_gated_mlp(torch.randn(4, 128), w_gate, w_up, w_down).shape
        torch.Size([4, 128])
    """
    if dtype := check.autocast_dtype(OP, x):
        x, b_gate, b_up, b_down = check.cast(  # type: ignore[assignment]
            dtype, x, b_gate, b_up, b_down
        )
        lora = None if lora is None else adapters.cast(dtype, lora)
    check.like_x(OP, x, b_gate=b_gate, b_up=b_up, b_down=b_down)
    H = binary_gated_linear.check_projection(OP, x, w_gate, w_up, b_gate, b_up, activation, packed)
    D_out, width = binary_linear.check_weight(OP, "w_down", w_down, x.device)
    if width != H:
        check.down_shape(OP, "w_down", w_down.shape, H)
    if b_down is not None:
        check.shape(OP, "b_down", b_down, D_out)
    if lora is not None:
        first = (H, x.shape[-1])
        adapters.check(OP, x, lora, {"gate": first, "up": first, "down": (D_out, H)})
    tensors: tuple[Any, ...] = (*planes(w_gate, w_up, w_down), b_gate, b_up, b_down)
    if choice.pick(OP, x) == "reference":
        arguments: tuple[Any, ...] = (x, *tensors, activation, lora)
        again = recompute and check.wants_grad(x, *tensors, *adapters.tensors_of(lora))
        return by_reference(cpu.binary_gated_mlp, *arguments, recompute=again)
    if lora is not None:
        _adapted.check_mode(OP)
        again = recompute and check.wants_grad(x, *tensors, *adapters.tensors_of(lora))
        packed_weights, biases = (w_gate, w_up, w_down), (b_gate, b_up, b_down)
        y = by_reference(
            _adapted.binary, x, packed_weights, biases, activation, lora, recompute=again
        )
    elif check.wants_grad(x, *tensors):
        y = BinaryGatedMLPFunction.apply(rows(x), *tensors, activation, recompute)
    else:
        *weights, _, _, _ = tensors
        h, _ = binary_gated_linear.fwd(rows(x), *weights[:4], b_gate, b_up, activation, True, False)
        y = binary_linear.fwd(h, *weights[4:], b_down)
    return unrows(y, x)


def _flops(shapes: Shapes) -> int:
    down = shapes["q_gate"][0] * shapes["q_down"][0]
    low = rows_times(*lora_names("gate", "up", "down"))(shapes)
    return binary_gated_linear.projection_flops(shapes) + 2 * prod(shapes["x"][:-1]) * down + low


register(
    Op(
        OP,
        binary_gated_mlp,
        reference.binary_gated_mlp,
        forward=(kernel(binary_gated_linear.fwd), kernel(binary_linear.fwd, "MD")),
        backward=(kernel(bwd), kernel(binary_linear.dx), kernel(binary_linear.ds)),
        flops=_flops,
        remade=binary_gated_linear.projection_flops,
        own_bytes=ONE_BIT,
    )
)
