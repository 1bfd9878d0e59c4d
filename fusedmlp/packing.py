"""Leading dimensions flattened, and gate and up of one block in one buffer.

An op returns gate and up as one tensor. Apart (packed=None) it is (2, M, H), each half contiguous;
packed it is (M, 2H) in the order of the packed weight, so that one GEMM takes it whole.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Packed = Literal["gate_up", "up_gate"]


def halves(t: Tensor, packed: Packed, dim: int = -1) -> tuple[Tensor, Tensor]:
    """(gate half, up half) of `t` along `dim`, as views."""
    first, second = t.chunk(2, dim)
    return (first, second) if packed == "gate_up" else (second, first)


def rows(t: Tensor) -> Tensor:
    """(..., D) as (M, D). A view, unless the leading dimensions cannot be merged by strides."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def empty_pair(like: Tensor, M: int, H: int, packed: Packed | None) -> Tensor:
    return like.new_empty((M, 2 * H) if packed else (2, M, H))


def empty_gated(like: Tensor, M: int, H: int, want_h: bool, want_gu: bool) -> tuple[Tensor, Tensor]:
    """h (M, H) and gu (2, M, H) of a gated projection, each with no rows if not wanted."""
    h = like.new_empty((M if want_h else 0, H))
    return h, empty_pair(like, M if want_gu else 0, H, None)


def split_pair(buffer: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor]:
    """(gate, up) as (M, H) views."""
    return halves(buffer, packed) if packed else (buffer[0], buffer[1])
