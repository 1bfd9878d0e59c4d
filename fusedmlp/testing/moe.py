"""Cases of the mixture of experts. The experts are called with each token's expert and prob, from
which the call itself makes the Routing: grouping tokens is part of what is tested and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._api import moe_linear, moe_mlp, top1_route, topk_route
from .case import Case, Draw, Shapes

EXPERTS = 3  # of the cases that tests run
# How tokens fall on experts.
SPREADS: dict[str, Callable[[int], Draw]] = {
    "uniform": lambda E: lambda shape, generator: _random(E, shape, generator),
    # Half of all tokens to one expert.
    "skewed": lambda E: lambda shape, generator: _random(2 * E, shape, generator).clamp(max=E - 1),
    # Every other expert has none.
    "sparse": lambda E: lambda shape, generator: 2 * _random((E + 1) // 2, shape, generator),
}


def _random(below: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=generator.device)


def _distinct(E: int, draw: Draw) -> Draw:
    """k experts a token, each once: the first as `draw` has it, the others behind a gap that
    differs from token to token."""

    def draw_each(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        T, k = shape
        first, gap = draw((T,), generator), _random(E - k + 1, (T,), generator)
        later = torch.arange(k, device=first.device)
        return (first.unsqueeze(1) + later + (later > 0) * gap.unsqueeze(1)) % E

    return draw_each


def _shapes(
    E: int, k: int, bias: bool, packed: bool, gated: bool
) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        N, choices = 2 * H if packed else H, (M,) if k == 1 else (M, k)
        named: Shapes = {"x": (M, D), "expert": choices, "prob": choices, "w_gate": (E, N, D)}
        if gated and not packed:
            named["w_up"] = (E, H, D)
        named["w_down"] = (E, D, H)
        if bias:
            named |= {"b_gate": (E, N), "b_down": (E, D)}
            if gated and not packed:
                named["b_up"] = (E, H)
        return named

    return shapes


def _adapt(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    expert, prob = arguments.pop("expert"), arguments.pop("prob")
    routing = functions.route_to(expert, prob, arguments["w_gate"].shape[0])
    return {"w_up": None, **arguments, "routing": routing}


def _adapt_linear(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    expert = arguments.pop("expert")
    ones = torch.ones(expert.shape, dtype=torch.float32, device=expert.device)
    return {**arguments, "routing": functions.route_to(expert, ones, arguments["w"].shape[0])}


def _adapt_topk(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    """Four experts a token, or all there are."""
    return {**arguments, "k": min(4, arguments["logits"].shape[-1])}


def route_case(name: str, **options: Any) -> Case:
    """A case of topk_route; options: those of the function."""
    return Case(
        name,
        topk_route,  # type: ignore[arg-type]  # as top1_route
        reference.topk_route,  # type: ignore[arg-type]
        lambda M, D, H: {"logits": (M, min(H, 128))},
        options,
        reference_options=tuple(options),
        adapt=_adapt_topk,
        result=lambda routing: routing.prob,
        out_shape=lambda M, D, H: (M, min(4, H)),
    )


def experts_case(
    name: str,
    experts: int = EXPERTS,
    spread: str = "uniform",
    k: int = 1,
    bias: bool = False,
    gated: bool = True,
    **options: Any,
) -> Case:
    """A case of moe_mlp with k experts a token; options: those of the function."""
    draw = SPREADS[spread](experts)
    return Case(
        name,
        moe_mlp,
        reference.moe_mlp,
        _shapes(experts, k, bias, "packed" in options, gated),
        options,
        draws={"expert": draw if k == 1 else _distinct(experts, draw)},
        adapt=_adapt,
        out_shape=lambda M, D, H: (M, D),
    )


def sized(experts: int, k: int, bias: bool) -> dict[str, Case]:
    """moe_mlp as a model has it, for benches; not among `cases`. The spread is that of a token's
    first expert; its others leave no expert empty."""
    own = f"moe_mlp-{experts}" if k == 1 else f"moe_mlp-{experts}-top{k}"
    suffix = "-bias" if bias else ""
    spreads = [spread for spread in SPREADS if k == 1 or spread != "sparse"]
    cases = (experts_case(f"{own}-{s}{suffix}", experts, s, k, bias) for s in spreads)
    return {case.name: case for case in cases}


def cases() -> Iterator[Case]:
    yield Case(
        "top1_route",
        top1_route,  # type: ignore[arg-type]  # `result` makes a tensor of what it returns
        reference.top1_route,  # type: ignore[arg-type]
        # As many experts as hidden columns, up to what models have.
        lambda M, D, H: {"logits": (M, min(H, 128))},
        result=lambda routing: routing.prob,
        out_shape=lambda M, D, H: (M,),
    )
    yield route_case("topk_route", norm=False, scale=2.0)
    yield route_case("topk_route-root", score="sqrtsoftplus", eps=1e-20)
    yield route_case("topk_route-sigmoid", score="sigmoid", eps=1e-20, scale=2.5)
    yield experts_case("moe_mlp")
    yield experts_case("moe_mlp-bias", spread="skewed", bias=True)
    yield experts_case("moe_mlp-up_gate-bias", spread="sparse", bias=True, packed="up_gate")
    yield experts_case("moe_mlp-interleaved-bias", bias=True, packed="interleaved")
    yield experts_case("moe_mlp-plain-recompute-bias", bias=True, gated=False, recompute=True)
    yield experts_case("moe_mlp-top2-bias", 4, "skewed", 2, bias=True)
    yield experts_case("moe_mlp-top4-gate_up-recompute", 4, k=4, packed="gate_up", recompute=True)
    yield experts_case("moe_mlp-top8-bias", 11, "sparse", 8, bias=True)
    yield Case(
        "moe_linear",
        moe_linear,
        reference.moe_linear,
        lambda M, D, H: {
            "x": (M, D), "expert": (M,), "w": (EXPERTS, H, D), "b": (EXPERTS, H)
        },
        draws={"expert": SPREADS["sparse"](EXPERTS)},
        adapt=_adapt_linear,
        out_shape=lambda M, D, H: (M, H),
    )  # fmt: skip
