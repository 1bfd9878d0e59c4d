"""The T x T core of HyperGLU and HyperMLP: scores, mixing along the sequence, gated relu, mixing,
values.

| tensor | shape | |
|---|---|---|
| q, k | (..., Q, T, dq) | Q = 2H sub-heads for kind "glu", H for "relu" |
| v, result | (..., H, T, dv) | |
| c1, u1, vt1, d1 | (..., Q, T, r1), (Q, L, r1), (Q, r1, L), (Q, L) | all None: no first mixing |
| c2, u2, vt2, d2 | (..., H, T, r2), (H, L, r2), (H, r2, L), (H, L) | all None: no second mixing |

Every source s of row t has a slot p of u, vt and d: by its lag, p = L-1-(t-s), with aligner
"offset"; by its place, p = L-T+s, with "identity". One mixing takes a row X[t] to

    h[t, k] = sum_s X[t, s] u[p, k]
    Out[t, s] = [shortcut] X[t, s] + d[p] X[t, s] + sum_k c[t, k] h[t, k] vt[k, p]

Everything is written here over columns j = 0..T-1 that hold slot L-T+j: of row t in "offset" column
j is source t-(T-1)+j, in "identity" source j. Columns whose source would be negative hold zeros.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "hyper_attention",
    "hyper_attention_step",
]

Kind = Literal["glu", "relu"]
Norm = Literal["out_scale", "l2", "none"]
Aligner = Literal["offset", "identity"]
# u, vt and d of one mixing.
Mixing = tuple[Tensor | None, Tensor | None, Tensor | None]


def mixed(
    X: Tensor,
    c: Tensor | None,
    parameters: Mixing,
    shortcut: bool,
    slots: slice | Tensor,
    outside: Tensor | None,
) -> Tensor:
    """One mixing of laid-out rows X (..., rows, columns), whose columns hold `slots`; zero
    `outside`."""
    u, vt, d = parameters
    if c is None or u is None or vt is None:
        return X
    out = (X @ u[:, slots] * c) @ vt[..., slots]
    if d is not None:
        out = out + X * d[:, None, slots]
    if shortcut:
        out = out + X
    return out if outside is None else out.masked_fill(outside, 0)


def gate(P: Tensor, kind: Kind, norm: Norm, eps: float) -> tuple[Tensor, Tensor | None]:
    """(A, n): softplus(P2) relu(P1), or relu(P1) alone, and the factor 1 / |P1| that the result
    must still be multiplied by. The norm is taken in float32 at least: eps is 0 in float16. A row
    of zeros gives zeros whatever its factor; 1 / eps would overflow float16 in backward, so it is
    0 there."""
    P1, P2 = P.chunk(2, -3) if kind == "glu" else (P, None)
    n = None
    if norm != "none":
        wide = torch.promote_types(P.dtype, torch.float32)
        rho = torch.linalg.vector_norm(P1, dim=-1, keepdim=True, dtype=wide)
        n = torch.where(rho == 0, 0, 1 / rho.clamp_min(eps))
        if norm == "l2":
            P1, n = (P1 * n).to(P.dtype), None
    A = F.relu(P1)
    return A if P2 is None else F.softplus(P2) * A, n


def scaled(out: Tensor, n: Tensor | None) -> Tensor:
    return out if n is None else (out * n).to(out.dtype)


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c1: Tensor | None = None,
    u1: Tensor | None = None,
    vt1: Tensor | None = None,
    d1: Tensor | None = None,
    c2: Tensor | None = None,
    u2: Tensor | None = None,
    vt2: Tensor | None = None,
    d2: Tensor | None = None,
    kind: Kind = "glu",
    norm: Norm = "out_scale",
    aligner: Aligner = "offset",
    causal: bool = True,
    shortcut1: bool = True,
    shortcut2: bool = True,
    mask1: bool = True,
    mask2: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """Dense: T x T values for every head, each moved to its column by an explicit index."""
    T = q.shape[-2]
    row = torch.arange(T, device=q.device)[:, None]
    column = torch.arange(T, device=q.device)
    S = q @ k.mT
    if aligner == "offset":
        source = row - (T - 1) + column
        outside = source < 0
        S = S.gather(-1, source.clamp_min(0).expand_as(S)).masked_fill(outside, 0)
    else:
        outside = column > row
        S = S.masked_fill(outside, 0) if causal else S

    L = next((u.shape[-2] for u in (u1, u2) if u is not None), T)
    slots = slice(L - T, L)
    beyond1, beyond2 = (outside if causal and mask else None for mask in (mask1, mask2))
    P = mixed(S, c1, (u1, vt1, d1), shortcut1, slots, beyond1)
    A, n = gate(P, kind, norm, eps)
    Y = mixed(A, c2, (u2, vt2, d2), shortcut2, slots, beyond2)
    if aligner == "offset":
        place = column + (T - 1) - row
        Y = Y.gather(-1, place.clamp_max(T - 1).expand_as(Y)).masked_fill(place >= T, 0)
    return scaled(Y @ v, n)


def hyper_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    c1: Tensor | None = None,
    u1: Tensor | None = None,
    vt1: Tensor | None = None,
    d1: Tensor | None = None,
    c2: Tensor | None = None,
    u2: Tensor | None = None,
    vt2: Tensor | None = None,
    d2: Tensor | None = None,
    kind: Kind = "glu",
    norm: Norm = "out_scale",
    shortcut1: bool = True,
    shortcut2: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """Row t = position (1,) of `hyper_attention` in "offset": q (..., Q, dq), c1 (..., Q, r1),
    c2 (..., H, r2) are that token's, k (..., Q, N, dq) and v (..., H, N, dv) hold all tokens so
    far; what they hold past t is finite, and not seen. Result (..., H, dv)."""
    N = k.shape[-2]
    source = torch.arange(N, device=q.device)
    outside = source > position
    L = next((u.shape[-2] for u in (u1, u2) if u is not None), N)
    slots = (L - 1 - position + source).clamp(0, L - 1)
    S = (q.unsqueeze(-2) @ k.mT).masked_fill(outside, 0)
    c1, c2 = (None if c is None else c.unsqueeze(-2) for c in (c1, c2))
    P = mixed(S, c1, (u1, vt1, d1), shortcut1, slots, outside)
    A, n = gate(P, kind, norm, eps)
    Y = mixed(A, c2, (u2, vt2, d2), shortcut2, slots, outside)
    return scaled(Y @ v, n).squeeze(-2)
