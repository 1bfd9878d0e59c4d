"""Positions turned into q and k: the published way, and a rotation."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(t: Tensor, base: float, kind: str, start: int | Tensor = 0) -> Tensor:
    """t (..., T, d), d even, with row i at position start + i.

    With f_i = base^(-2i/d) and pairs (2i, 2i + 1): "rotary" turns both members by f_i. "official"
    turns dimension j by f_{j mod d/2}, as published checkpoints have it: the members of a pair by
    different angles, so that lengths change and q.k is no function of the distance.
    """
    d = t.shape[-1]
    wide = torch.promote_types(t.dtype, torch.float32)
    i = torch.arange(d, device=t.device)
    i = i % (d // 2) if kind == "official" else i // 2
    frequency = base ** (-2.0 * i.to(wide) / d)
    position = start + torch.arange(t.shape[-2], device=t.device)
    angle = position.to(wide)[:, None] * frequency
    even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (t * angle.cos() + turned * angle.sin()).to(t.dtype)
