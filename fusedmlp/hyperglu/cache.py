"""Decoding: what a layer remembers of the tokens before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import HyperGLUConfig


@dataclass
class HyperGLUCache:
    """Memory for block_size = L tokens, whose shapes never change.

    x (B, K - 1, D): the last inputs, for the convolution. k (B, Q, L, dq), v (B, H, L, dv): of the
    first `length` tokens. length (1,): int64, on the device, where alone it is read.
    """

    x: Tensor
    k: Tensor
    v: Tensor
    length: Tensor

    def append(self, window: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the next token's k and v (B, heads, 1, width) at `length`, which the caller moves;
        `window` is x's new content."""
        size = self.k.shape[2]
        room = self.length < size
        message = f"HyperGLU: the cache is full: it holds block_size = {size} tokens"
        torch._assert_async(room, message)
        self.x.copy_(window)
        self.k.index_copy_(2, self.length, k)
        self.v.index_copy_(2, self.length, v)


def shapes_of(config: HyperGLUConfig, batch: int) -> dict[str, tuple[int, ...]]:
    L, Q, H = config.block_size, config.sub_heads, config.n_head
    return {
        "x": (batch, config.conv_kernel_size - 1, config.n_embd),
        "k": (batch, Q, L, config.qk_width // Q),
        "v": (batch, H, L, config.vo_width // H),
        "length": (1,),
    }


def empty_cache(
    config: HyperGLUConfig, batch: int, dtype: torch.dtype, device: torch.device | str
) -> HyperGLUCache:
    if not isinstance(batch, int) or batch < 0:
        raise ValueError(f"HyperGLU: batch must be an int, at least 0, got {batch!r}")
    shapes = shapes_of(config, batch)
    length = torch.zeros(shapes.pop("length"), dtype=torch.int64, device=device)
    made = {name: torch.zeros(s, dtype=dtype, device=device) for name, s in shapes.items()}
    return HyperGLUCache(**made, length=length)
