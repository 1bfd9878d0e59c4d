"""Low-rank adapters of a block's projections: w x becomes w x + scale b (a x).

Source: Hu et al., LoRA, arXiv 2106.09685; scale = alpha / r, or alpha / sqrt(r) as rsLoRA has it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .rows import linear


class Adapter(NamedTuple):
    """scale * b a, which is added to a projection's weight (out, in) without being formed.

    Args:
        a: (r, in), with r from 1 to 256; of E experts (E, r, in).
        b: (out, r); of E experts (E, out, r).
        scale: what the product is multiplied by; no tensor, and without a gradient.

    Examples:
        >>> import torch
        >>> from fusedmlp import Adapter
        >>> Adapter(torch.randn(8, 64), torch.zeros(128, 8), scale=2.0).scale
        2.0
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


class Lora(NamedTuple):
    """The adapters of a block, each for one projection; None where a projection has none.

    Args:
        gate, up: of the projections (H, D). `mlp` has no gate, plain experts have no up.
        down: of the projection (D_out, H).

    Examples:
        >>> import torch
        >>> from fusedmlp import Adapter, Lora
        >>> Lora(up=Adapter(torch.randn(8, 64), torch.zeros(128, 8))).gate is None
        True
    """

    gate: Adapter | None = None
    up: Adapter | None = None
    down: Adapter | None = None


def adapted(y: Tensor, x: Tensor, adapter: Adapter | None) -> Tensor:
    """y + scale b (a x), of y = w x."""
    if adapter is None:
        return y
    return y + adapter.scale * linear(linear(x, adapter.a), adapter.b)


def of_each(lora: Lora, experts: int) -> list[Lora]:
    """The adapters of every expert, from stacked ones."""
    own = [
        [None] * experts
        if p is None
        else [Adapter(a, b, p.scale) for a, b in zip(p.a.unbind(), p.b.unbind(), strict=True)]
        for p in lora
    ]
    return [Lora(*each) for each in zip(*own, strict=True)]
