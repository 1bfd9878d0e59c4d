"""The ahead-of-time gate's jobs of the masked family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels import masked_gated_bwd, masked_gated_linear, masks
from ..kernels.arch import SKINNY_M


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)  # never touched, so it costs no memory


def gemm_call(
    kernel: str, dtype: torch.dtype, m: int, d: int, h: int, activation: str, full: bool
) -> Callable[[], Any]:
    """A launcher's call with the masks that strain it most: a second pass keeps two results of the
    first. full: with everything that training stores."""
    n_m = 4 if kernel.endswith("_group") else 1
    return masked_call(kernel, dtype, (m, d, h), n_m, activation, full)


def masked_call(
    kernel: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    n_m: int,
    activation: str,
    full: bool,
) -> Callable[[], Any]:
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


Call = tuple[str, torch.dtype, Callable[[], Any], tuple[str, int] | None]


def odd_calls(M: int, D: int, H: int) -> Iterator[Call]:
    """(variant, dtype, call, key): other numbers of masks, sizes of 1, logits of another dtype, and
    the kernels without tiles."""
    bf16 = torch.bfloat16
    group = "masked_gated_linear_fwd_group"
    for n_m in (2, 3, 8, 16):
        for m in (M, SKINNY_M):
            call = masked_call(group, bf16, (m, D, H), n_m, "silu", True)
            yield f"n_m={n_m}, M={m}", bf16, call, (group, 2)
    for kernel in ("masked_gated_linear_fwd", "masked_gated_linear_dx", "masked_gated_linear_dw"):
        for size in ((1, D, H), (1, 1, H), (M, 1, H), (M, D, 1)):
            call = masked_call(kernel, bf16, size, 1, "silu", True)
            yield "x".join(map(str, size)), bf16, call, (kernel, 2)
    ev, x, w = _empty(5, M, H, dtype=bf16), _empty(M, D, dtype=bf16), _empty(H, D, dtype=bf16)
    planes = _empty(H, D // 8, 4, dtype=torch.uint8)
    dw = functools.partial(masked_gated_bwd.masked_gated_linear_dw, ev, x, w, planes)
    for variant, wanted in (("dw", (True, False)), ("dmasks", (False, True))):
        call = functools.partial(dw, *wanted, torch.float32)
        yield f"{variant} alone", bf16, call, ("masked_gated_linear_dw", 2)
    for n_m in (1, 4):
        for dtype in (bf16, torch.float32):
            logits = _empty(n_m, H, D, dtype=dtype)
            yield f"n_m={n_m}", dtype, functools.partial(masks.pack_masks, logits), None
        gt, dh = _empty(1 + n_m, M, H, dtype=bf16), _empty(M, H, dtype=bf16)
        call = functools.partial(masked_gated_bwd.masked_gated_linear_ev, dh, gt, "silu", True)
        yield f"n_m={n_m}", bf16, call, None
