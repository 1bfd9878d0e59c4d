"""The way of each token down a binary tree, from the logits of its nodes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..plans import noted


@triton.jit
def _path_kernel(
    logits_ptr,
    path_ptr,
    T,
    stride_t,
    stride_n,
    DEPTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    row = logits_ptr + offs_t.to(tl.int64) * stride_t
    node = tl.zeros((BLOCK_T,), tl.int64)
    own = path_ptr + offs_t.to(tl.int64) * (DEPTH + 1)
    tl.store(own, node, mask=mask_t)
    for level in tl.static_range(DEPTH):
        logit = tl.load(row + node * stride_n, mask=mask_t, other=0.0).to(tl.float32)
        node = 2 * node + tl.where(logit > 0, 2, 1)
        tl.store(own + level + 1, node, mask=mask_t)


def empty_path(logits: Tensor, depth: int) -> Tensor:
    """Memory for the path."""
    return logits.new_empty((logits.shape[0], depth + 1), dtype=torch.int64)


def tree_path_fwd(logits: Tensor, depth: int) -> Tensor:
    T = logits.shape[0]
    path = empty_path(logits, depth)
    if T:
        noted(_path_kernel)[cdiv(T, 128),](
            logits, path, T, *logits.stride(), DEPTH=depth, BLOCK_T=128,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return path
