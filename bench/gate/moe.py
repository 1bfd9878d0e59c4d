"""What the ahead-of-time gate compiles of the mixture of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels.arch import Arch
from ...kernels.moe import backward as moe_mlp_bwd, moe_mlp, top1_route
from .jobs import THOROUGH, Job, _empty

# Llama-4-Scout's experts; the ragged sizes take masked element loads.
T, D, H, E = 8192, 5120, 8192, 16
RAGGED = 8191, 5119, 1021
KERNELS = ("moe_up", "moe_down", "moe_dh", "moe_wgrad")


def _int32(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int32)


def _calls(
    dtype: torch.dtype, t: int, d: int, h: int, e: int, activation: str, full: bool
) -> dict[str, Callable[[], Any]]:
    """A call of each launcher. full: with biases and everything that training stores."""
    new = functools.partial(_empty, dtype=dtype)
    x, gate, up = new(t, d), *new(e, 2 * h, d).chunk(2, 1)
    down, pair, hidden, prob = new(e, d, h), new(2, t, h), new(t, h), new(t)
    tokens, offsets = _int32(t), _int32(e + 2)
    b = new(e, h) if full else None
    bd = new(e, d) if full else None
    return {
        "moe_up": lambda: moe_mlp.moe_up(
            x, tokens, offsets, gate, up, b, b, activation, True, full
        ),
        "moe_down": lambda: moe_mlp.moe_down(
            hidden, tokens, offsets, down, None, None, bd, prob, False
        ),
        "moe_dh": lambda: moe_mlp_bwd.moe_dh(
            x, tokens, offsets, prob, down, pair, bd, activation, None, True, True, full, full
        ),
        "moe_wgrad": lambda: moe_mlp_bwd.moe_wgrad(hidden, x, tokens, offsets, False, True),
    }


def _gemm_jobs(arch: Arch, activations: list[str]) -> Iterator[Job]:
    for key, tiles in arch.tiles.items():
        kernel, size = key
        if kernel not in KERNELS:
            continue
        dtype = torch.bfloat16 if size == 2 else torch.float32
        for tile in tiles:
            sizes = (T, D, H) if tile.loads != "element" else RAGGED
            yield Job(
                arch, dtype, "train", _calls(dtype, *sizes, E, "silu", True)[kernel], key, tile
            )
        if size == 2 and kernel in ("moe_up", "moe_dh"):
            for name in activations:
                call = _calls(dtype, T, D, H, E, name, True)[kernel]
                yield Job(arch, dtype, name, call, key, tiles[0])


def _odd_jobs(arch: Arch) -> Iterator[Job]:
    """Inference; plain experts; weights that cannot be stacked; dx, by two products and by one;
    rows gathered and scattered; sizes of 1; many experts."""
    bf16 = torch.bfloat16
    new = functools.partial(_empty, dtype=bf16)
    for kernel in KERNELS:
        for t, d, h, e in (
            (1, D, H, E),
            (T, 1, H, E),
            (T, D, 1, E),
            (T, D, H, 1),
            (T, 64, 64, 1024),
        ):
            call = _calls(bf16, t, d, h, e, "silu", True)[kernel]
            yield Job(arch, bf16, "x".join(map(str, (t, d, h, e))), call, (kernel, 2))
    x, hidden, prob, tokens, offsets = new(T, D), new(T, H), new(T), _int32(T), _int32(E + 2)
    gate, up, down, pair = new(E, H, D), new(E, H, D), new(E, D, H), new(2, T, H)
    route = (tokens, offsets)
    plain = (gate, None, None, None, "gelu", True, True)
    calls: dict[str, tuple[Any, ...]] = {
        "infer": (moe_mlp.moe_up, x, *route, gate, up, None, None, "silu", True, False),
        "two boxes": (moe_mlp.moe_up, x, *route, down.mT, up, None, None, "silu", True, True),
        "plain": (moe_mlp.moe_up, x, *route, *plain),
        "dx": (moe_mlp.moe_down, pair[0], *route, gate.mT, pair[1], up.mT, None, None, False),
        "gathered": (moe_mlp.moe_down, x, *route, gate, None, None, new(E, H), None, True),
        "plain dh": (
            moe_mlp_bwd.moe_dh, x, *route, prob, down, pair[:1], None, "gelu", None, True, True,
            False, False,
        ),
        "dWd": (moe_mlp_bwd.moe_wgrad, x, hidden, *route, True, False),
        "both gathered": (moe_mlp_bwd.moe_wgrad, x, x, *route, True, True),
        "bias": (moe_mlp_bwd.moe_bias_grad, x, *route),
    }  # fmt: skip
    for variant, (launcher, *args) in calls.items():
        key = (launcher.__name__, 2) if launcher.__name__ in KERNELS else None
        yield Job(arch, bf16, variant, functools.partial(launcher, *args), key)


def _route_jobs(arch: Arch) -> Iterator[Job]:
    for dtype in (torch.bfloat16, torch.float32):
        for e in (1, 16, 1024):
            logits, expert = _empty(T, e, dtype=dtype), _empty(T, dtype=torch.int64)
            one, each = _empty(e, dtype=torch.float32), _empty(T, dtype=torch.float32)
            calls: dict[str, tuple[Any, ...]] = {
                "route": (top1_route.top1_route_fwd, logits, None),
                "given": (top1_route.route_to_fwd, expert, e, 100),
                "backward": (top1_route.top1_route_bwd, logits, expert, each, one, each),
            }
            for variant, (launcher, *args) in calls.items():
                yield Job(arch, dtype, f"{variant} {e}", functools.partial(launcher, *args))


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    yield from _gemm_jobs(arch, activations)
    yield from _route_jobs(arch)
    if arch.name == THOROUGH:
        yield from _odd_jobs(arch)
