"""What mixes the sequence in the language model of the `lm` bench: softmax attention, or HyperGLU
in its place with as many parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hyperglu import HyperGLU, HyperGLUConfig
from ...reference.hyper import Kind


class Softmax(nn.Module):
    """Causal, with rotary positions: 4 dim^2 weights."""

    turn: Tensor

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("turn", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        q, k = (self._rotated(t) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return merged

    def _rotated(self, t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        cos, sin = self.turn[:, : t.shape[2]].to(t.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _hyper(kind: Kind, dim: int, heads: int, context: int) -> HyperGLU:
    """Ranks of dim / 16, and values as wide as brings its parameters nearest to softmax's."""
    rank = max(1, dim // 16)
    first = HyperGLUConfig(
        dim, heads, context, attn_kind=kind, op1_rank=rank, op2_rank=rank, impl_default="dense"
    )
    configs = [dataclasses.replace(first, vo_rank=width) for width in range(heads, dim + 1, heads)]
    return HyperGLU(min(configs, key=lambda config: abs(_count(config) - 4 * dim**2)))


def _count(config: HyperGLUConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in HyperGLU(config).parameters())


# (name, what maps x (B, T, dim) to (B, T, dim), from (dim, heads, context)).
MIXERS: list[tuple[str, Callable[[int, int, int], nn.Module]]] = [
    ("attention", Softmax),
    ("hyperglu", lambda *sizes: _hyper("glu", *sizes)),
    ("hypermlp", lambda *sizes: _hyper("relu", *sizes)),
]
