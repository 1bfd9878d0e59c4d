"""A Routing beside the tokens and the experts that it is used for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import Routing

# The fields that a consumer may read, in their order; prob's dtype is x's or float32.
_FIELDS = (
    ("expert", torch.int64),
    ("prob", None),
    ("tokens", torch.int32),
    ("rows", torch.int32),
    ("offsets", torch.int32),
    ("counts", torch.int32),
)


def check_kind(op: str, routing: Routing) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"{op}: routing must be a Routing, got {type(routing).__name__}")


def check_routing(op: str, x: Tensor, routing: Routing, E: int, uses_prob: bool = True) -> None:
    """Every field of `routing` is one of x's tokens to E experts, on x's device; prob if used.

    Raises TypeError (kind, dtype) or ValueError (shape, device).
    """
    check_kind(op, routing)
    T, device = x.shape[:-1].numel(), x.device
    sizes = (T, T, T, T, E + 2, E)
    for (name, dtype), t, size in zip(_FIELDS, routing[:6], sizes, strict=True):
        if dtype is None and not uses_prob:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: routing.{name} must be a Tensor, got {type(t).__name__}")
        if t.shape != (size,):
            raise ValueError(
                f"{op}: routing.{name} must have shape {(size,)} for x's {T} tokens and the "
                f"weights' {E} experts, got {tuple(t.shape)}"
            )
        if dtype is not None and t.dtype is not dtype:
            raise TypeError(f"{op}: routing.{name} must be {dtype}, got {t.dtype}")
        if dtype is None and t.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{op}: routing.prob must have x's dtype {x.dtype} or torch.float32, got {t.dtype}"
            )
        if t.device != device:
            raise ValueError(f"{op}: routing.{name} must be on x's device {device}, got {t.device}")


def autocast_prob(routing: Routing, dtype: torch.dtype) -> Routing:
    """`routing` with a prob in 16 bits made autocast's; float32, which is more, stays."""
    prob = routing.prob
    if isinstance(prob, Tensor) and prob.dtype in (torch.bfloat16, torch.float16):
        return routing._replace(prob=prob.to(dtype))
    return routing
