"""Launches of the mixture of experts, at Llama-4-Scout's; the fourth size is the number of experts.
The tile search has 8 experts of M tokens, evenly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...packing import halves
from ..arch.tile import Fit, Tile
from ..later import Later
from ..launch import Extra, Launch, Shapes, Size, Tensors, no_extras
from ..moe.moe_mlp import moe_combine, moe_down, moe_up
from ..moe.top1_route import route_to_fwd, top1_route_bwd, top1_route_fwd
from ..moe.topk_route import Choice, Form, topk_route_bwd, topk_route_fwd
from ..moe.tree_path import tree_path_fwd
from ..pick import pick_grouped_tile
from .dense import calls, new

EXPERTS = 8
T, D, H, E = SIZE = 8192, 5120, 8192, 16
RAGGED = 8191, 5119, 1021, E
_BF16, _FLOAT32 = torch.bfloat16, torch.float32
_backward = Later("moe.backward")
Call = Callable[[Mapping[str, Tensor], bool, str], Tensors]
Reference = Callable[[Mapping[str, Tensor]], Tensors]


def routing(size: Size, device: torch.device) -> Tensors:
    """Token t to expert t mod 8: every row is gathered from afar."""
    place = torch.arange(size[0], device=device) % EXPERTS
    ones = torch.ones(place.shape, device=device)
    made = reference.route_to(place, ones, EXPERTS)
    return {"tokens": made.tokens, "offsets": made.offsets}


def tile_of(kernel: str, like: Tensor, size: Size) -> Tile:
    M, _, H = size
    rows, groups = (H, 1) if kernel == "moe_wgrad" else (M, EXPERTS)
    return pick_grouped_tile(kernel, like, rows, groups, Fit.TMA)


def _shapes(*names: str) -> Callable[..., Shapes]:
    def shapes(M: int, D: int, H: int, E: int = EXPERTS) -> Shapes:
        every: Shapes = {
            "x": (M, D), "dy": (M, D), "h": (M, H), "dg": (M, H), "gu": (2, M, H), "prob": (M,),
            "w_gate+w_up": (E, 2 * H, D), "w_down": (E, D, H),
            "b_gate": (E, H), "b_up": (E, H), "b_down": (E, D),
            "tokens": (M,), "offsets": (E + 2,),
        }  # fmt: skip
        return {name: every[name] for name in (*names, "tokens", "offsets")}

    return shapes


def _each(t: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, slice]]:
    """(expert, its tokens, its rows)."""
    ends = t["offsets"].tolist()
    for e in range(EXPERTS):
        own = slice(ends[e], ends[e + 1])
        yield e, t["tokens"][own].long(), own


def _route(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return t["tokens"], t["offsets"]


def _up(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    b_gate, b_up = (t["b_gate"], t["b_up"]) if training else (None, None)
    weights = (t["w_gate"], t["w_up"], b_gate, b_up)
    tokens, offsets = _route(t)
    h, gu = moe_up(t["x"], tokens, offsets, *weights, activation, True, training)
    return {"h": h, "g": gu[0], "u": gu[1]} if training else {"h": h}


def _up_reference(t: Mapping[str, Tensor]) -> Tensors:
    linear = lambda k: torch.cat(  # noqa: E731
        [F.linear(t["x"][own], t[f"w_{k}"][e], t[f"b_{k}"][e]) for e, own, _ in _each(t)]
    )
    g, u = linear("gate"), linear("up")
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _up_extras() -> Iterator[Extra]:
    """Inference; plain experts; weights that cannot be stacked; 8 choices a token."""
    x, gate, up, down = new(T, D), new(E, H, D), new(E, H, D), new(E, D, H)
    first = (x, *_empty_route())
    arguments = {
        "infer": (*first, gate, up, None, None, "silu", True, False),
        "two boxes": (*first, down.mT, up, None, None, "silu", True, True),
        "plain": (*first, gate, None, None, None, "gelu", True, True),
        "top 8": (x, *_empty_route(8), gate, up, None, None, "silu", True, True),
    }
    return calls(moe_up, arguments)


# Tokens of so many experts that take each tile: 512 of one, 64, 16; and sizes not on 16 bytes.
_KINDS = {"": SIZE, " small": (64 * E, D, H, E), " few": (16 * E, D, H, E), " ragged": RAGGED}


def _interleaved_up() -> Iterator[Extra]:
    """Rows of gate and up in turn, along either dimension contiguous."""

    def arguments(w: Tensor, rows: int) -> tuple[Any, ...]:
        own, n, d = w.shape
        pairs = halves(w, "interleaved", 1), halves(new(own, n), "interleaved")
        return new(rows, d), *_route_of(rows), *pairs[0], *pairs[1], "silu", True, True

    yield from calls(moe_up, {"interleaved": arguments(new(E, 2 * H, D), T)})
    for kind, (t, d, h, e) in _KINDS.items():
        yield from calls(
            moe_up, {f"interleaved transposed{kind}": arguments(new(e, d, 2 * h).mT, t)}
        )


def _interleaved_dh() -> Iterator[Extra]:
    for kind, (t, d, h, e) in _KINDS.items():
        first = (new(t, d), *_route_of(t), new(t), new(e, d, h), new(2, t, h), new(e, d))
        arguments = (*first, "silu", "interleaved", True, True, True, True)
        yield from calls(_backward.moe_dh, {f"interleaved{kind}": arguments})


def _empty_route(k: int = 1) -> tuple[Tensor, Tensor]:
    return _route_of(k * T)


def _route_of(rows: int) -> tuple[Tensor, Tensor]:
    return new(rows, dtype=torch.int32), new(E + 2, dtype=torch.int32)


def _down(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    b = t["b_down"] if training else None
    y = moe_down(t["h"], *_route(t), t["w_down"], None, None, b, t["prob"], False)
    return {"y": y}


def _down_reference(t: Mapping[str, Tensor]) -> Tensors:
    y = t["h"].new_empty(t["h"].shape[0], t["w_down"].shape[1])
    for e, own, part in _each(t):
        made = F.linear(t["h"][part], t["w_down"][e], t["b_down"][e])
        y[own] = t["prob"][own].unsqueeze(1) * made
    return {"y": y}


def _down_extras() -> Iterator[Extra]:
    """dx, by two products; rows gathered; rows that stay in expert order."""
    x, gate, up, pair, route = new(T, D), new(E, H, D), new(E, H, D), new(2, T, H), _empty_route()
    arguments = {
        "dx": (pair[0], *route, gate.mT, pair[1], up.mT, None, None, False),
        "gathered": (x, *route, gate, None, None, new(E, H), None, True),
        "unordered": (pair[0], None, route[1], gate.mT, pair[1], up.mT, None, None, False),
    }
    return calls(moe_down, arguments)


def _dh(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    b = t["b_down"] if training else None
    dgu, h, dprob, _, _ = _backward.moe_dh(
        t["dy"], *_route(t), t["prob"], t["w_down"], t["gu"], b, activation, None, True, True,
        training, training,
    )  # fmt: skip
    return {"dgu": dgu, "h": h, "dprob": dprob}


def _dh_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu, prob = t["gu"].detach().requires_grad_(), t["prob"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    own = prob[t["tokens"].long()].unsqueeze(1)
    dh = torch.cat([t["dy"][own] @ t["w_down"][e] for e, own, _ in _each(t)])
    dgu, dprob = torch.autograd.grad(own * h, (gu, prob), dh)
    for e, place, _ in _each(t):
        dprob[place] += t["dy"][place] @ t["b_down"][e]
    return {"dgu": dgu, "h": (own * h).detach(), "dprob": dprob}


def _dh_extras() -> Iterator[Extra]:
    first = (new(T, D), *_empty_route(), new(T), new(E, D, H), new(2, T, H)[:1])
    plain = (*first, None, "gelu", None, True, True, False, False)
    many = (
        new(T, D), *_empty_route(8), new(8 * T), new(E, D, H), new(2, 8 * T, H), new(E, D), "silu",
        None, True, True, True, True,
    )  # fmt: skip
    return calls(_backward.moe_dh, {"plain dh": plain, "top 8": many})


def _wgrad(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    return {"dw": _backward.moe_wgrad(t["dg"], t["x"], *_route(t), False, True)}


def _wgrad_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"dw": torch.stack([t["dg"][part].t() @ t["x"][own] for _, own, part in _each(t)])}


def _wgrad_extras() -> Iterator[Extra]:
    """Rows gathered and not, in the other order."""
    x, hidden, route = new(T, D), new(T, H), _empty_route()
    arguments = {
        "dWd": (x, hidden, *route, True, False),
        "both gathered": (x, x, *route, True, True),
        "top 8": (new(8 * T, H), x, *_empty_route(8), False, True),
    }
    return calls(_backward.moe_wgrad, arguments)


def _launch(
    name: str, call: Call, expected: Reference, extras: Callable[[], Iterator[Extra]],
    *operands: str, activated: bool = False,
    everywhere: Callable[[], Iterator[Extra]] = no_extras,
) -> Launch:  # fmt: skip
    odd = ((1, D, H, E), (T, 1, H, E), (T, D, 1, E), (T, D, H, 1), (T, 64, 64, 1024))
    return Launch(
        name, call, _shapes(*operands), SIZE, RAGGED, expected, activated=activated,
        odd={"x".join(map(str, size)): size for size in odd}, extras=extras, values=routing,
        tile_of=functools.partial(tile_of, name), everywhere=everywhere,
    )  # fmt: skip


UP = _launch(
    "moe_up", _up, _up_reference, _up_extras, "x", "w_gate+w_up", "b_gate", "b_up",
    activated=True, everywhere=_interleaved_up,
)  # fmt: skip
DOWN = _launch("moe_down", _down, _down_reference, _down_extras, "h", "w_down", "b_down", "prob")
DH = _launch(
    "moe_dh", _dh, _dh_reference, _dh_extras, "dy", "prob", "w_down", "gu", "b_down",
    activated=True, everywhere=_interleaved_dh,
)  # fmt: skip
WGRAD = _launch("moe_wgrad", _wgrad, _wgrad_reference, _wgrad_extras, "dg", "x")


# ---- without tiles


def _bias_extras() -> Iterator[Extra]:
    return calls(_backward.moe_bias_grad, {"bias": (new(T, D), *_empty_route())})


def _combine_extras() -> Iterator[Extra]:
    """Sums of 8 choices: y, and dx; columns off 16 bytes; prob in float32."""
    rows, offsets = new(8 * T, dtype=torch.int32), new(E + 2, dtype=torch.int32)
    for name, dtype, columns, prob in (
        ("y", _BF16, D, new(8 * T, dtype=_BF16)),
        ("ragged y", _BF16, D - 1, new(8 * T, dtype=_FLOAT32)),
        ("dx", _FLOAT32, D, None),
    ):
        r = new(8 * T, columns, dtype=dtype)
        yield name, dtype, functools.partial(moe_combine, r, rows, offsets, prob, 8)


def _by_experts(call: Callable[[Tensor, int], Callable[[], Any]]) -> Callable[[], Iterator[Extra]]:
    """Few experts and many, logits in both dtypes."""

    def extras() -> Iterator[Extra]:
        for dtype in (_BF16, _FLOAT32):
            for experts in (1, 16, 1024):
                made = call(new(T, experts, dtype=dtype), experts)
                yield f"{experts} experts", dtype, made

    return extras


def _route_call(logits: Tensor, experts: int) -> Callable[[], Any]:
    return functools.partial(top1_route_fwd, logits, None)


def _given_call(logits: Tensor, experts: int) -> Callable[[], Any]:
    return functools.partial(route_to_fwd, new(T, dtype=torch.int64), experts, 100)


def _route_bwd_call(logits: Tensor, experts: int) -> Callable[[], Any]:
    expert, each = new(T, dtype=torch.int64), new(T, dtype=_FLOAT32)
    mean = new(experts, dtype=_FLOAT32)
    return functools.partial(top1_route_bwd, logits, expert, each, mean, each)


COMBINE = Launch("moe_combine", everywhere=_combine_extras)
BIAS = Launch("moe_bias_grad", everywhere=_bias_extras)
ROUTE = Launch("top1_route_fwd", everywhere=_by_experts(_route_call))
GIVEN = Launch("route_to_fwd", everywhere=_by_experts(_given_call))
ROUTE_BWD = Launch("top1_route_bwd", everywhere=_by_experts(_route_bwd_call))


# dtype, experts, k, whether with a bias: each form, few experts and many, groups and none.
_GROUPED = Form("sigmoid", True, 1e-20, 0.0, 2.5)
_FORMS: tuple[tuple[torch.dtype, int, int, bool, Form, Choice], ...] = (
    (_BF16, 1, 1, False, Form(norm=False), Choice()),
    (_BF16, 16, 2, False, Form(), Choice()),
    (_BF16, 128, 8, False, Form(), Choice()),
    (_FLOAT32, 160, 6, True, _GROUPED, Choice("score", 8, 3, "max")),
    (_FLOAT32, 256, 8, True, _GROUPED, Choice("score", 8, 4, "top2")),
    (_FLOAT32, 1024, 2, True, Form("sqrtsoftplus", False), Choice("logits")),
)


def _topk_extras() -> Iterator[Extra]:
    for dtype, experts, k, biased, form, chosen in _FORMS:
        bias = new(experts, dtype=_FLOAT32) if biased else None
        logits = new(T, experts, dtype=dtype)
        call = functools.partial(topk_route_fwd, logits, bias, k, None, form, chosen)
        yield f"{form.score} {k} of {experts}", dtype, call


def _topk_bwd_extras() -> Iterator[Extra]:
    for dtype, experts, k, _, form, _ in _FORMS:
        expert, each = new(T, k, dtype=torch.int64), new(T, k, dtype=dtype)
        logits, mean = new(T, experts, dtype=dtype), new(experts, dtype=_FLOAT32)
        lse = new(T, dtype=_FLOAT32)
        call = functools.partial(topk_route_bwd, logits, expert, each, mean, lse, form)
        yield f"{form.score} {k} of {experts}", dtype, call


TOPK = Launch("topk_route_fwd", everywhere=_topk_extras)
TOPK_BWD = Launch("topk_route_bwd", everywhere=_topk_bwd_extras)
_DEPTH = 5
TREE = Launch(
    "tree_path_fwd", lambda t, training: {"path": tree_path_fwd(t["logits"], _DEPTH)},
    lambda M, D, H: {"logits": (M, 2**_DEPTH - 1)}, (T, D, H),
)  # fmt: skip
