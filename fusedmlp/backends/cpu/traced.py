"""Experts on the CPU by operations that torch.compile does not open, with derivatives of any order:
rows in expert order, a product for each expert in use, and back.

The mathematics is that of `reference.moe_mlp` and `reference.moe_linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...packing import Packed, halves
from ...reference import Routing
from ...reference.activations import resolve
from ...reference.dense import gated_act
from ...reference.lora import Adapter, Lora
from ...reference.moe import weighted
from .eager import readable
from .grouped import product
from .masked import masked_products
from .remade import masked_act


def activated(pre: list[Tensor], activation: str, packed: Packed | None) -> Tensor:
    """h of g and u, or of g alone."""
    if len(pre) == 2 or packed is not None:
        return gated_act(pre[0], pre[1] if len(pre) == 2 else None, activation, packed)
    row, scalars = resolve(activation)
    return row.reference(pre[0], *scalars)


class Rows:
    """A routing's rows in expert order."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._expert: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        k = self.routing.k
        return x.index_select(0, self.routing.tokens if k == 1 else self.routing.tokens // k)

    def linear(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """a w[e]' + b[e] of each row's expert e."""
        y = product(a, w, self.routing.offsets)
        return y if b is None else y + b.index_select(0, self.expert)

    def masked(self, a: Tensor, w: Tensor, masks: Tensor, activation: str) -> Tensor:
        """`reference.masked_gated_linear` of each row's expert."""
        return masked_act(masked_products(a, w, masks, self.routing.offsets), resolve(activation))

    def adapted(self, y: Tensor, a: Tensor, adapter: Adapter | None) -> Tensor:
        """y + scale b[e] (a[e] a) of each row's expert e."""
        if adapter is None:
            return y
        t = self.linear(a, adapter.a, None)
        return y + adapter.scale * self.linear(t, adapter.b, None)

    @property
    def expert(self) -> Tensor:
        """The expert of each row; any where none takes it."""
        if self._expert is None:
            chosen = self.routing.expert.reshape(-1).index_select(0, self.routing.tokens)
            self._expert = chosen.clamp(0, self.routing.num_experts - 1)
        return self._expert


def moe_mlp(
    x: Tensor,
    routing: Routing,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    packed: Packed | None = None,
    lora: Lora | None = None,
) -> Tensor:
    """The sum over a token's choices of prob * the expert's MLP; x (T, D)."""
    rows, (*of_first, of_down) = Rows(routing), lora or Lora()
    a = rows.gather(x)
    pre = [rows.linear(a, w, b) for w, b in ((w_gate, b_gate), (w_up, b_up)) if w is not None]
    if lora is not None and packed is not None:
        pre, packed = list(halves(pre[0], packed)), None
    pre = [rows.adapted(t, a, adapter) for t, adapter in zip(pre, of_first, strict=False)]
    h = activated(pre, activation, packed)
    y = rows.adapted(rows.linear(h, w_down, b_down), h, of_down)
    return _weighted(y.index_select(0, routing.rows), routing, x.dtype)


def _weighted(y: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """`weighted`, which chooses among kept and dropped rows, where some are dropped."""
    if not readable(routing.offsets) or routing.offsets[-2] != routing.tokens.shape[0]:
        return weighted(y, routing, dtype)
    scaled = routing.prob.reshape(-1, 1) * y
    return (scaled if routing.k == 1 else scaled.view(-1, routing.k, y.shape[1]).sum(1)).to(dtype)


def moe_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w[e]' + b[e] with each token's own expert e, 0 for a dropped token; x (T, K)."""
    rows = Rows(routing)
    y = rows.linear(rows.gather(x), w, b).index_select(0, routing.rows)
    return y if b is None else torch.where(routing.kept.view(-1, 1), y, 0)


def weighted_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None) -> Tensor:
    """sum over a token's choices of prob * (x w[e]' + b[e]); x (T, K)."""
    rows = Rows(routing)
    y = rows.linear(rows.gather(x), w, b)
    return _weighted(y.index_select(0, routing.rows), routing, x.dtype)


def by_rows(
    x: Tensor,
    routing: Routing,
    hidden: Callable[[Tensor, Rows], Tensor],
    w_down: Tensor,
    b_down: Tensor | None,
) -> Tensor:
    """Experts with anything between their projections: `hidden` makes the rows of h of those of
    x (T, D)."""
    rows = Rows(routing)
    y = rows.linear(hidden(rows.gather(x), rows), w_down, b_down)
    return _weighted(y.index_select(0, routing.rows), routing, x.dtype)
