"""The targets of a machine without a GPU: what is measured, beside what, and what it may be."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import (
    binary_linear,
    gated_mlp,
    masked_gated_mlp,
    moe_mlp,
    quantize_binary,
    route_to,
    top1_route,
    topk_route,
)
from ...hyperglu import HyperGLU, HyperGLUConfig
from ...hyperglu.chunked import chunked_attention
from ...layers import FastFeedForward, PathWeightedFFF, SwitchFFN
from ...testing.memory import kept_bytes
from . import clock, yardsticks
from .clock import Call

WIDTH = 256


@dataclass(frozen=True)
class Target:
    """measure: from the number of rounds to (value, what of it is spread). unit: "x" of a ratio."""

    name: str
    most: float
    measure: Callable[[int], tuple[float, str]]
    unit: str = "x"


def _ratio(name: str, most: float, make: Callable[[], tuple[Call, Call]]) -> Target:
    def measure(rounds: int) -> tuple[float, str]:
        torch.manual_seed(0)
        ours, theirs = make()
        found = clock.turns({"ours": ours, "theirs": theirs}, rounds)
        made = clock.ratio(found["ours"], found["theirs"])
        return made.middle, f"{made.low:.2f} to {made.high:.2f}"

    return Target(name, most, measure)


def _eval(run: Call) -> Call:
    def call() -> None:
        with torch.no_grad():
            run()

    return call


def _trained(run: Callable[[], Any], parameters: Sequence[Tensor], filled: bool = False) -> Call:
    """Forward and backward of the sum, gradients dropped as an optimizer drops them; `filled`:
    those that are missing are made 0 before, as a stack of experts has them."""

    def call() -> None:
        y = run()
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        for p in parameters:
            if filled and p.grad is None:
                p.grad = torch.zeros_like(p)
        for p in parameters:
            p.grad = None

    return call


def tree_of(depth: int) -> FastFeedForward:
    """Leaves of hidden width 64."""
    return FastFeedForward(WIDTH, depth, mult=0.25).eval()


def switch_of(E: int, **options: Any) -> SwitchFFN:
    return SwitchFFN(WIDTH, E, ff_kwargs={"mult": 1, "glu_variant": "swiglu", **options})


MASKED: dict[str, Any] = {
    "glu_variant": "mswiglu", "mask_mode": "element", "num_masks": 2, "bias": False
}  # fmt: skip
# Experts that are no single call; dropout is at work in training alone.
SWITCHES = {"": {}, " of masked experts": MASKED, " of experts with dropout": {"dropout": 0.1}}


def _trees() -> Iterator[Target]:
    def grown() -> tuple[Call, Call]:
        x = torch.randn(1, WIDTH)
        large, small = tree_of(9), tree_of(3)
        return _eval(lambda: large(x)), _eval(lambda: small(x))

    yield _ratio("FastFeedForward, one token: 512 experts / 8", 1.6, grown)
    for depth in (3, 5):

        def path(depth: int = depth) -> tuple[Call, Call]:
            tree, x = PathWeightedFFF(WIDTH, depth, WIDTH), torch.randn(1, WIDTH)
            return _eval(lambda: tree(x)), _eval(lambda: yardsticks.path_by_gathers(tree, x))

        yield _ratio(f"PathWeightedFFF depth {depth}, one token / mlp_utils' algorithm", 1.0, path)

    def route(rounds: int) -> tuple[float, str]:
        z = torch.randn(1, 64)
        found = clock.turns({"route": lambda: top1_route(z)}, rounds)["route"]
        return 1e6 * median(found), f"{1e6 * min(found):.1f} to {1e6 * max(found):.1f}"

    yield Target("top1_route, one token, E 64", 15, route, "us")


def _switch() -> Iterator[Target]:
    for kind, options in SWITCHES.items():

        def compiled(options: dict[str, Any] = options) -> tuple[Call, Call]:
            layer, x = switch_of(64, **options), torch.randn(256, WIDTH)
            layer.train("dropout" in options)
            made = torch.compile(layer)
            return _eval(lambda: made(x)), _eval(lambda: layer(x))

        yield _ratio(f"SwitchFFN{kind} E 64, T 256: compiled / eager", 1.1, compiled)
    for T, filled in ((1, False), (1, True), (256, False), (1024, False)):

        def looped(T: int = T, filled: bool = filled) -> tuple[Call, Call]:
            x, router = torch.randn(T, WIDTH), torch.randn(64, WIDTH, requires_grad=True)
            stacks = [torch.randn(64, WIDTH, WIDTH).mul_(0.06).requires_grad_() for _ in range(3)]
            apart = [[w[e].detach().clone().requires_grad_() for w in stacks] for e in range(64)]
            ours = lambda: moe_mlp(x, top1_route(F.linear(x, router)), *stacks)  # noqa: E731
            theirs = lambda: yardsticks.experts_loop(x, router, apart)  # noqa: E731
            return (
                _trained(ours, [router, *stacks]),
                _trained(theirs, [router, *(w for own in apart for w in own)], filled),
            )

        name = f"top-1 SwiGLU experts E 64, T {T}, forward + backward / loop over those in use"
        yield _ratio(name + ", zeros for the idle" * filled, 1.0, looped)


def experts_of(E: int, T: int, k: int = 2) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """Qwen3-MoE's experts, and the calls of ours and of transformers' three ways."""
    experts, ways = yardsticks.transformers_experts(E, WIDTH, k)
    x = torch.randn(T, WIDTH, requires_grad=True)
    chosen = topk_route(torch.randn(T, E), k)
    first, down = experts.gate_up_proj, experts.down_proj

    def ours() -> Tensor:
        routing = route_to(chosen.expert, chosen.prob, E)
        return moe_mlp(x, routing, first, None, down, packed="gate_up")  # type: ignore[arg-type]

    calls: dict[str, Callable[[], Tensor]] = {"ours": ours}
    for way, run in ways.items():
        calls[way] = lambda run=run: run(x, chosen.expert, chosen.prob)  # type: ignore[misc]
    return experts, calls


@functools.cache
def _experts_turns(E: int, T: int, phase: str, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    experts, calls = experts_of(E, T)
    own = list(experts.parameters())
    wrap = _eval if phase == "forward" else lambda call: _trained(call, own)
    return clock.turns({who: wrap(calls[who]) for who in ("ours", "grouped_mm", "eager")}, rounds)


def _experts() -> Iterator[Target]:
    shapes = itertools.product((8, 16, 64), (1, 64, 1024), ("forward", "forward + backward"))
    for (E, T, phase), (way, most) in itertools.product(
        shapes, (("grouped_mm", 1.05), ("eager", 1.1))
    ):

        def measure(
            rounds: int, shape: tuple[int, int, str] = (E, T, phase), way: str = way
        ) -> tuple[float, str]:
            found = _experts_turns(*shape, rounds)
            made = clock.ratio(found["ours"], found[way])
            return made.middle, f"{made.low:.2f} to {made.high:.2f}"

        yield Target(f"moe_mlp E {E}, T {T}, k 2, {phase} / transformers' {way}", most, measure)


def step_of(block_size: int, position: int) -> Call:
    """A step of HyperGLU at `position`, again and again."""
    layer = HyperGLU(HyperGLUConfig(n_embd=WIDTH, n_head=2, block_size=block_size)).eval()
    cache, token = layer.init_cache(1), torch.randn(1, WIDTH)

    def call() -> None:
        cache.length.fill_(position)
        layer.step(token, cache)

    return call


def chunks_of(T: int, chunk: int = 256) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """HyperGLU's core at WIDTH, two heads, ranks of 16; ours, and the published code's blocks
    recomputed for backward and kept."""
    Q, H, r = 4, 2, 16
    shapes = (
        (1, Q, T, WIDTH // 4 // Q), (1, Q, T, WIDTH // 4 // Q), (1, H, T, WIDTH // H),
        (1, Q, T, r), (Q, T, r), (Q, r, T), (Q, T), (1, H, T, r), (H, T, r), (H, r, T), (H, T),
    )  # fmt: skip
    tensors = [torch.randn(s).mul_(0.1).requires_grad_() for s in shapes]
    options: dict[str, Any] = {
        "kind": "glu", "norm": "out_scale", "shortcut1": True, "shortcut2": True, "eps": 1e-12,
        "aligner": "offset", "causal": True, "mask1": True, "mask2": True,
    }  # fmt: skip
    return tensors, {
        "ours": lambda: chunked_attention(*tensors, chunk=chunk, **options),
        "recomputed": lambda: yardsticks.hyper_in_chunks(tensors, chunk, True),
        "kept": lambda: yardsticks.hyper_in_chunks(tensors, chunk, False),
    }


def _chunks() -> Iterator[Target]:
    """At equal saved bytes, and the trade: half as much again at most for what is not kept."""
    for who, most in (("recomputed", 1.0), ("kept", 1.5)):

        def timed(who: str = who) -> tuple[Call, Call]:
            tensors, calls = chunks_of(1024)
            return _trained(calls["ours"], tensors), _trained(calls[who], tensors)

        name = "HyperGLU in chunks of 256, T 1024, forward + backward / the published blocks"
        yield _ratio(f"{name}, {who}", most, timed)

    def kept(_: int) -> tuple[float, str]:
        tensors, calls = chunks_of(1024)
        ours, theirs = (kept_bytes(calls[who], tensors) for who in ("ours", "kept"))
        return ours / theirs, f"counted, of {theirs / 2**20:.0f} MiB"

    name = "HyperGLU in chunks keeps beside its arguments / the published blocks"
    yield Target(f"{name}, kept", 0.1, kept)


def _others() -> Iterator[Target]:
    name = "HyperGLU.step at position 64: block_size 4096 / 256"
    yield _ratio(name, 1.1, lambda: (step_of(4096, 64), step_of(256, 64)))
    for M, most in ((1, 6.0), (256, 1.5)):

        def binary(M: int = M) -> tuple[Call, Call]:
            w, x = torch.randn(4096, 1024), torch.randn(M, 1024)
            packed = quantize_binary(w)
            return _eval(lambda: binary_linear(x, packed)), _eval(lambda: F.linear(x, w))

        yield _ratio(f"binary_linear 1024 to 4096, {M} rows, float32 / dense", most, binary)
    M, H = 512, 1024
    draw = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731

    def kept(make: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[float, str]:
        tensors = [draw(*shape) for shape in shapes]
        return kept_bytes(lambda: make(*tensors), tensors) / (4 * M * H), "counted"

    first, last, x = (H, WIDTH), (WIDTH, H), (M, WIDTH)
    yield Target(
        "gated_mlp keeps for backward", 2.1, lambda _: kept(gated_mlp, x, first, first, last), "M H"
    )
    yield Target(
        "masked_gated_mlp n_m 4 keeps for backward", 6,
        lambda _: kept(masked_gated_mlp, x, first, (4, *first), last), "M H",
    )  # fmt: skip


def targets() -> list[Target]:
    return [*_trees(), *_switch(), *_experts(), *_chunks(), *_others()]
