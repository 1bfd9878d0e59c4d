"""The published FlashMGLU method (arXiv 2506.23225, algorithm 1), written anew as a baseline: one
row of x, a byte of masks for every weight, one program a row of w and a slice of D, sums added up
by atomics. Its result depends on their order in the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
SLICE = 2048  # of D, to a program


@triton.jit
def _sums_kernel(
    x_ptr,
    w_ptr,
    masks_ptr,
    sums_ptr,
    H,
    D,
    stride_w,
    N_M: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * SLICE
    total = tl.zeros((BLOCK,), tl.float32)
    gates = ()
    for _ in tl.static_range(N_M):
        gates = gates + (total,)
    for k in tl.range(begin, min(begin + SLICE, D), BLOCK):
        offs = k + tl.arange(0, BLOCK)
        inside = offs < D
        w = tl.load(w_ptr + row * stride_w + offs, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        bits = tl.load(masks_ptr + row * D + offs, mask=inside, other=0)
        product = w * x
        total += product
        added = ()
        for i in tl.static_range(N_M):
            added = added + (gates[i] + tl.where((bits >> i) & 1 != 0, product, 0.0),)
        gates = added
    whole = tl.sum(total, 0)
    for i in tl.static_range(N_M):
        gate = tl.sum(gates[i], 0)
        tl.atomic_add(sums_ptr + i * H + row, gate)
        tl.atomic_add(sums_ptr + (N_M + i) * H + row, whole - gate)


def flash_mglu_sums(x: Tensor, w: Tensor, masks: Tensor, n_m: int) -> tuple[Tensor, Tensor]:
    """g_i and v_i, (n_m, H) each in float32, of x (1, D), w (H, D), masks uint8 (H, D), bit i of
    which is mask i."""
    H, D = w.shape
    sums = torch.zeros((2, n_m, H), dtype=torch.float32, device=x.device)
    _sums_kernel[H, triton.cdiv(D, SLICE)](
        x, w, masks, sums, H, D, w.stride(0), N_M=n_m, SLICE=SLICE, BLOCK=BLOCK, num_warps=4
    )
    return sums[0], sums[1]
