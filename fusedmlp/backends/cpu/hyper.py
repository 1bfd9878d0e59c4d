"""One step of HyperGLU on the CPU: what its position costs, not what the cache could hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference.hyper import Kind, Norm, gate, mixed, scaled
from ..flops import Shape, hyper_pair
from ..library import define_for_cpu

_WIDTHS = ", ".join(
    f"Tensor? {name}" for name in ("c1", "u1", "vt1", "d1", "c2", "u2", "vt2", "d2")
)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    c1: Tensor | None,
    u1: Tensor | None,
    vt1: Tensor | None,
    d1: Tensor | None,
    c2: Tensor | None,
    u2: Tensor | None,
    vt2: Tensor | None,
    d2: Tensor | None,
    kind: Kind,
    norm: Norm,
    shortcut1: bool,
    shortcut2: bool,
    eps: float,
) -> Tensor:
    """`reference.hyper_attention_step` over slices of the cache and of the parameters."""
    seen = min(max(int(position) + 1, 0), k.shape[-2])
    L = next((u.shape[-2] for u in (u1, u2) if u is not None), seen)
    slots = slice(L - seen, L)
    S = q.unsqueeze(-2) @ k[..., :seen, :].mT
    c1, c2 = (None if c is None else c.unsqueeze(-2) for c in (c1, c2))
    P = mixed(S, c1, (u1, vt1, d1), shortcut1, slots, None)
    A, n = gate(P, kind, norm, eps)
    Y = mixed(A, c2, (u2, vt2, d2), shortcut2, slots, None)
    return scaled(Y @ v[..., :seen, :], n).squeeze(-2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*v.shape[:-2], v.shape[-1])


def _flops(q: Shape, k: Shape, v: Shape, position: Shape, *rest: Any, **_: Any) -> int:
    """Those of a full cache: shapes do not say how much of it is seen."""
    lead = torch.Size(q[:-2]).numel()
    return lead * k[-2] * hyper_pair((q[-2], v[-3]), q, v, rest[0], rest[4])


# As `fusedmlp::hyper_attention_step`, with any leading dimensions; no gradient.
step = define_for_cpu(
    f"hyper_attention_step_sliced(Tensor q, Tensor k, Tensor v, Tensor position, {_WIDTHS}, "
    "str kind, str norm, bool shortcut1, bool shortcut2, float eps) -> Tensor",
    _step,
    _fake,
    _flops,
)
