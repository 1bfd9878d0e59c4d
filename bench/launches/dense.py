"""The launchers of the dense family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...kernels.dense.gated_linear import gated_linear_bwd, gated_linear_fwd
from ...kernels.dense.linear_act import linear_act_bwd, linear_act_fwd
from .launch import Launch, Tensors


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
