"""Argument errors of the ops over experts: weights, and a Routing beside the tokens and the experts
that it is used for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import check
from ..packing import Packed
from ..reference import Routing
from ..reference.lora import Lora
from . import lora as adapters

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


def check_one_choice(op: str, routing: Routing) -> None:
    """A token has one expert: (T,), or (T, 1)."""
    check_kind(op, routing)
    if isinstance(routing.expert, Tensor) and routing.k != 1:
        raise ValueError(
            f"{op}: routing must give each token one expert, k = 1, got k = {routing.k}; route_to "
            "takes one column of its expert"
        )


def check_routing(op: str, x: Tensor, routing: Routing, E: int, uses_prob: bool = True) -> None:
    """Every field of `routing` is one of x's tokens to E experts, on x's device; prob if used.
    expert and prob are (T,), or (T, k) of k experts a token.

    Raises TypeError (kind, dtype) or ValueError (shape, device).
    """
    check_kind(op, routing)
    T, device = math.prod(x.shape[:-1]), x.device
    choices, R = (T,), T
    if isinstance(routing.expert, Tensor) and routing.expert.dim() == 2:
        k = routing.expert.shape[1]
        choices, R = (T, k), T * k  # type: ignore[assignment]
    sizes = (choices, choices, (R,), (R,), (E + 2,), (E,))
    for (name, dtype), t, size in zip(_FIELDS, routing[:6], sizes, strict=True):
        if dtype is None and not uses_prob:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: routing.{name} must be a Tensor, got {type(t).__name__}")
        if t.shape != size:
            raise ValueError(
                f"{op}: routing.{name} must have shape {size} for x's {T} tokens and the "
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


Experts = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]


def check_experts(
    op: str, x: Tensor, experts: Experts, activation: str, packed: Packed | None
) -> int:
    """The rule of x and the experts' parameters, in moe_mlp's order. Returns E."""
    w_gate, w_up, w_down, b_gate, b_up, b_down = experts
    check.like_x(
        op, x, ("w_gate", "w_down"), w_gate=w_gate, w_up=w_up, w_down=w_down,
        b_gate=b_gate, b_up=b_up, b_down=b_down,
    )  # fmt: skip
    check.activation(op, activation, gated=w_up is not None or packed is not None)
    check.order(op, packed)
    for name, w in (("w_gate", w_gate), ("w_down", w_down)):
        if w.dim() != 3:
            raise ValueError(f"{op}: {name} must be (E, rows, columns), got {tuple(w.shape)}")
    E, N, D = w_gate.shape
    if E < 1:
        raise ValueError(f"{op}: w_gate must hold at least 1 expert, got {tuple(w_gate.shape)}")
    check.columns(op, "x", x, w_gate.shape, "D", "w_gate")
    if packed:
        if w_up is not None:
            raise ValueError(f"{op}: w_up must be None when packed, got a tensor")
        if N % 2:
            raise ValueError(f"{op}: w_gate must be (E, 2H, D) when packed, got {(E, N, D)}")
    elif w_up is not None:
        check.shape(op, "w_up", w_up, E, N, D)
    D_out, H = w_down.shape[1], N // 2 if packed else N
    if w_down.shape[0] == E and w_down.shape[2] != H:
        check.down_shape(op, "w_down", w_down.shape, H)
    check.shape(op, "w_down", w_down, E, D_out, H)
    if b_gate is not None:
        check.shape(op, "b_gate", b_gate, E, N)
    if w_up is None and b_up is not None:
        raise ValueError(f"{op}: b_up must be None where w_up is None, got a tensor")
    if b_up is not None:
        check.shape(op, "b_up", b_up, E, N)
    if b_down is not None:
        check.shape(op, "b_down", b_down, E, D_out)
    return E


def check_adapters(
    op: str, x: Tensor, given: Lora, experts: Experts, packed: Packed | None
) -> None:
    """Stacked adapters of experts that `check_experts` has passed."""
    _, w_up, w_down, *_ = experts
    E, D_out, H = w_down.shape
    names = ("gate",) if w_up is None and packed is None else ("gate", "up")
    sizes = {**dict.fromkeys(names, (H, x.shape[-1])), "down": (D_out, H)}
    adapters.check(op, x, given, sizes, E)
