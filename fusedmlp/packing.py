"""Leading dimensions flattened, and gate and up of one block in one buffer.

An op returns gate and up as one tensor. Apart (packed=None) it is (2, M, H), each half contiguous;
packed it is (M, 2H) in the order of the packed weight, so that one GEMM takes it whole: one half
behind the other, or interleaved, where gate and up take turns and gate is first.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

Packed = Literal["gate_up", "up_gate", "interleaved"]
ORDERS: tuple[Packed, ...] = get_args(Packed)


def halves(t: Tensor, packed: Packed, dim: int = -1) -> tuple[Tensor, Tensor]:
    """(gate half, up half) of `t` along `dim`, as views."""
    if packed == "interleaved":
        pairs = t.unflatten(dim, (t.shape[dim] // 2, 2))
        gate, up = pairs.unbind(dim if dim < 0 else dim + 1)
        return gate, up
    first, second = t.chunk(2, dim)
    return (first, second) if packed == "gate_up" else (second, first)


def rows(t: Tensor) -> Tensor:
    """(..., D) as (M, D). A view, unless the leading dimensions cannot be merged by strides."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def unrows(t: Tensor, like: Tensor) -> Tensor:
    """(M, H) with the leading dimensions of `like`, whose `rows` there are M of."""
    return t if like.dim() == 2 else t.view(*like.shape[:-1], t.shape[-1])


def empty_pair(like: Tensor, M: int, H: int, packed: Packed | None) -> Tensor:
    return like.new_empty((M, 2 * H) if packed else (2, M, H))


def empty_gated(like: Tensor, M: int, H: int, want_h: bool, want_gu: bool) -> tuple[Tensor, Tensor]:
    """h (M, H) and gu (2, M, H) of a gated projection, each with no rows if not wanted."""
    h = like.new_empty((M if want_h else 0, H))
    return h, empty_pair(like, M if want_gu else 0, H, None)


def split_pair(buffer: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor]:
    """(gate, up) as (M, H) views."""
    return halves(buffer, packed) if packed else (buffer[0], buffer[1])


def join_pair(pair: Tensor, packed: Packed) -> Tensor:
    """(2, ..., H), gate first, as (..., 2H) in the packed order."""
    if packed == "interleaved":
        return pair.movedim(0, -1).flatten(-2)
    return (pair.flip(0) if packed == "up_gate" else pair).movedim(0, -2).flatten(-2)


def interleaved(gate: Tensor, up: Tensor | None, dim: int = -1) -> Tensor | None:
    """The tensor of which these are the even and the odd places along `dim`, if each even one lies
    just before its odd one in memory."""
    if up is None or gate.stride(dim) != 2 or up.stride() != gate.stride():
        return None
    if up.data_ptr() - gate.data_ptr() != gate.element_size():
        return None
    shape, strides = list(gate.shape), list(gate.stride())
    shape[dim], strides[dim] = 2 * shape[dim], 1
    return gate.as_strided(shape, strides)
