"""Launches of the masked family; the fourth size is the number of masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..arch.tile import SKINNY_M
from ..later import Later
from ..launch import Extra, Launch, Shapes, Tensors, sizes_of_one
from ..masked.masked_gated_linear import masked_gated_linear_fwd
from ..masked.masks import pack_masks
from .dense import RAGGED, SIZE, new

M, D, H = SIZE
_BF16 = torch.bfloat16
_backward = Later("masked.backward")


def _shapes(masks: int, *names: str) -> Callable[..., Shapes]:
    """masks: how many the tile search is made with."""

    def shapes(M: int, D: int, H: int, n_m: int = masks) -> Shapes:
        every = {
            "x": (M, D), "w": (H, D), "planes": (H, -(-D // 8), n_m), "logits": (n_m, H, D),
            "ev": (1 + n_m, M, H), "gt": (1 + n_m, M, H), "dh": (M, H),
        }  # fmt: skip
        return {name: every[name] for name in names}

    return shapes


def _masks(t: Mapping[str, Tensor]) -> Tensor:
    """As 0 and 1, in the dtype of the rest."""
    return reference.unpack_masks(t["planes"].to(torch.uint8), t["w"].shape[1]).to(t["w"].dtype)


def _fwd(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    h, gt = masked_gated_linear_fwd(t["x"], t["w"], t["planes"], activation, True, training)
    return {"h": h, "gt": gt} if training else {"h": h}


def _fwd_reference(t: Mapping[str, Tensor]) -> Tensors:
    x, w, masks = t["x"], t["w"], _masks(t)
    h = reference.masked_gated_linear(x, w, masks > 0)
    gt = [F.linear(x, w), *(F.linear(x, m * w) for m in masks)]
    return {"h": h, "gt": torch.stack(gt)}


def _dx(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    return {"dx": _backward.masked_gated_linear_dx(t["ev"], t["w"], t["planes"])}


def _dx_reference(t: Mapping[str, Tensor]) -> Tensors:
    total, *es = t["ev"]
    terms = [total @ t["w"], *(e @ (m * t["w"]) for e, m in zip(es, _masks(t), strict=True))]
    return {"dx": torch.stack(terms).sum(0)}


def _dw(t: Mapping[str, Tensor], training: bool, activation: str = "silu") -> Tensors:
    w = t["w"]
    dw, dmasks = _backward.masked_gated_linear_dw(
        t["ev"], t["x"], w, t["planes"], True, True, w.dtype
    )
    return {"dw": dw, "dmasks": dmasks}


def _dw_reference(t: Mapping[str, Tensor]) -> Tensors:
    total, *es = t["ev"]
    gs = torch.stack([e.t() @ t["x"] for e in es])
    return {"dw": total.t() @ t["x"] + (_masks(t) * gs).sum(0), "dmasks": t["w"] * gs}


def _dw_extras() -> Iterator[Extra]:
    """One of its results alone, the masks' in float32."""
    for dtype in (_BF16, torch.float32):
        x, w = new(M, D, dtype=dtype), new(H, D, dtype=dtype)
        for variant, n_m, wanted in (
            ("dw", 4, (True, False)), ("dw of one mask", 1, (True, False)),
            ("dmasks", 4, (False, True)),
        ):  # fmt: skip
            ev, planes = new(1 + n_m, M, H, dtype=dtype), new(H, D // 8, n_m, dtype=torch.uint8)
            arguments = (ev, x, w, planes, *wanted, torch.float32)
            call = functools.partial(_backward.masked_gated_linear_dw, *arguments)
            yield f"{variant} alone", dtype, call


ONE = Launch(
    "masked_gated_linear_fwd", _fwd, _shapes(1, "x", "w", "planes"), (*SIZE, 1), (*RAGGED, 1),
    _fwd_reference, activated=True, odd=sizes_of_one(*SIZE, 1),
)  # fmt: skip
# A second pass keeps results of the first: eight masks strain the registers most.
GROUP = Launch(
    "masked_gated_linear_fwd_group", _fwd, _shapes(4, "x", "w", "planes"), (*SIZE, 8),
    (*RAGGED, 8), _fwd_reference, activated=True,
    odd={
        f"n_m={n_m}, M={m}": (m, D, H, n_m) for n_m in (2, 3, 4, 16) for m in (M, SKINNY_M)
    },
)  # fmt: skip
DX = Launch(
    "masked_gated_linear_dx", _dx, _shapes(2, "ev", "w", "planes"), (*SIZE, 1), (*RAGGED, 1),
    _dx_reference, odd=sizes_of_one(*SIZE, 1),
)  # fmt: skip
DW = Launch(
    "masked_gated_linear_dw", _dw, _shapes(2, "ev", "x", "w", "planes"), (*SIZE, 1), (*RAGGED, 1),
    _dw_reference, odd=sizes_of_one(*SIZE, 1), extras=_dw_extras,
)  # fmt: skip


# ---- elementwise


def _by_masks(call: Callable[..., object], *names: str) -> Callable[[], Iterator[Extra]]:
    """One mask and several, in both dtypes."""

    def extras() -> Iterator[Extra]:
        for n_m in (1, 4):
            for dtype in (_BF16, torch.float32):
                shapes = _shapes(n_m, *names)(*SIZE)
                operands = [new(*shape, dtype=dtype) for shape in shapes.values()]
                yield f"n_m={n_m}", dtype, functools.partial(call, *operands)

    return extras


def _ev(dh: Tensor, gt: Tensor) -> object:
    return _backward.masked_gated_linear_ev(dh, gt, "silu", True)


PACK = Launch("pack_masks", everywhere=_by_masks(pack_masks, "logits"))
EV = Launch("masked_gated_linear_ev", everywhere=_by_masks(_ev, "dh", "gt"))
