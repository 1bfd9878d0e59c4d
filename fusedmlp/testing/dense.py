"""Cases of the dense family: gated and plain linears and their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .. import reference
from .._api import gated_act, gated_linear, gated_mlp, linear_act, mlp
from ..packing import ORDERS
from .case import Case, Shapes


def _act_shapes(packed: bool) -> Callable[[int, int, int], Shapes]:
    return lambda M, D, H: {"g": (M, 2 * H)} if packed else {"g": (M, H), "u": (M, H)}


def _gated_shapes(bias: bool, packed: bool, down: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        rows = 2 * H if packed else H
        named: Shapes = {"x": (M, D), "w_gate": (rows, D)}
        if not packed:
            named["w_up"] = (H, D)
        if down:
            named["w_down"] = (D, H)
        if bias:
            named["b_gate"] = (rows,)
            if not packed:
                named["b_up"] = (H,)
            if down:
                named["b_down"] = (D,)
        return named

    return shapes


def _plain_shapes(bias: bool, down: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        if not down:
            return {"x": (M, D), "w": (H, D)} | ({"b": (H,)} if bias else {})
        named: Shapes = {"x": (M, D), "w_in": (H, D), "w_out": (D, H)}
        return named | ({"b_in": (H,), "b_out": (D,)} if bias else {})

    return shapes


def cases() -> Iterator[Case]:
    orders = ORDERS
    fn: Callable[..., Tensor] = gated_act
    ref: Callable[..., Tensor] = reference.gated_act
    yield Case("gated_act", fn, ref, _act_shapes(False))
    for order in orders:
        yield Case(f"gated_act-{order}", fn, ref, _act_shapes(True), {"packed": order})

    for fn, ref, down in (
        (gated_linear, reference.gated_linear, False),
        (gated_mlp, reference.gated_mlp, True),
    ):
        name = fn.__name__
        yield Case(name, fn, ref, _gated_shapes(False, False, down))
        yield Case(f"{name}-bias", fn, ref, _gated_shapes(True, False, down))
        packed = _gated_shapes(True, True, down)
        for order in orders:
            yield Case(f"{name}-{order}-bias", fn, ref, packed, {"packed": order})
        if down:
            shapes, options = _gated_shapes(True, False, True), {"recompute": True}
            yield Case(f"{name}-recompute-bias", fn, ref, shapes, options)

    for fn, ref, down in ((linear_act, reference.linear_act, False), (mlp, reference.mlp, True)):
        name = fn.__name__
        yield Case(name, fn, ref, _plain_shapes(False, down))
        yield Case(f"{name}-bias", fn, ref, _plain_shapes(True, down))
        if down:
            shapes, options = _plain_shapes(True, True), {"recompute": True}
            yield Case(f"{name}-recompute-bias", fn, ref, shapes, options)
