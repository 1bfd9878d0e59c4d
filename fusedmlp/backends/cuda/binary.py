"""The kernel of csrc/ for few rows over one-bit weights, launched, with the arguments of its Triton
launchers (kernels/binary/) behind `enqueue`, the extension's.

It takes whole groups of 128 inputs and float16 scales, reads 16 bytes of x at a time, and makes h
alone. Other calls are `Unfit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arch.tile import SKINNY_M, cdiv
from ...kernels.binary.binary_linear import binary_linear_result
from ...kernels.device import multiprocessors
from ...packing import empty_pair
from ...reference.binary import GROUP
from . import loader
from .gated_linear import Enqueue, activation_of, matrix, stream
from .loader import unfit

# Rows of the weight (or of gate and as many of up) that a block takes, and the groups it takes x of
# at a time.
_BLOCK_ROWS, _STEP = 128, 4


def splits_of(x: Tensor, H: int, groups: int, gated: bool) -> int:
    """Into how many parts D is cut: four blocks a multiprocessor, `_STEP` groups a part."""
    blocks = cdiv(H, _BLOCK_ROWS // 2 if gated else _BLOCK_ROWS)
    wanted = cdiv(4 * multiprocessors(x.device), blocks)
    return max(1, min(wanted, groups // _STEP))


def _launch(
    op: str,
    enqueue: Enqueue,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    activation: str,
) -> Tensor:
    q_gate, s_gate, q_up, _ = weights
    (M, D), H = x.shape, q_gate.shape[0]
    if M > SKINNY_M:
        raise unfit(op, f"{SKINNY_M} rows of x or fewer", str(M))
    h = binary_linear_result(x, q_gate)
    if M == 0 or H == 0:
        return h
    if D % GROUP or D == 0:
        raise unfit(op, f"D to be a multiple of {GROUP}, and not 0", str(D))
    for t in weights[1::2]:
        if t is not None and t.dtype != torch.float16:
            raise unfit(op, "scales to be float16", str(t.dtype))
    for t in biases:
        if t is not None and not t.is_contiguous():
            raise unfit(op, "biases to be contiguous", f"strides {t.stride()}")
    at_x, stride_x = matrix(op, "x", x)
    act, scalars = activation_of(op, activation)
    gated = q_up is not None
    splits = splits_of(x, H, s_gate.shape[1], gated)
    parts = x.new_empty((splits, 1 + gated, M, H), dtype=torch.float32) if splits > 1 else None
    enqueue(
        at_x, *map(_at, weights), *map(_at, biases), h.data_ptr(), _at(parts),
        M, H, D, stride_x, splits, act, scalars,
        loader.load()[0].DTYPES[loader.DTYPES[x.dtype]], x.get_device(), stream(x.device),
    )  # fmt: skip
    return h


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def binary_linear_fwd(
    enqueue: Enqueue, x: Tensor, qweight: Tensor, scales: Tensor, b: Tensor | None
) -> Tensor:
    weights = (qweight, scales, None, None)
    return _launch("binary_linear_fwd", enqueue, x, weights, (b, None), "identity")


def binary_gated_linear_fwd(
    enqueue: Enqueue,
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
    op = "binary_gated_linear_fwd"
    if want_gu or not want_h:
        raise unfit(op, "a call that wants no gradient", "one that does")
    weights = (q_gate, s_gate, q_up, s_up)
    h = _launch(op, enqueue, x, weights, (b_gate, b_up), activation)
    return h, empty_pair(x, 0, h.shape[1], None)
