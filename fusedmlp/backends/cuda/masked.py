"""The masked gated linear kernel of csrc/ for few rows, launched, with the arguments of its Triton
launcher (kernels/masked/masked_gated_linear.py) behind `enqueue`, the extension's.

It reads 16 bytes of x and w at a time: columns are contiguous, rows begin on 16 bytes and D is a
multiple of 8. It makes h alone. Other calls are `Unfit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arch.tile import SKINNY_M, cdiv
from ...kernels.device import multiprocessors
from ...kernels.masked.masked_gated_linear import masked_gated_linear_results
from . import loader
from .gated_linear import Enqueue, activation_of, matrix, stream
from .loader import unfit

OP = "masked_gated_linear_fwd"
N_M = (1, 2, 4, 8)
# A block takes so many rows of w over one row of x; a step of D is one octet a lane.
_BLOCK_ROWS, _STEP = 16, 256


def splits_of(x: Tensor, H: int, D: int) -> int:
    """Into how many parts D is cut: four blocks a multiprocessor, four steps a part."""
    wanted = cdiv(4 * multiprocessors(x.device), cdiv(H, _BLOCK_ROWS))
    return max(1, min(wanted, D // (4 * _STEP)))


def masked_gated_linear_fwd(
    enqueue: Enqueue,
    x: Tensor,
    w: Tensor,
    planes: Tensor,
    activation: str,
    want_h: bool,
    want_gt: bool,
) -> tuple[Tensor, Tensor]:
    (M, D), H, n_m = x.shape, w.shape[0], planes.shape[2]
    if want_gt or not want_h:
        raise unfit(OP, "a call that wants no gradient", "one that does")
    if M > SKINNY_M:
        raise unfit(OP, f"{SKINNY_M} rows of x or fewer", str(M))
    if n_m not in N_M:
        raise unfit(OP, f"n_m to be one of {', '.join(map(str, N_M))}", str(n_m))
    h, gt = masked_gated_linear_results(x, w, planes, want_h, want_gt)
    if M == 0 or H == 0:
        return h, gt
    if D % 8 or D == 0:
        raise unfit(OP, "D to be a multiple of 8, and not 0", str(D))
    if not planes.is_contiguous() or planes.data_ptr() % 8:
        raise unfit(OP, "planes to be contiguous and to start on 8 bytes", "others")
    at_x, stride_x = matrix(OP, "x", x)
    at_w, stride_w = matrix(OP, "w", w)
    act, scalars = activation_of(OP, activation)
    splits = splits_of(x, H, D)
    shape = (splits, 1 + n_m, M, H)
    parts = x.new_empty(shape, dtype=torch.float32) if splits > 1 else None
    enqueue(
        at_x, at_w, planes.data_ptr(), h.data_ptr(), 0 if parts is None else parts.data_ptr(),
        M, H, D, stride_x, stride_w, n_m, splits, act, scalars,
        loader.load()[0].DTYPES[loader.DTYPES[x.dtype]], x.get_device(), stream(x.device),
    )  # fmt: skip
    return h, gt
