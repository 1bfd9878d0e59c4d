"""Experts on the CPU: rows in expert order, a product for each expert in use, and back.

The mathematics is that of `reference.moe_mlp` and `reference.moe_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...packing import Packed, halves
from ...reference import Routing
from ...reference.activations import resolve
from ...reference.dense import gated_act, gated_mlp, mlp
from ...reference.lora import Adapter, Lora, of_each
from ...reference.moe import weighted
from .eager import needs_grad, readable
from .grouped import busy, product


class _Rows:
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
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    of_gate, of_up, of_down = lora or Lora()
    low = (t for p in (of_gate, of_up, of_down) if p is not None for t in p[:2])
    grad = needs_grad(x, routing.prob, *weights, *low)
    if readable(routing.offsets) and x.shape[0] == 1 and not grad:
        return _one_token(x, routing, weights, w_down, activation, packed, lora)
    rows = _Rows(routing)
    a = rows.gather(x)
    g = rows.linear(a, w_gate, b_gate)
    if w_up is None and packed is None:
        row, scalars = resolve(activation)
        h = row.reference(rows.adapted(g, a, of_gate), *scalars)
    else:
        g, u = halves(g, packed) if w_up is None else (g, rows.linear(a, w_up, b_up))  # type: ignore[arg-type]
        h = gated_act(rows.adapted(g, a, of_gate), rows.adapted(u, a, of_up), activation)
    y = rows.adapted(rows.linear(h, w_down, b_down), h, of_down)
    return _weighted(y.index_select(0, routing.rows), routing, x.dtype)


def _one_token(
    x: Tensor,
    routing: Routing,
    weights: tuple[Tensor | None, ...],
    w_down: Tensor,
    activation: str,
    packed: Packed | None,
    lora: Lora | None,
) -> Tensor:
    """Each of its experts is a dense block, for which nothing is gathered."""
    made: list[Tensor] = []
    adapters = None if lora is None else of_each(lora, w_down.shape[0])
    for e, start, end in busy(routing.offsets.tolist()):
        gate, up, down, bg, bu, bd = (None if t is None else t.select(0, e) for t in weights)
        assert gate is not None and down is not None
        mine = None if adapters is None else adapters[e]
        if up is None and packed is None:
            mine = mine and Lora(up=mine.gate, down=mine.down)
            y = mlp(x, gate, down, bg, bd, activation, mine)
        else:
            y = gated_mlp(x, gate, up, down, bg, bu, bd, activation, packed, mine)
        made += (end - start) * [y]
    if not made:
        return x.new_zeros(1, w_down.shape[1])
    if routing.k == 1:
        return (routing.prob.view(1, 1) * made[0]).to(x.dtype)
    shares = routing.prob.view(-1).index_select(0, routing.tokens[: len(made)])
    return (shares.unsqueeze(1) * torch.cat(made)).sum(0, keepdim=True).to(x.dtype)


def _weighted(y: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """`weighted`, which chooses among kept and dropped rows, where some are dropped."""
    if not readable(routing.offsets) or routing.offsets[-2] != routing.tokens.shape[0]:
        return weighted(y, routing, dtype)
    scaled = routing.prob.reshape(-1, 1) * y
    return (scaled if routing.k == 1 else scaled.view(-1, routing.k, y.shape[1]).sum(1)).to(dtype)


def moe_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w[e]' + b[e] with each token's own expert e, 0 for a dropped token; x (T, K)."""
    rows = _Rows(routing)
    y = rows.linear(rows.gather(x), w, b).index_select(0, routing.rows)
    return y if b is None else torch.where(routing.kept.view(-1, 1), y, 0)


def weighted_linear(x: Tensor, routing: Routing, w: Tensor, b: Tensor | None) -> Tensor:
    """sum over a token's choices of prob * (x w[e]' + b[e]); x (T, K)."""
    rows = _Rows(routing)
    y = rows.linear(rows.gather(x), w, b)
    return _weighted(y.index_select(0, routing.rows), routing, x.dtype)
