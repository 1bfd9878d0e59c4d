"""Decoding: what a layer remembers of the tokens before, and one row of the core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.hyper import Mixing, gate, mixed, scaled
from .config import HyperGLUConfig


@dataclass
class HyperGLUCache:
    """Memory for block_size = L tokens, whose shapes never change.

    x (B, K - 1, D): the last inputs, for the convolution. k (B, Q, L, dq), v (B, H, L, dv): of the
    first `length` tokens. length (1,): int64, on the device; `step` reads it on the host.
    """

    x: Tensor
    k: Tensor
    v: Tensor
    length: Tensor

    def append(self, window: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the next token's k and v (B, heads, 1, width) at `length`, which the caller moves;
        `window` is x's new content."""
        room = self.length < self.k.shape[2]
        message = "HyperGLU: the cache is full: it holds block_size tokens"
        torch._assert_async(room.all(), message)
        self.x.copy_(window)
        self.k.index_copy_(2, self.length, k.to(self.k.dtype))
        self.v.index_copy_(2, self.length, v.to(self.v.dtype))


def empty_cache(
    config: HyperGLUConfig, batch: int, dtype: torch.dtype, device: torch.device | str
) -> HyperGLUCache:
    if not isinstance(batch, int) or batch < 0:
        raise ValueError(f"HyperGLU: batch must be an int, at least 0, got {batch!r}")
    L, Q, H = config.block_size, config.sub_heads, config.n_head

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    return HyperGLUCache(
        x=zeros(config.conv_kernel_size - 1, config.n_embd),
        k=zeros(Q, L, config.qk_width // Q),
        v=zeros(H, L, config.vo_width // H),
        length=torch.zeros(1, dtype=torch.int64, device=device),
    )


def decode_step(
    q: Tensor,
    cache: HyperGLUCache,
    c1: Tensor | None,
    first: Mixing,
    c2: Tensor | None,
    second: Mixing,
    config: HyperGLUConfig,
) -> Tensor:
    """The row of the newest token, (B, H, 1, dv): its sources s = 0..t have the slots L-1-t..L-1,
    one contiguous suffix."""
    L, n = config.block_size, int(cache.length) + 1
    slots = slice(L - n, L)
    S = q @ cache.k[:, :, :n].mT
    P = mixed(S, c1, first, config.op1_shortcut, slots, None)
    A, factor = gate(P, config.attn_kind, config.attn_norm, config.norm_eps)
    Y = mixed(A, c2, second, config.op2_shortcut, slots, None)
    return scaled(Y @ cache.v[:, :, :n], factor)
