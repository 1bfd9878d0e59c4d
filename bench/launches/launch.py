"""How a launcher with a row in the tile table is called, and what it must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.arch.tile import Tile

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """shapes: operands from (M, D, H). call: with training, everything that training stores.
    routing: further operands, which are not drawn. tile_of: the table's choice, if not that of an
    (M, H) result. scales: what some operands are multiplied by when they are drawn. sizes: those to
    tune at, if not at an MLP's; checked: one to check at."""

    shapes: Callable[[int, int, int], Shapes]
    call: Callable[[Mapping[str, Tensor], bool], Tensors]
    reference: Callable[[Mapping[str, Tensor]], Tensors]
    routing: Callable[[tuple[int, int, int], torch.device], Tensors] = lambda shape, device: {}
    tile_of: Callable[[Tensor, tuple[int, int, int]], Tile] | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    sizes: tuple[tuple[int, int, int], ...] = ()
    checked: tuple[int, int, int] = (33, 48, 40)


def draw(
    launch: Launch, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Random operands of variance 1, weights scaled by their depth. Zeros would run faster."""
    generator = torch.Generator(device).manual_seed(0)
    operands = {}
    for name, dims in launch.shapes(*shape).items():
        if name == "planes":
            operands[name] = torch.randint(
                256, dims, generator=generator, device=device, dtype=torch.uint8
            )
            continue
        if name.startswith("q_"):
            operands[name] = torch.randint(
                -(1 << 31), 1 << 31, dims, generator=generator, device=device, dtype=torch.int32
            )
            continue
        t = (2 * torch.rand(dims, generator=generator, device=device) - 1) * 3**0.5
        t = t * launch.scales.get(name, 1)
        depth = dims[-2] if name == "w_down" else dims[-1]
        operands[name] = (t / depth**0.5 if name.startswith("w") else t).to(dtype)
    return operands | launch.routing(shape, device)
