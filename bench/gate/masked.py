"""The ahead-of-time gate's jobs of the masked family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...kernels.arch import Arch
from ...kernels.arch.tile import SKINNY_M
from ...kernels.masked import backward as masked_gated_bwd, masked_gated_linear, masks
from .jobs import RAGGED, THOROUGH, D, H, Job, M, _empty

KERNELS = (
    "masked_gated_linear_fwd",
    "masked_gated_linear_fwd_group",
    "masked_gated_linear_dx",
    "masked_gated_linear_dw",
)


def _call(
    kernel: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    n_m: int,
    activation: str,
    full: bool,
) -> Callable[[], Any]:
    """A launcher's call. full: with everything that training stores."""
    m, d, h = size
    x, w = _empty(m, d, dtype=dtype), _empty(h, d, dtype=dtype)
    planes = _empty(h, -(-d // 8), n_m, dtype=torch.uint8)
    ev = _empty(1 + n_m, m, h, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "masked_gated_linear_fwd": lambda: masked_gated_linear.masked_gated_linear_fwd(
            x, w, planes, activation, True, full
        ),
        "masked_gated_linear_dx": lambda: masked_gated_bwd.masked_gated_linear_dx(ev, w, planes),
        "masked_gated_linear_dw": lambda: masked_gated_bwd.masked_gated_linear_dw(
            ev, x, w, planes, True, full, dtype
        ),
    }
    return calls[kernel.removesuffix("_group")]


def _gemm_jobs(arch: Arch, activations: list[str]) -> Iterator[Job]:
    for key, tiles in arch.tiles.items():
        kernel, size = key
        if kernel not in KERNELS:
            continue
        dtype = torch.bfloat16 if size == 2 else torch.float32
        # A second pass keeps results of the first: eight masks strain the registers most.
        n_m = 8 if kernel.endswith("_group") else 1
        for tile in tiles:
            m, d, h = (M, D, H) if tile.loads != "element" else RAGGED
            sizes = (SKINNY_M if tile.skinny else m, d, h)

            def job(variant: str, activation: str, dtype: torch.dtype, full: bool) -> Job:
                call = _call(kernel, dtype, sizes, n_m, activation, full)  # noqa: B023
                return Job(arch, dtype, variant, call, key, tile)  # noqa: B023

            yield job("train", "silu", dtype, True)
            if tile == tiles[0] and arch.name == THOROUGH:
                yield job("infer", "silu", dtype, False)
                if size == 2:
                    yield job("train", "silu", torch.float16, True)
            if tile == tiles[0] and size == 2 and "_fwd" in kernel:
                for name in activations:
                    yield job(name, name, dtype, True)


def _odd_jobs(arch: Arch) -> Iterator[Job]:
    """Other numbers of masks, sizes of 1, results alone, and the kernels without tiles."""
    bf16 = torch.bfloat16
    group = "masked_gated_linear_fwd_group"
    for n_m in (2, 3, 4, 16):
        for m in (M, SKINNY_M):
            call = _call(group, bf16, (m, D, H), n_m, "silu", True)
            yield Job(arch, bf16, f"n_m={n_m}, M={m}", call, (group, 2))
    for kernel in ("masked_gated_linear_fwd", "masked_gated_linear_dx", "masked_gated_linear_dw"):
        for size in ((1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)):
            call = _call(kernel, bf16, size, 1, "silu", True)
            yield Job(arch, bf16, "x".join(map(str, size)), call, (kernel, 2))
    ev, x, w = _empty(5, M, H, dtype=bf16), _empty(M, D, dtype=bf16), _empty(H, D, dtype=bf16)
    planes = _empty(H, D // 8, 4, dtype=torch.uint8)
    dw = functools.partial(masked_gated_bwd.masked_gated_linear_dw, ev, x, w, planes)
    for variant, wanted in (("dw", (True, False)), ("dmasks", (False, True))):
        call = functools.partial(dw, *wanted, torch.float32)
        yield Job(arch, bf16, f"{variant} alone", call, ("masked_gated_linear_dw", 2))


def _elementwise_jobs(arch: Arch) -> Iterator[Job]:
    for n_m in (1, 4):
        for dtype in (torch.bfloat16, torch.float32):
            logits = _empty(n_m, H, D, dtype=dtype)
            yield Job(arch, dtype, f"n_m={n_m}", functools.partial(masks.pack_masks, logits))
            gt, dh = _empty(1 + n_m, M, H, dtype=dtype), _empty(M, H, dtype=dtype)
            call = functools.partial(masked_gated_bwd.masked_gated_linear_ev, dh, gt, "silu", True)
            yield Job(arch, dtype, f"n_m={n_m}", call)


def jobs_of(arch: Arch, activations: list[str]) -> Iterator[Job]:
    """Every job of one architecture. activations: those that the first tiles are compiled with."""
    yield from _gemm_jobs(arch, activations)
    yield from _elementwise_jobs(arch)
    if arch.name == THOROUGH:
        yield from _odd_jobs(arch)
