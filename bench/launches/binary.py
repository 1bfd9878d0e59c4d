"""The launchers of one-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ... import reference
from ...kernels.binary.backward import binary_gated_mlp_bwd, binary_linear_ds, binary_linear_dx
from ...kernels.binary.binary_gated_linear import binary_gated_linear_fwd
from ...kernels.binary.binary_linear import binary_linear_fwd
from .launch import Launch, Shapes, Tensors


def _shapes(*names: str) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        groups, down = -(-D // 128), -(-H // 128)
        every: Shapes = {
            "x": (M, D), "b": (H,), "dh": (M, H), "dy": (M, D), "gu": (2, M, H),
            "q_gate": (H, 4 * groups), "s_gate": (H, groups),
            "q_up": (H, 4 * groups), "s_up": (H, groups),
            "q_down": (D, 4 * down), "s_down": (D, down),
        }  # fmt: skip
        return {name: every[name] for name in names}

    return shapes


def _weight(t: Mapping[str, Tensor], name: str, D: int) -> Tensor:
    scales = t[f"s_{name}"]
    return reference.dequantize_binary(t[f"q_{name}"].to(torch.int32), scales, D)


def _fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"y": binary_linear_fwd(t["x"], t["q_gate"], t["s_gate"], t["b"] if training else None)}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"y": reference.binary_linear(t["x"], t["q_gate"], t["s_gate"], t["b"])}


def _gated(t: Mapping[str, Tensor], training: bool) -> Tensors:
    weights = t["q_gate"], t["s_gate"], t["q_up"], t["s_up"]
    h, gu = binary_gated_linear_fwd(t["x"], *weights, None, None, "silu", True, training)
    return {"h": h, "g": gu[0], "u": gu[1]} if training else {"h": h}


def _gated_reference(t: Mapping[str, Tensor]) -> Tensors:
    g = reference.binary_linear(t["x"], t["q_gate"], t["s_gate"])
    u = reference.binary_linear(t["x"], t["q_up"], t["s_up"])
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _dx(t: Mapping[str, Tensor], training: bool) -> Tensors:
    width = t["x"].shape[1]
    return {"dx": binary_linear_dx(t["dh"], t["q_gate"], t["s_gate"], None, None, None, width)}


def _dx_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"dx": t["dh"] @ _weight(t, "gate", t["x"].shape[1])}


def _bwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    dgu, h = binary_gated_mlp_bwd(t["dy"], t["q_down"], t["s_down"], t["gu"], "silu", True)
    return {"dgu": dgu, "h": h}


def _bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu = t["gu"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    (dgu,) = torch.autograd.grad(h, gu, t["dy"] @ _weight(t, "down", gu.shape[2]))
    return {"dgu": dgu, "h": h.detach()}


def _ds(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"ds": binary_linear_ds(t["dh"], t["x"], t["q_gate"], t["x"].dtype)}


def _ds_reference(t: Mapping[str, Tensor]) -> Tensors:
    scales = t["s_gate"].detach().requires_grad_()
    y = reference.binary_linear(t["x"], t["q_gate"], scales)
    return {"ds": torch.autograd.grad(y, scales, t["dh"])[0]}


_GATE = ("q_gate", "s_gate")
LAUNCHES = {
    "binary_linear_fwd": Launch(_shapes("x", *_GATE, "b"), _fwd, _fwd_reference),
    "binary_gated_linear_fwd": Launch(
        _shapes("x", *_GATE, "q_up", "s_up"), _gated, _gated_reference
    ),
    "binary_linear_dx": Launch(_shapes("x", "dh", *_GATE), _dx, _dx_reference),
    "binary_gated_mlp_bwd": Launch(_shapes("dy", "q_down", "s_down", "gu"), _bwd, _bwd_reference),
    "binary_linear_ds": Launch(_shapes("x", "dh", *_GATE), _ds, _ds_reference),
}
