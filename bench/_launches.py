"""The launchers with a row in the tile table: how to call each, and what it must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..kernels.arch import Tile
from ..kernels.gated_linear import gated_linear_bwd, gated_linear_fwd
from ..kernels.linear_act import linear_act_bwd, linear_act_fwd
from . import _launches_moe

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


def _gated_fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    b_gate, b_up = (t["b_gate"], t["b_up"]) if training else (None, None)
    h, gu = gated_linear_fwd(t["x"], t["w_gate"], t["w_up"], b_gate, b_up, "silu", True, training)
    if not training:
        return {"h": h}
    return {"h": h, "g": gu[0], "u": gu[1]}


def _gated_fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    g, u = F.linear(t["x"], t["w_gate"], t["b_gate"]), F.linear(t["x"], t["w_up"], t["b_up"])
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _gated_bwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    dgu, h, db = gated_linear_bwd(t["dy"], t["w_down"], t["gu"], "silu", None, True, training)
    return {"dgu": dgu, "h": h, "db": db}


def _gated_bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu = t["gu"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    (dgu,) = torch.autograd.grad(h, gu, t["dy"] @ t["w_down"])
    return {"dgu": dgu, "h": h.detach(), "db": dgu.sum(1)}


def _plain_fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    h, z = linear_act_fwd(t["x"], t["w"], t["b"] if training else None, "gelu", True, training)
    return {"h": h, "z": z}


def _plain_fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {
        "h": reference.linear_act(t["x"], t["w"], t["b"]),
        "z": F.linear(t["x"], t["w"], t["b"]),
    }


def _plain_bwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    dz, h, db = linear_act_bwd(t["dy"], t["w_down"], t["z"], "gelu", True, training)
    return {"dz": dz, "h": h, "db": db}


def _plain_bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    z = t["z"].detach().requires_grad_()
    h = F.gelu(z)
    (dz,) = torch.autograd.grad(h, z, t["dy"] @ t["w_down"])
    return {"dz": dz, "h": h.detach(), "db": dz.sum(0, keepdim=True)}


LAUNCHES: dict[str, Launch] = {
    kernel: Launch(*call, _launches_moe.routing, _launches_moe.TILE_OF[kernel])
    for kernel, call in _launches_moe.CALLS.items()
} | {
    "gated_linear_fwd": Launch(
        lambda M, D, H: {
            "x": (M, D), "w_gate": (H, D), "w_up": (H, D), "b_gate": (H,), "b_up": (H,)
        },
        _gated_fwd,
        _gated_fwd_reference,
    ),
    "gated_linear_bwd": Launch(
        lambda M, D, H: {"dy": (M, D), "w_down": (D, H), "gu": (2, M, H)},
        _gated_bwd,
        _gated_bwd_reference,
    ),
    "linear_act_fwd": Launch(
        lambda M, D, H: {"x": (M, D), "w": (H, D), "b": (H,)}, _plain_fwd, _plain_fwd_reference
    ),
    "linear_act_bwd": Launch(
        lambda M, D, H: {"dy": (M, D), "w_down": (D, H), "z": (M, H)},
        _plain_bwd,
        _plain_bwd_reference,
    ),
}  # fmt: skip

# Last, since it needs what stands above.
from . import _launches_binary, _launches_hyper, _launches_masked  # noqa: E402, F401
