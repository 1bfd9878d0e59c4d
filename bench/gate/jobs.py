"""What the ahead-of-time gate compiles: calls of the real launchers at real sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels.arch import ARCHES, Arch
from ...kernels.arch.tile import SKINNY_M, Tile
from ...kernels.dense import gated_act, gated_linear, linear_act
from ...reference.activations import ACTIVATIONS

# Llama-3-8B's MLP; the ragged sizes keep no 16-byte alignment, so they take masked pointer loads.
M, D, H = 4096, 4096, 14336
RAGGED = 4093, 4093, 1021
KERNELS = ("gated_linear_fwd", "linear_act_fwd", "gated_linear_bwd", "linear_act_bwd")
# Compiled in more variants than the others.
THOROUGH = next(arch.name for arch in ARCHES.values() if arch.thorough)


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a launcher, planned for one tile of one architecture."""

    arch: Arch
    dtype: torch.dtype
    variant: str
    call: Callable[[], Any]
    key: tuple[str, int] | None = None
    tile: Tile | None = None


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)  # never touched, so it costs no memory


def _gemm_call(
    kernel: str, dtype: torch.dtype, m: int, d: int, h: int, activation: str, full: bool
) -> Callable[[], Any]:
    """A launcher's call. full: with biases and everything that training stores; else inference."""
    x, b = _empty(m, d, dtype=dtype), _empty(h, dtype=dtype)
    w, w_up = _empty(2 * h, d, dtype=dtype).chunk(2)
    down, pair, z = (
        _empty(d, h, dtype=dtype),
        _empty(2, m, h, dtype=dtype),
        _empty(m, h, dtype=dtype),
    )
    bias = b if full else None
    calls: dict[str, Callable[[], Any]] = {
        "gated_linear_fwd": lambda: gated_linear.gated_linear_fwd(
            x, w, w_up, bias, bias, activation, True, full
        ),
        "linear_act_fwd": lambda: linear_act.linear_act_fwd(x, w, bias, activation, True, full),
        "gated_linear_bwd": lambda: gated_linear.gated_linear_bwd(
            x, down, pair, activation, None, True, full
        ),
        "linear_act_bwd": lambda: linear_act.linear_act_bwd(x, down, z, activation, True, full),
    }
    return calls[kernel]


def _gemm_jobs(arch: Arch, activations: list[str]) -> Iterator[Job]:
    for key, tiles in arch.tiles.items():
        kernel, size = key
        if kernel not in KERNELS:
            continue
        for tile in tiles:
            m, d, h = (M, D, H) if tile.loads != "element" else RAGGED
            m = SKINNY_M if tile.skinny else m
            dtype = torch.bfloat16 if size == 2 else torch.float32

            def job(variant: str, activation: str, dtype: torch.dtype, full: bool) -> Job:
                call = _gemm_call(kernel, dtype, m, d, h, activation, full)  # noqa: B023
                return Job(arch, dtype, variant, call, key, tile)  # noqa: B023

            yield job("train", "silu", dtype, True)
            if tile == tiles[0] and arch.name == THOROUGH:
                yield job("infer", "silu", dtype, False)
                if size == 2:
                    yield job("train", "silu", torch.float16, True)
            if tile == tiles[0] and size == 2:
                for name in activations:
                    yield job(name, name, dtype, True)


def _odd_jobs(arch: Arch) -> Iterator[Job]:
    """What only some calls meet: sizes of 1, which Triton compiles in; weights contiguous along
    either dimension; packed gradients; g and u alone."""
    bf16 = torch.bfloat16
    for kernel in KERNELS:
        for size in ((1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)):
            call = _gemm_call(kernel, bf16, *size, "silu", True)
            yield Job(arch, bf16, "x".join(map(str, size)), call, (kernel, 2))
    x, w, wt = _empty(M, D, dtype=bf16), _empty(H, D, dtype=bf16), _empty(D, H, dtype=bf16)
    pair, halves = _empty(2, M, H, dtype=bf16), _empty(2 * H, D, dtype=bf16).chunk(2)
    fwd, bwd = gated_linear.gated_linear_fwd, gated_linear.gated_linear_bwd
    calls: dict[str, tuple[Any, ...]] = {
        "transposed": (fwd, x, wt.t(), w, None, None, "silu", True, True),
        "two boxes": (fwd, x, w, w, None, None, "silu", True, True),
        "g and u": (fwd, x, *halves, None, None, "silu", False, True),
        "transposed down": (bwd, x, w.t(), pair, "silu", None, True, True),
        "packed dgu": (bwd, x, wt, pair, "silu", "up_gate", False, True),
    }
    for variant, (launcher, *args) in calls.items():
        key = (launcher.__name__, 2)
        yield Job(arch, bf16, variant, functools.partial(launcher, *args), key)


def _elementwise_jobs(arch: Arch) -> Iterator[Job]:
    bwd, fwd = gated_act.gated_act_bwd, gated_act.gated_act_fwd
    for dtype in (torch.bfloat16, torch.float32):
        g = _empty(M, H, dtype=dtype)
        gate, up = _empty(M, 2 * H, dtype=dtype).chunk(2, 1)
        calls: dict[str, tuple[Any, ...]] = {
            "packed": (bwd, gate, gate, up, "silu", "up_gate"),
            "forward": (fwd, g, g, "silu"),
            "plain h": (linear_act.linear_act_h, g, "silu"),
            "plain dz": (linear_act.linear_act_dz, g, g, "silu"),
        }
        # Cheap to compile, and the same on every architecture: all activations on one.
        everywhere = dtype == torch.bfloat16 and arch.name == THOROUGH
        for name in ACTIVATIONS if everywhere else ("silu",):
            calls[name] = (bwd, g, g, g, name, None)
        for variant, (launcher, *args) in calls.items():
            yield Job(arch, dtype, variant, functools.partial(launcher, *args))


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    """Every job of one architecture. activations: those that the first tiles are compiled with."""
    yield from _gemm_jobs(arch, activations)
    yield from _elementwise_jobs(arch)
    if arch.name == THOROUGH:
        yield from _odd_jobs(arch)
