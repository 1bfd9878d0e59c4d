"""The T x T core of HyperGLU and HyperMLP in tiles: scores, mixing, gated relu, mixing, values.

With S = q k' over the visible sources s <= t, slots by lag p = L-1-(t-s), and per row t

    P = (shortcut1 + d1[p]) S + sum_k c1[t, k] h1[t, k] vt1[k, p],   h1 = S u1
    A = softplus(P2) relu(P1)  (kind "glu": sub-heads i and H + i),  or relu(P1)  (kind "relu")
    Y = (shortcut2 + d2[p]) A + sum_k c2[t, k] h2[t, k] vt2[k, p],   h2 = A u2
    out = Y v / |P1|

| tensor | shape | |
|---|---|---|
| q, k | (..., Q, T, dq) | any strides; Q = 2H for "glu", H for "relu" |
| v, out | (..., H, T, dv) | out has its heads side by side, as the next projection reads them |
| c1, u1, vt1, d1 | (..., Q, T, r1), (Q, L, r1), (Q, r1, L), (Q, L) | T <= L; d1 may be None |
| c2, u2, vt2, d2 | (..., H, T, r2), (H, L, r2), (H, r2, L), (H, L) | d2 may be None |

dtype: one floating dtype for all, kept; products, norms and gates in float32. Saved for backward:
the arguments, out, h1, h2 and n = 1 / |P1|, nothing of T x T; backward makes the scores again. As
out is saved, autograd refuses a backward through a result that was changed in place.
Source: Lu and Yang, HyperMLP, arXiv 2602.12601.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.derivatives import differentiable, save
from ..backends.flops import Shape, Shapes, hyper_gradients, hyper_scores
from ..backends.op import Op, kernel, register
from ..check import hyper as check_hyper
from ..kernels.hyper.plan import heads_last
from ..kernels.later import Later
from ..kernels.launches import hyper as launches
from ..reference.hyper import Kind, Norm

OP = "hyper_attention"
_triton, _triton_bwd = Later("hyper.hyper_attention"), Later("hyper.gradients")
NAMES = ("q", "k", "v", "c1", "u1", "vt1", "d1", "c2", "u2", "vt2", "d2")
Optional = Tensor | None


def _check_all(tensors: Sequence[Optional], kind: str, norm: str) -> None:
    q, k, v = tensors[:3]
    assert q is not None and k is not None and v is not None
    check_hyper.options(OP, kind, norm)
    if q.dim() < 3:
        raise ValueError(f"{OP}: q must be (..., Q, T, dq), got {tuple(q.shape)}")
    lead, (Q, T) = q.shape[:-3], q.shape[-3:-1]
    check.shape(OP, "k", k, *q.shape)
    H = check_hyper.heads(OP, kind, Q)
    if v.dim() < 3 or v.shape[:-1] != (*lead, H, T):
        raise ValueError(f"{OP}: v must be {(*lead, H, T)} + (dv,), got {tuple(v.shape)}")
    check_hyper.mixings(OP, tensors[3:7], tensors[7:11], lead, (Q, H), (T,), ("T", T))


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, c1: Optional, u1: Optional, vt1: Optional, d1: Optional,
    c2: Optional, u2: Optional, vt2: Optional, d2: Optional, normed: bool, shortcut1: bool,
    shortcut2: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _triton.hyper_attention_results(q, v, c1, c2, normed)


def _bwd_fake(
    do: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, c1: Optional, u1: Optional,
    vt1: Optional, d1: Optional, c2: Optional, u2: Optional, vt2: Optional, d2: Optional,
    h1: Tensor, h2: Tensor, n: Tensor, normed: bool, shortcut1: bool, shortcut2: bool, eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = (q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2)
    empty = lambda i, t: heads_last(t) if i < 3 else t.new_empty(t.shape)  # noqa: E731
    return [
        empty(i, t) if w and t is not None else q.new_empty(0)
        for i, (t, w) in enumerate(zip(tensors, wanted, strict=True))
    ]


def _fwd_flops(*arguments: Any) -> int:
    return hyper_scores(_named(arguments), visible=False)


def _bwd_flops(do: Shape, out: Shape, *arguments: Any) -> int:
    return hyper_gradients(_named(arguments), arguments[-1])


def _named(arguments: Sequence[Any]) -> Shapes:
    return {name: t for name, t in zip(NAMES, arguments, strict=False) if t is not None}


_TENSORS = "Tensor q, Tensor k, Tensor v, " + ", ".join(f"Tensor? {n}" for n in NAMES[3:])
_OPTIONS = "bool normed, bool shortcut1, bool shortcut2, float eps"
# -> out (B, H, T, dv); h1 (B, Q, T, r1), h2 (B, H, T, r2), n (B, H, T) in float32.
fwd = library.define(
    f"hyper_attention_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _triton.hyper_attention_fwd,
    _fwd_fake,
    flops=_fwd_flops,
    launches=launches.FORWARD,
)
# -> the gradients of NAMES, empty where not wanted.
bwd = library.define(
    f"hyper_attention_bwd(Tensor do, Tensor out, {_TENSORS}, Tensor h1, Tensor h2, Tensor n, "
    f"{_OPTIONS}, bool[] wanted) -> Tensor[]",
    _triton_bwd.hyper_attention_bwd,
    _bwd_fake,
    flops=_bwd_flops,
    launches=launches.BACKWARD,
)


def _formula(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    *mixings, normed, shortcut1, shortcut2, eps = rest
    kind = "relu" if q.shape[-3] == v.shape[-3] else "glu"
    norm = "out_scale" if normed else "none"
    options = ("offset", True, shortcut1, shortcut2, True, True, eps)
    return reference.hyper_attention(q, k, v, *mixings, kind, norm, *options)  # type: ignore[call-arg]


class HyperAttentionFunction(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, options = arguments[: len(NAMES)], arguments[len(NAMES) :]
        out, h1, h2, n = fwd(*arguments)
        save(ctx, tensors, options, h1, h2, n, out)
        return out

    @staticmethod
    @differentiable(_formula)
    def backward(ctx: Any, do: Tensor) -> tuple[Optional, ...]:
        *tensors, h1, h2, n, out = ctx.saved_tensors
        wanted = ctx.needs_input_grad[: len(NAMES)]
        grads = bwd(do, out, *tensors, h1, h2, n, *ctx.options, wanted)
        found = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return *found, None, None, None, None


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
    *,
    kind: Kind = "glu",
    norm: Norm = "out_scale",
    shortcut1: bool = True,
    shortcut2: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """Causal mixing of values by gated, norm-scaled scores, mixed by lag before and after.

    Args:
        q, k: (..., Q, T, dq), any strides, read in place.
        v: (..., H, T, dv), any strides; H = Q / 2 for kind "glu", Q for "relu".
        c1, u1, vt1, d1: the first mixing's control (..., Q, T, r1) and parameters (Q, L, r1),
            (Q, r1, L), (Q, L), L >= T; slot L-1 is lag 0. All None: none; d1 None: no diagonal.
        c2, u2, vt2, d2: the second's, with H for Q.
        kind: "glu" or "relu". norm: "out_scale" and "l2" divide rows by |P1|, "none" does not.
        shortcut1, shortcut2: whether a mixing adds its own input.
        eps: least |P1|.

    Returns out (..., H, T, dv) in q's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, kind, norm) or TypeError (dtype), naming the argument.

    All tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and keep
    products, norms and gates in float32. Source: Lu and Yang, HyperMLP, arXiv 2602.12601.

    Examples:
        >>> import torch
        >>> from fusedmlp import hyper_attention
        >>> H, T, L = 2, 8, 16  # heads, tokens, lags; kind "glu" has 2 H sub-heads
        >>> q, k = torch.randn(2, 2 * H, T, 16)
        >>> v = torch.randn(H, T, 32)
        >>> hyper_attention(q, k, v).shape  # without mixings
        torch.Size([2, 8, 32])
        >>> mixing = torch.randn(H, T, 4), torch.randn(H, L, 4), torch.randn(H, 4, L)
        >>> hyper_attention(q, k, v, c2=mixing[0], u2=mixing[1], vt2=mixing[2]).shape
        torch.Size([2, 8, 32])
    """
    tensors: tuple[Any, ...] = (q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2)
    if dtype := check.autocast_dtype(OP, q, "q"):
        tensors = check.cast(dtype, *tensors)
    check_hyper.like_q(OP, dict(zip(NAMES, tensors, strict=True)))
    _check_all(tensors, kind, norm)
    if choice.pick(OP, tensors[0], "q") == "reference":
        rest = ("offset", True, shortcut1, shortcut2, True, True, eps)
        return reference.hyper_attention(*tensors, kind, norm, *rest)  # type: ignore[call-arg]
    leading = q.dim() - 3
    flat = check_hyper.flat(tensors, leading)
    options = (norm != "none", shortcut1, shortcut2, eps)
    if check.wants_grad(*tensors):
        out = HyperAttentionFunction.apply(*flat, *options)
    else:
        out, *_ = fwd(*flat, *options)
    return out.view(*q.shape[:-3], *out.shape[1:])


register(
    Op(
        OP,
        hyper_attention,
        reference.hyper_attention,
        forward=(kernel(fwd),),
        backward=(kernel(bwd),),
        flops=lambda shapes: hyper_scores(shapes, visible=True),
        # As PyTorch counts its own attention, which does not look at the mask either.
        counted=lambda shapes: hyper_scores(shapes, visible=False),
    )
)
