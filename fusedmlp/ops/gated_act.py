"""h = act(g) * u, elementwise.

| tensor | shape | |
|---|---|---|
| g, u | (..., H) | any strides; or g (..., 2H) with both halves, which may take turns, u = None |
| h | (..., H) | |

dtype: one floating dtype for all, kept; Triton computes in float32. Backward: du = dh * act(g), dg
= dh * u * act'(g). Saves g and u, overwrites neither. Source: Shazeer, GLU Variants, arXiv
2002.05202.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import check, reference
from ..backends import choice, library
from ..backends.derivatives import differentiable, save
from ..backends.flops import no_products
from ..backends.op import Op, kernel, register
from ..kernels.dense import gated_act as _triton
from ..kernels.launches import dense as launches
from ..packing import Packed, empty_pair, halves, rows, split_pair, unrows

OP = "gated_act"


def _check_pair(g: Tensor, u: Tensor) -> None:
    if u.shape != g.shape:
        raise ValueError(f"{OP}: u must have g's shape {tuple(g.shape)}, got {tuple(u.shape)}")


def _fwd_fake(g: Tensor, u: Tensor, activation: str) -> Tensor:
    _check_pair(g, u)
    return g.new_empty(g.shape)


def _bwd_fake(dh: Tensor, g: Tensor, u: Tensor, activation: str, packed: Packed | None) -> Tensor:
    _check_pair(g, u)
    return empty_pair(g, g.shape[0], g.shape[1], packed)


# Both take matrices: g, u and dh are (M, H).
fwd = library.define(
    "gated_act_fwd(Tensor g, Tensor u, str activation) -> Tensor",
    _triton.gated_act_fwd,
    _fwd_fake,
    flops=no_products,
    launches=(launches.ACT_FWD,),
)
bwd = library.define(
    "gated_act_bwd(Tensor dh, Tensor g, Tensor u, str activation, str? packed) -> Tensor",
    _triton.gated_act_bwd,
    _bwd_fake,
    flops=no_products,
    launches=(launches.ACT_BWD,),
)


def _forward(g: Tensor, u: Tensor | None, activation: str, packed: Packed | None) -> Tensor:
    gate, up = (g, u) if u is not None else halves(g, packed)  # type: ignore[arg-type]
    return fwd(gate, up, activation)


class GatedActFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, u: Tensor | None, activation: str, packed: Packed | None
    ) -> Tensor:
        save(ctx, (g, u), (activation, packed))
        return _forward(g, u, activation, packed)

    @staticmethod
    @differentiable(reference.gated_act)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        activation, packed = ctx.options
        gate, up = (g, u) if u is not None else halves(g, packed)
        dgu = bwd(dh, gate, up, activation, packed)
        if packed:
            return dgu, None, None, None
        need_g, need_u = ctx.needs_input_grad[:2]
        dg, du = split_pair(dgu, None)
        return dg if need_g else None, du if need_u else None, None, None


def gated_act(
    g: Tensor, u: Tensor | None = None, *, activation: str = "silu", packed: Packed | None = None
) -> Tensor:
    """act(g) * u.

    Args:
        g: gate pre-activation (..., H); or, with `packed`, both halves (..., 2H).
        u: up projection (..., H), or None with `packed`.
        activation: a name of `fusedmlp.reference.activations.ACTIVATIONS`, or one with
            parameters, as "clamped_swiglu(limit=10)": docs/gates.md has equations and defaults.
        packed: order of the halves of a packed g: "gate_up" or "up_gate", one behind the other, or
            "interleaved", where its columns are gate, up, gate, up, ... Read in place.

    Returns h (..., H) in g's dtype (under autocast: the autocast dtype).

    Raises ValueError (shape, device, activation, packed) or TypeError (dtype), naming the argument.

    Tensors have one floating dtype; the kernels take bfloat16, float16 and float32 and compute in
    float32. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Examples:
        >>> import torch
        >>> from fusedmlp import gated_act
        >>> g, u = torch.randn(2, 4, 64)
        >>> h = gated_act(g, u, activation="silu")
        >>> torch.allclose(h, torch.nn.functional.silu(g) * u, atol=1e-6)
        True
    """
    if dtype := check.autocast_dtype(OP, g, "g"):
        g, u = check.cast(dtype, g, u)  # type: ignore[assignment]
    check.like_x(OP, g, called="g", u=u)
    check.activation(OP, activation)
    check.packed(OP, "g", "u", u is None, packed)
    if g.dim() < 1:
        raise ValueError(f"{OP}: g must be (..., H), got a scalar")
    if u is not None:
        _check_pair(g, u)
    elif g.shape[-1] % 2:
        raise ValueError(f"{OP}: g must be (..., 2H) when packed, got {tuple(g.shape)}")
    if choice.pick(OP, g, "g") == "reference":
        return reference.gated_act(g, u, activation, packed)
    g2, u2 = rows(g), None if u is None else rows(u)
    apply = GatedActFunction.apply if check.wants_grad(g, u) else _forward
    h = apply(g2, u2, activation, packed)
    return unrows(h, g)


register(
    Op(
        OP,
        gated_act,
        reference.gated_act,
        forward=(kernel(fwd),),
        backward=(kernel(bwd),),
        flops=lambda shapes: 2 * prod(shapes["g"]) // (1 if "u" in shapes else 2),
        counted=no_products,
    )
)
