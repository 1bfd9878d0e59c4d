"""Launches of one-bit weights, at Qwen3-8B's MLP; a ragged size takes masked element loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ... import reference
from ..binary.binary_gated_linear import binary_gated_linear_fwd
from ..binary.binary_linear import binary_linear_fwd
from ..later import Later
from ..launch import Launch, Shapes, Tensors, sizes_of_one

SIZE = 4096, 4096, 12288
RAGGED = 4093, 4093, 1021
_backward = Later("binary.backward")


def _shapes(*names: str) -> Callable[..., Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        groups, down = -(-D // 128), -(-H // 128)
        every: Shapes = {
            "x": (M, D), "b": (H,), "dh": (M, H), "dy": (M, D), "gu": (2, M, H),
            "b_gate": (H,), "b_up": (H,),
            "q_gate": (H, 4 * groups), "s_gate": (H, groups),
            "q_up": (H, 4 * groups), "s_up": (H, groups),
            "q_down": (D, 4 * down), "s_down": (D, down),
        }  # fmt: skip
        return {name: every[name] for name in names}

    return shapes


def _weight(t: Mapping[str, Tensor], name: str, like: Tensor, D: int) -> Tensor:
    scales = t[f"s_{name}"]
    return reference.dequantize_binary(t[f"q_{name}"].to(torch.int32), scales, D).to(like.dtype)


def _fwd(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    return {"y": binary_linear_fwd(t["x"], t["q_gate"], t["s_gate"], t["b"] if training else None)}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    return {"y": reference.binary_linear(t["x"], t["q_gate"], t["s_gate"], t["b"])}


def _gated(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    b_gate, b_up = (t["b_gate"], t["b_up"]) if training else (None, None)
    weights = t["q_gate"], t["s_gate"], t["q_up"], t["s_up"], b_gate, b_up
    h, gu = binary_gated_linear_fwd(t["x"], *weights, activation, True, training)
    return {"h": h, "g": gu[0], "u": gu[1]} if training else {"h": h}


def _gated_reference(t: Mapping[str, Tensor]) -> Tensors:
    g = reference.binary_linear(t["x"], t["q_gate"], t["s_gate"], t["b_gate"])
    u = reference.binary_linear(t["x"], t["q_up"], t["s_up"], t["b_up"])
    return {"h": reference.gated_act(g, u), "g": g, "u": u}


def _dx(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    """Operands of two weights in training, as gate and up are; else of one."""
    dh, q, s = second = (t["dh"], t["q_gate"], t["s_gate"])
    dh2, q2, s2 = second if training else (None, None, None)
    return {"dx": _backward.binary_linear_dx(dh, q, s, dh2, q2, s2, t["x"].shape[1])}


def _dx_reference(t: Mapping[str, Tensor]) -> Tensors:
    one = t["dh"] @ _weight(t, "gate", t["dh"], t["x"].shape[1])
    return {"dx": one + one}


def _bwd(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    down = t["q_down"], t["s_down"]
    dgu, h = _backward.binary_gated_mlp_bwd(t["dy"], *down, t["gu"], activation, training)
    return {"dgu": dgu, "h": h}


def _bwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    gu = t["gu"].detach().requires_grad_()
    h = reference.gated_act(gu[0], gu[1])
    w = _weight(t, "down", gu, gu.shape[2])
    (dgu,) = torch.autograd.grad(h, gu, t["dy"] @ w)
    return {"dgu": dgu, "h": h.detach()}


def _ds(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    return {"ds": _backward.binary_linear_ds(t["dh"], t["x"], t["q_gate"], t["s_gate"].dtype)}


def _ds_reference(t: Mapping[str, Tensor]) -> Tensors:
    scales = t["s_gate"].detach().requires_grad_()
    y = reference.binary_linear(t["x"], t["q_gate"], scales)
    return {"ds": torch.autograd.grad(y, scales, t["dh"])[0]}


def _launch(
    name: str,
    call: Callable[..., Tensors],
    expected: Callable[[Mapping[str, Tensor]], Tensors],
    *operands: str,
) -> Launch:
    return Launch(
        name, call, _shapes(*operands), SIZE, RAGGED, expected, activated="gated" in name,
        odd=sizes_of_one(*SIZE),
    )  # fmt: skip


_GATE = ("q_gate", "s_gate")
FWD = _launch("binary_linear_fwd", _fwd, _fwd_reference, "x", *_GATE, "b")
GATED = _launch(
    "binary_gated_linear_fwd", _gated, _gated_reference,
    "x", *_GATE, "q_up", "s_up", "b_gate", "b_up",
)  # fmt: skip
DX = _launch("binary_linear_dx", _dx, _dx_reference, "x", "dh", *_GATE)
BWD = _launch("binary_gated_mlp_bwd", _bwd, _bwd_reference, "dy", "q_down", "s_down", "gu")
DS = _launch("binary_linear_ds", _ds, _ds_reference, "x", "dh", *_GATE)
