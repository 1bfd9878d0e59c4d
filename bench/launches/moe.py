"""The launchers of the mixture of experts for the tile search: 8 experts of M tokens, evenly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...kernels.arch.tile import Tile
from ...kernels.moe.backward import moe_dh, moe_wgrad
from ...kernels.moe.moe_mlp import moe_down, moe_up
from ...kernels.pick import pick_grouped_tile
from .launch import Launch, Shapes, Tensors

EXPERTS = 8
Shape = tuple[int, int, int]


def routing(shape: Shape, device: torch.device) -> Tensors:
    """Token t to expert t mod 8: every row is gathered from afar."""
    place = torch.arange(shape[0], device=device) % EXPERTS
    ones = torch.ones(place.shape, device=device)
    made = reference.route_to(place, ones, EXPERTS)
    return {"tokens": made.tokens, "offsets": made.offsets}


def tile_of(kernel: str, like: Tensor, shape: Shape) -> Tile:
    M, _, H = shape
    rows, groups = (H, 1) if kernel == "moe_wgrad" else (M, EXPERTS)
    return pick_grouped_tile(kernel, like, rows, groups, True)


def _each(t: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, slice]]:
    """(expert, its tokens, its rows)."""
    ends = t["offsets"].tolist()
    for e in range(EXPERTS):
        own = slice(ends[e], ends[e + 1])
        yield e, t["tokens"][own].long(), own


def _route(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return t["tokens"], t["offsets"]


def _up(t: Mapping[str, Tensor], training: bool) -> Tensors:
    b_gate, b_up = (t["b_gate"], t["b_up"]) if training else (None, None)
    h, gu = moe_up(t["x"], *_route(t), t["w_gate"], t["w_up"], b_gate, b_up, "silu", True, training)
    return {"h": h, "g": gu[0], "u": gu[1]} if training else {"h": h}


def _up_reference(t: Mapping[str, Tensor]) -> Tensors:
    linear = lambda k: torch.cat(  # noqa: E731
        [F.linear(t["x"][own], t[f"w_{k}"][e], t[f"b_{k}"][e]) for e, own, _ in _each(t)]
    )
    g, u = linear("gate"), linear("up")
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _down(t: Mapping[str, Tensor], training: bool) -> Tensors:
    y = moe_down(t["h"], *_route(t), t["w_down"], None, None, None, t["prob"], False)
    return {"y": y}


def _down_reference(t: Mapping[str, Tensor]) -> Tensors:
    y = t["h"].new_empty(t["h"].shape[0], t["w_down"].shape[1])
    for e, own, part in _each(t):
        y[own] = t["prob"][own].unsqueeze(1) * F.linear(t["h"][part], t["w_down"][e])
    return {"y": y}


def _dh(t: Mapping[str, Tensor], training: bool) -> Tensors:
    dgu, h, dprob, _, _ = moe_dh(
        t["dy"], *_route(t), t["prob"], t["w_down"], t["gu"], None, "silu", None, True, True,
        False, False,
    )  # fmt: skip
    return {"dgu": dgu, "h": h, "dprob": dprob}


def _dh_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu, prob = t["gu"].detach().requires_grad_(), t["prob"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    own = prob[t["tokens"].long()].unsqueeze(1)
    dh = torch.cat([t["dy"][own] @ t["w_down"][e] for e, own, _ in _each(t)])
    dgu, dprob = torch.autograd.grad(own * h, (gu, prob), dh)
    return {"dgu": dgu, "h": (own * h).detach(), "dprob": dprob}


def _wgrad(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"dw": moe_wgrad(t["dg"], t["x"], *_route(t), False, True)}


def _wgrad_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"dw": torch.stack([t["dg"][part].t() @ t["x"][own] for _, own, part in _each(t)])}


# kernel -> shapes of the operands that are drawn, call, reference
def _launch(kernel: str, shapes: Callable[..., Shapes], call: Any, expected: Any) -> Launch:
    return Launch(shapes, call, expected, routing, functools.partial(tile_of, kernel))


LAUNCHES = {
    kernel: _launch(kernel, *parts)
    for kernel, parts in {
        "moe_up": (
            lambda M, D, H: {
                "x": (M, D), "w_gate": (EXPERTS, H, D), "w_up": (EXPERTS, H, D),
                "b_gate": (EXPERTS, H), "b_up": (EXPERTS, H),
            },
            _up, _up_reference,
        ),
        "moe_down": (
            lambda M, D, H: {"h": (M, H), "w_down": (EXPERTS, D, H), "prob": (M,)},
            _down, _down_reference,
        ),
        "moe_dh": (
            lambda M, D, H: {
                "dy": (M, D), "prob": (M,), "w_down": (EXPERTS, D, H), "gu": (2, M, H)
            },
            _dh, _dh_reference,
        ),
        "moe_wgrad": (lambda M, D, H: {"dg": (M, H), "x": (M, D)}, _wgrad, _wgrad_reference),
    }.items()
}  # fmt: skip
