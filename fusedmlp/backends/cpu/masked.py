"""Masked products of the experts in use, in one operation that torch.compile does not open.

| tensor | shape | |
|---|---|---|
| a | (R, D) | rows in expert order |
| w | (E, H, D) | |
| masks | (E, n_m, H, D), or bit planes (E, H, ceil(D / 8), n_m) | as in reference/masked.py |
| result | (1 + n_m, R, H) | a w[e]', a (m_i * w)[e]', ... |

Backward multiplies rows by the experts in use alone, but masks and weights of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.masked import hard_masks, unpack_masks
from ..library import define_for_cpu
from .grouped import busy, outer_op, product_op


def _hard(masks: Tensor, w: Tensor) -> Tensor:
    """(n_m, H, D) of one expert."""
    if not masks.is_floating_point():
        masks = unpack_masks(masks, w.shape[1])
    return hard_masks(masks, w.dtype)


def _masked(a: Tensor, w: Tensor, masks: Tensor, offsets: Tensor) -> Tensor:
    out = _fake(a, w, masks, offsets).zero_()
    for e, start, end in busy(offsets.tolist()):
        own = a[start:end]
        out[0, start:end] = F.linear(own, w[e])
        for i, m in enumerate(_hard(masks[e], w[e]), 1):
            out[i, start:end] = F.linear(own, m * w[e])
    return out


def _fake(a: Tensor, w: Tensor, masks: Tensor, offsets: Tensor) -> Tensor:
    n_m = masks.shape[1] if masks.is_floating_point() else masks.shape[3]
    return a.new_empty(1 + n_m, a.shape[0], w.shape[1])


def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    a, w, masks, offsets = ctx.saved_tensors
    need_a, need_w, need_masks, _ = ctx.needs_input_grad
    hard = masks if masks.is_floating_point() else _unpacked(masks, w.shape[2])
    da = product_op(d[0], w.mT, offsets) if need_a else None
    dw = outer_op(d[0], a, offsets) if need_w else None
    dmasks = []
    for one, m in zip(d[1:], hard_masks(hard, w.dtype).unbind(1), strict=True):
        if da is not None:
            da = da + product_op(one, (m * w).mT, offsets)
        if need_w or need_masks:
            own = outer_op(one, a, offsets)
            dw = None if dw is None else dw + m * own
            dmasks.append(own * w)
    return da, dw, torch.stack(dmasks, 1).to(masks.dtype) if need_masks else None, None


def _unpacked(planes: Tensor, D: int) -> Tensor:
    """Bool masks (E, n_m, H, D)."""
    E, H = planes.shape[:2]
    return unpack_masks(planes.flatten(0, 1), D).unflatten(1, (E, H)).transpose(0, 1)


masked_products = define_for_cpu(
    "experts_masked_products(Tensor a, Tensor w, Tensor masks, Tensor offsets) -> Tensor",
    _masked,
    _fake,
    lambda a, w, masks, offsets, out_shape=None, **_: 2 * out_shape[0] * a[0] * w[1] * w[2],
    _backward,
)
