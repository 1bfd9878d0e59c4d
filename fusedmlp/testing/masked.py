"""Cases of the masked family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._api import PackedMasks, masked_gated_linear, masked_gated_mlp
from .case import Case, Shapes


def _shapes(n_m: int, down: bool, bias: bool) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        named: Shapes = {"x": (M, D), "w": (H, D), "masks": (n_m, H, D)}
        if down:
            named["w_down"] = (D, H)
        if bias:
            named["b_down"] = (D,)
        return named

    return shapes


def _packed_shapes(n_m: int) -> Callable[[int, int, int], Shapes]:
    return lambda M, D, H: {"x": (M, D), "w": (H, D), "masks": (H, -(-D // 8), n_m)}


def _draw_planes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    device = generator.device
    planes = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
    planes[:, -1:] = 0  # which is right wherever D ends in the last octet
    return planes


def _adapt_planes(arguments: dict[str, Any], functions: Any) -> dict[str, Any]:
    planes, D = arguments["masks"], arguments["w"].shape[1]
    if functions is reference:
        return {**arguments, "masks": reference.unpack_masks(planes, D)}
    return {**arguments, "masks": PackedMasks(planes, D)}


def cases() -> Iterator[Case]:
    for n_m in (1, 4):  # one pass over x and w, and more
        yield Case(
            f"masked_gated_linear-{n_m}", masked_gated_linear, reference.masked_gated_linear,
            _shapes(n_m, False, False), straight_through=("masks",),
        )  # fmt: skip
    for suffix, bias, options in (("", False, {}), ("-recompute-bias", True, {"recompute": True})):
        yield Case(
            f"masked_gated_mlp-1{suffix}", masked_gated_mlp, reference.masked_gated_mlp,
            _shapes(1, True, bias), options, straight_through=("masks",),
        )  # fmt: skip
    for n_m in (1, 2, 4, 8):  # for inference: weights and bits are all that decoding reads
        yield Case(
            f"masked_gated_linear-{n_m}-bits", masked_gated_linear, reference.masked_gated_linear,
            _packed_shapes(n_m), draws={"masks": _draw_planes},
            adapt=_adapt_planes, out_shape=lambda M, D, H: (M, H),
        )  # fmt: skip
