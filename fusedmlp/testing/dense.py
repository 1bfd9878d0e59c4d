"""Cases of the dense family: gated and plain linears and their blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .. import reference
from .._api import Adapter, Lora, gated_act, gated_linear, gated_mlp, linear_act, mlp
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


# Projection -> rank and scale of its adapter.
Ranks = Mapping[str, tuple[int, float]]


def _lora_case(name: str, base: Case, ranks: Ranks) -> Case:
    """`base` with adapters: arguments w_gate_a, w_gate_b and so on, of which `lora` is made."""

    def shapes(M: int, D: int, H: int) -> Shapes:
        named = dict(base.shapes(M, D, H))
        for projection, (rank, _) in ranks.items():
            out, width = (D, H) if projection == "down" else (H, D)
            named |= {f"w_{projection}_a": (rank, width), f"w_{projection}_b": (out, rank)}
        return named

    def adapt(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
        rest, made = dict(arguments), {}
        for p, (_, scale) in ranks.items():
            made[p] = Adapter(rest.pop(f"w_{p}_a"), rest.pop(f"w_{p}_b"), scale)
        return {**rest, "lora": Lora(**made)}

    return dataclasses.replace(base, name=name, shapes=shapes, adapt=adapt)


def _lora_cases() -> Iterator[Case]:
    """Each subset of projections, ranks on both sides of a step over them, packed weights."""
    bare = Case("", gated_mlp, reference.gated_mlp, _gated_shapes(False, False, True))
    biased = dataclasses.replace(bare, shapes=_gated_shapes(True, False, True))
    packed = dataclasses.replace(bare, shapes=_gated_shapes(True, True, True))
    plain = Case("", mlp, reference.mlp, _plain_shapes(False, True))
    for name, base, ranks in (
        ("gated_mlp-lora", bare, {"gate": (8, 0.5), "up": (16, 0.5), "down": (64, 0.5)}),
        ("gated_mlp-lora-gate", bare, {"gate": (1, 2.0)}),
        ("gated_mlp-lora-down", bare, {"down": (256, 1.0)}),
        ("mlp-lora", plain, {"up": (256, 1.0), "down": (1, 0.5)}),
        ("mlp-lora-up", plain, {"up": (5, 2.0)}),
    ):
        yield _lora_case(name, base, ranks)
    for order, ranks in (
        ("gate_up", {"up": (16, 1.0), "down": (8, 1.0)}),
        ("up_gate", {"gate": (33, 1.0), "down": (1, 1.0)}),
        ("interleaved", {"gate": (3, 1.0), "up": (64, 2.0)}),
    ):
        options = {"packed": order}
        one = dataclasses.replace(packed, options=options)
        yield _lora_case(f"gated_mlp-{order}-lora-bias", one, ranks)
    for base, ranks in (
        (biased, {"gate": (16, 0.5), "up": (5, 2.0), "down": (16, 1.0)}),
        (
            dataclasses.replace(plain, shapes=_plain_shapes(True, True)),
            {"up": (16, 2.0), "down": (64, 0.5)},
        ),
    ):
        one = dataclasses.replace(base, options={"recompute": True})
        yield _lora_case(f"{base.op}-recompute-lora-bias", one, ranks)


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
    yield from _lora_cases()
