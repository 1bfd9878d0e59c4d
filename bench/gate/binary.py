"""The ahead-of-time gate's jobs of one-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels.arch import Arch
from ...kernels.arch.tile import SKINNY_M
from ...kernels.binary import backward as binary_bwd, binary_gated_linear, binary_linear
from .jobs import THOROUGH, Job, _empty

# Qwen3-8B's MLP; a ragged size takes masked element loads.
M, D, H = 4096, 4096, 12288
RAGGED = 4093, 4093, 1021
KERNELS = (
    "binary_linear_fwd",
    "binary_gated_linear_fwd",
    "binary_linear_dx",
    "binary_gated_mlp_bwd",
    "binary_linear_ds",
)


def _call(
    kernel: str, dtype: torch.dtype, size: tuple[int, int, int], activation: str, full: bool
) -> Callable[[], Any]:
    """A launcher's call. full: with biases and everything that training stores."""
    m, d, h = size

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = -(-columns // 128)
        words = _empty(rows, 4 * groups, dtype=torch.int32)
        return words, _empty(rows, groups, dtype=torch.float16)

    x, dh = _empty(m, d, dtype=dtype), _empty(m, h, dtype=dtype)
    b = _empty(h, dtype=dtype) if full else None
    w = weight(h, d)
    both: tuple[Any, ...] = (dh, *w, *((dh, *w) if full else (None, None, None)), d)
    calls: dict[str, Callable[[], Any]] = {
        "binary_linear_fwd": lambda: binary_linear.binary_linear_fwd(x, *w, b),
        "binary_gated_linear_fwd": lambda: binary_gated_linear.binary_gated_linear_fwd(
            x, *w, *w, b, b, activation, True, full
        ),
        "binary_linear_dx": lambda: binary_bwd.binary_linear_dx(*both),
        "binary_gated_mlp_bwd": lambda: binary_bwd.binary_gated_mlp_bwd(
            x, *weight(d, h), _empty(2, m, h, dtype=dtype), activation, full
        ),
        "binary_linear_ds": lambda: binary_bwd.binary_linear_ds(dh, x, w[0], torch.float16),
    }
    return calls[kernel]


def _gemm_jobs(arch: Arch, activations: list[str]) -> Iterator[Job]:
    for key, tiles in arch.tiles.items():
        kernel, size = key
        if kernel not in KERNELS:
            continue
        dtype = torch.bfloat16 if size == 2 else torch.float32
        for tile in tiles:
            m, d, h = (M, D, H) if tile.loads != "element" else RAGGED
            sizes = (SKINNY_M if tile.skinny else m, d, h)

            def job(variant: str, activation: str, dtype: torch.dtype, full: bool) -> Job:
                call = _call(kernel, dtype, sizes, activation, full)  # noqa: B023
                return Job(arch, dtype, variant, call, key, tile)  # noqa: B023

            yield job("train", "silu", dtype, True)
            if tile == tiles[0] and arch.name == THOROUGH:
                yield job("infer", "silu", dtype, False)
                if size == 2:
                    yield job("train", "silu", torch.float16, True)
            if tile == tiles[0] and size == 2 and "gated" in kernel:
                for name in activations:
                    yield job(name, name, dtype, True)


def _odd_jobs(arch: Arch) -> Iterator[Job]:
    """Sizes of 1, which Triton compiles in."""
    for kernel in KERNELS:
        for size in ((1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)):
            call = _call(kernel, torch.bfloat16, size, "silu", True)
            yield Job(arch, torch.bfloat16, "x".join(map(str, size)), call, (kernel, 2))


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    """Every job of one architecture. activations: those that the first tiles are compiled with."""
    yield from _gemm_jobs(arch, activations)
    if arch.name == THOROUGH:
        yield from _odd_jobs(arch)
