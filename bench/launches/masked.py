"""The launchers of the masked family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...kernels.masked.backward import masked_gated_linear_dw, masked_gated_linear_dx
from ...kernels.masked.masked_gated_linear import masked_gated_linear_fwd
from .launch import Launch, Shapes, Tensors


def _shapes(n_m: int, *names: str) -> Callable[[int, int, int], Shapes]:
    def shapes(M: int, D: int, H: int) -> Shapes:
        every = {"x": (M, D), "ev": (1 + n_m, M, H), "w": (H, D), "planes": (H, -(-D // 8), n_m)}
        return {name: every[name] for name in names}

    return shapes


def _masks(t: Mapping[str, Tensor]) -> Tensor:
    """As 0 and 1, in the dtype of the rest."""
    return reference.unpack_masks(t["planes"].to(torch.uint8), t["w"].shape[1]).to(t["w"].dtype)


def _fwd(t: Mapping[str, Tensor], training: bool) -> Tensors:
    h, gt = masked_gated_linear_fwd(t["x"], t["w"], t["planes"], "silu", True, training)
    return {"h": h, "gt": gt} if training else {"h": h}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    x, w, masks = t["x"], t["w"], _masks(t)
    h = reference.masked_gated_linear(x, w, masks > 0)
    gt = [F.linear(x, w), *(F.linear(x, m * w) for m in masks)]
    return {"h": h, "gt": torch.stack(gt)}


def _dx(t: Mapping[str, Tensor], training: bool) -> Tensors:
    return {"dx": masked_gated_linear_dx(t["ev"], t["w"], t["planes"])}


def _dx_reference(t: Mapping[str, Tensor]) -> Tensors:
    total, *es = t["ev"]
    terms = [total @ t["w"], *(e @ (m * t["w"]) for e, m in zip(es, _masks(t), strict=True))]
    return {"dx": torch.stack(terms).sum(0)}


def _dw(t: Mapping[str, Tensor], training: bool) -> Tensors:
    w = t["w"]
    dw, dmasks = masked_gated_linear_dw(t["ev"], t["x"], w, t["planes"], True, True, w.dtype)
    return {"dw": dw, "dmasks": dmasks}


def _dw_reference(t: Mapping[str, Tensor]) -> Tensors:
    total, *es = t["ev"]
    gs = torch.stack([e.t() @ t["x"] for e in es])
    return {"dw": total.t() @ t["x"] + (_masks(t) * gs).sum(0), "dmasks": t["w"] * gs}


LAUNCHES = {
    "masked_gated_linear_fwd": Launch(_shapes(1, "x", "w", "planes"), _fwd, _fwd_reference),
    "masked_gated_linear_fwd_group": Launch(_shapes(4, "x", "w", "planes"), _fwd, _fwd_reference),
    "masked_gated_linear_dx": Launch(_shapes(2, "ev", "w", "planes"), _dx, _dx_reference),
    "masked_gated_linear_dw": Launch(_shapes(2, "ev", "x", "w", "planes"), _dw, _dw_reference),
}
