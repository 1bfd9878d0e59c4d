"""The rivals of hyper_attention: PyTorch in blocks of query rows, and
softmax attention as a measure.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...hyperglu.chunked import chunked_attention
from ..work import Work
from .dense import Arguments, Compiled, Function, Rival

CHUNK = 1024
OPTIONS: dict[str, Any] = {
    "kind": "glu", "norm": "out_scale", "aligner": "offset", "causal": True, "shortcut1": True,
    "shortcut2": True, "mask1": True, "mask2": True, "eps": 1e-12,
}  # fmt: skip


class Chunked(Rival):
    """The published way, in blocks of 1024 rows; for a backward each block is made again, which the
    published code does not do."""

    name = "chunked"
    ops = ("hyper_attention",)
    trusted = True

    def function(self, work: Work) -> Function:
        return lambda t: chunked_attention(*t.values(), chunk=CHUNK, **OPTIONS)


class CompileChunked(Compiled, Chunked):
    name = "compile-chunked"


def same_flops(width: float) -> tuple[int, int]:
    """(heads, their width) with a product nearest to `width`: a multiple of 8 from 64 to 128, the
    largest of equals."""
    pairs = [(max(1, round(width / d)), d) for d in range(128, 63, -8)]
    return min(pairs, key=lambda pair: abs(pair[0] * pair[1] - width))


class SDPA(Rival):
    """Causal softmax attention on as many tokens, as wide as makes its FLOPs those of the work: a
    measure."""

    name = "sdpa"
    ops = ("hyper_attention",)
    phases = ("forward",)
    trusted = True

    def sizes(self, work: Work) -> tuple[int, int, int, int]:
        """(B, heads, T, width)."""
        *lead, _, T, _ = work.shapes("forward")["q"]
        batch = lead[0] if lead else 1
        pairs = batch * T * (T + 1) // 2
        heads, width = same_flops(work.flops("forward") / (4 * pairs))
        return batch, heads, T, width

    def arguments(self, work: Work, inputs: Arguments) -> dict[str, Tensor]:
        q = inputs["q"]
        generator = torch.Generator(q.device).manual_seed(0)
        make = lambda: torch.randn(  # noqa: E731
            self.sizes(work), device=q.device, dtype=q.dtype, generator=generator
        )
        return {name: make() for name in "qkv"}

    def function(self, work: Work) -> Function:
        return lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)


RIVALS = (Chunked(), CompileChunked(), SDPA())
