"""One step of decoding with hyper_attention: its row t, the newest token's, from a cache of keys
and values.

The formulas are those of ops/hyper_attention.py for one t; source s = 0..t has slot L-1-(t-s).

| tensor | shape | |
|---|---|---|
| q | (..., Q, dq) | the newest token's; Q = 2H for "glu", H for "relu" |
| k, v | (..., Q, N, dq), (..., H, N, dv) | any strides, the newest token's already there |
| position | (1,), int64 | t, from 0 to N-1, on q's device: never read by the host, never checked |
| c1, u1, vt1, d1 | (..., Q, r1), (Q, L, r1), (Q, r1, L), (Q, L) | N <= L; d1 may be None |
| c2, u2, vt2, d2 | (..., H, r2), (H, L, r2), (H, r2, L), (H, L) | d2 may be None |
| out | (..., H, dv) | |

dtype: one floating dtype for all but position, kept; everything in between in float32. The launches
depend on shapes alone, so a CUDA graph of a step serves every step. What k and v hold past t is not
read (the reference multiplies it by 0). For inference: the kernels have no gradient.
Source: Lu and Yang, HyperMLP, arXiv 2602.12601.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check, reference
from ..backends import choice, library
from ..backends.cpu import hyper as cpu
from ..backends.flops import Shape, Shapes, hyper_pair
from ..backends.op import Op, kernel, register
from ..check import hyper as check_hyper
from ..kernels.later import Later
from ..kernels.launches import hyper as launches
from ..reference.hyper import Kind, Norm
from .hyper_attention import NAMES

OP = "hyper_attention_step"
_triton = Later("hyper.hyper_attention_step")
Optional = Tensor | None


def _check_all(tensors: Sequence[Optional], position: Tensor, kind: str, norm: str) -> None:
    q, k, v = tensors[:3]
    assert q is not None and k is not None and v is not None
    check_hyper.options(OP, kind, norm)
    if q.dim() < 2:
        raise ValueError(f"{OP}: q must be (..., Q, dq), got {tuple(q.shape)}")
    *lead, Q, dq = q.shape
    if k.dim() != q.dim() + 1 or (*k.shape[:-2], k.shape[-1]) != q.shape:
        raise ValueError(f"{OP}: k must be {(*lead, Q)} + (N, {dq}), got {tuple(k.shape)}")
    H, N = check_hyper.heads(OP, kind, Q), k.shape[-2]
    if v.dim() != k.dim() or v.shape[:-1] != (*lead, H, N):
        raise ValueError(f"{OP}: v must be {(*lead, H, N)} + (dv,), got {tuple(v.shape)}")
    if not isinstance(position, Tensor) or position.dtype is not torch.int64:
        got = position.dtype if isinstance(position, Tensor) else type(position).__name__
        raise TypeError(f"{OP}: position must be an int64 Tensor, got {got}")
    check.shape(OP, "position", position, 1)
    if position.device != q.device:
        raise ValueError(f"{OP}: position must be on q's device {q.device}, got {position.device}")
    check_hyper.mixings(OP, tensors[3:7], tensors[7:11], q.shape[:-2], (Q, H), (), ("N", N))


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return _triton.step_result(q, v)


def _flops(q: Shape, k: Shape, v: Shape, position: Shape, *rest: Any) -> int:
    return q[0] * k[-2] * hyper_pair((q[-2], v[-3]), q, v, rest[0], rest[4])


_TENSORS = ", ".join(f"Tensor? {n}" for n in NAMES[3:])
# q (B, Q, dq), k and v (B, heads, N, width) -> out (B, H, dv)
step = library.define(
    f"hyper_attention_step(Tensor q, Tensor k, Tensor v, Tensor position, {_TENSORS}, bool normed, "
    "bool shortcut1, bool shortcut2, float eps) -> Tensor",
    _triton.hyper_attention_step,
    _fake,
    flops=_flops,
    launches=launches.STEPS,
)


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
    *,
    kind: Kind = "glu",
    norm: Norm = "out_scale",
    shortcut1: bool = True,
    shortcut2: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """Row `position` of `hyper_attention`, from that token's q, c1, c2 and a cache of k and v.

    Args:
        q: (..., Q, dq). k, v: (..., Q, N, dq), (..., H, N, dv), any strides.
        position: (1,), int64, on q's device; 0 to N - 1.
        c1, u1, vt1, d1: as in `hyper_attention`, but c1 (..., Q, r1); L >= N.
        c2, u2, vt2, d2: likewise, with H for Q.
        kind, norm, shortcut1, shortcut2, eps: as in `hyper_attention`.

    Returns out (..., H, dv) in q's dtype (under autocast: the autocast dtype, to which a cache in
    another is cast in every call).

    Raises ValueError (shape, device, kind, norm) or TypeError (dtype), naming the argument;
    RuntimeError where a gradient is wanted of the kernels.

    All tensors but position have one floating dtype; the kernels take bfloat16, float16 and float32
    and keep products, norms and gates in float32. Source: Lu and Yang, HyperMLP, arXiv 2602.12601.

    Examples:
        >>> import torch
        >>> from fusedmlp import hyper_attention, hyper_attention_step
        >>> H, T, L = 2, 8, 16  # heads, tokens, lags; kind "glu" has 2 H sub-heads
        >>> q, k = torch.randn(2, 2 * H, T, 16)
        >>> v = torch.randn(H, T, 32)
        >>> row = hyper_attention_step(q[:, 5], k, v, torch.tensor([5]))
        >>> torch.allclose(row, hyper_attention(q, k, v)[:, 5], rtol=1e-3, atol=1e-3)
        True
    """
    tensors: tuple[Any, ...] = (q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2)
    if dtype := check.autocast_dtype(OP, q, "q"):
        tensors = check.cast(dtype, *tensors)
    check_hyper.like_q(OP, dict(zip(NAMES, tensors, strict=True)))
    _check_all(tensors, position, kind, norm)
    q, k, v, *mixings = tensors
    if choice.pick(OP, q, "q") == "reference":
        rest: tuple[Any, ...] = (*mixings, kind, norm, shortcut1, shortcut2, eps)
        if choice.for_cpu(q) and not check.wants_grad(*tensors):
            return cpu.step(q, k, v, position, *rest)
        return reference.hyper_attention_step(q, k, v, position, *rest)
    if check.wants_grad(*tensors):
        raise RuntimeError(
            f"{OP}: the kernels have no gradient; call it under torch.no_grad(), or "
            "backend('reference')"
        )
    leading = q.dim() - 2
    flat = check_hyper.flat(tensors, leading)
    out = step(*flat[:3], position, *flat[3:], norm != "none", shortcut1, shortcut2, eps)
    return out.view(*q.shape[:-2], *out.shape[1:])


def _call_flops(shapes: Shapes) -> int:
    """The FLOPs of a step over a full cache."""
    q, k, v = (shapes[name] for name in NAMES[:3])
    pair = hyper_pair((q[-2], v[-3]), q, v, shapes.get("c1"), shapes.get("c2"))
    return math.prod(q[:-2]) * k[-2] * pair


register(
    Op(
        OP,
        hyper_attention_step,
        reference.hyper_attention_step,
        forward=(kernel(step),),
        flops=_call_flops,
    )
)
