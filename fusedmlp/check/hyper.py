"""Argument errors that hyper_attention and its step share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import check

Optional = Tensor | None


def like_q(op: str, tensors: Mapping[str, Optional]) -> None:
    """Every tensor shares q's floating dtype and device; only q, k and v must be there."""
    q = tensors["q"]
    assert q is not None
    dtype, device = q.dtype, q.device
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: q must have a floating dtype, got {dtype}")
    for name, t in tensors.items():
        if t is None and name not in ("k", "v"):
            continue
        if not isinstance(t, Tensor) or t.dtype is not dtype:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{op}: {name} must have q's dtype {dtype}, got {got}")
        if t.device != device:
            raise ValueError(f"{op}: {name} must be on q's device {device}, got {t.device}")


def options(op: str, kind: str, norm: str) -> None:
    if kind not in ("glu", "relu"):
        raise ValueError(f"{op}: kind must be 'glu' or 'relu', got {kind!r}")
    if norm not in ("out_scale", "l2", "none"):
        raise ValueError(f"{op}: norm must be 'out_scale', 'l2' or 'none', got {norm!r}")


def heads(op: str, kind: str, Q: int) -> int:
    """H."""
    if kind == "glu" and Q % 2:
        raise ValueError(f"{op}: q must have an even number of sub-heads for 'glu', got {Q}")
    return Q // 2 if kind == "glu" else Q


def mixings(
    op: str,
    first: Sequence[Optional],
    second: Sequence[Optional],
    lead: torch.Size,
    heads: tuple[int, int],
    rows: tuple[int, ...],
    least: tuple[str, int],
) -> None:
    """The shape rule of both mixings' c (*lead, heads, *rows, r), u, vt and d. least: the name and
    the value of what L must reach."""
    L1 = _mixing(op, 1, first, (*lead, heads[0], *rows), heads[0], least)
    L2 = _mixing(op, 2, second, (*lead, heads[1], *rows), heads[1], least)
    if L1 is not None and L2 is not None and L1 != L2:
        raise ValueError(f"{op}: u1 and u2 must have one length L, got {L1} and {L2}")


def _mixing(
    op: str,
    n: int,
    mixing: Sequence[Optional],
    rows: tuple[int, ...],
    heads: int,
    least: tuple[str, int],
) -> int | None:
    """L."""
    c, u, vt, d = mixing
    if c is None:
        given = [f"{x}{n}" for x, t in zip(("u", "vt", "d"), mixing[1:], strict=True)
                 if t is not None]  # fmt: skip
        if given:
            raise ValueError(f"{op}: {given[0]} must be None without c{n}, got a tensor")
        return None
    if u is None or vt is None:
        raise ValueError(f"{op}: u{n} and vt{n} must be tensors with c{n}, got None")
    name, length = least
    if u.dim() != 3 or u.shape[0] != heads or u.shape[1] < length or u.shape[2] < 1:
        raise ValueError(
            f"{op}: u{n} must be ({heads}, L, r) with L >= {name} = {length}, got {tuple(u.shape)}"
        )
    L, r = u.shape[1:]
    check.shape(op, f"c{n}", c, *rows, r)
    check.shape(op, f"vt{n}", vt, heads, r, L)
    if d is not None:
        check.shape(op, f"d{n}", d, heads, L)
    return int(L)


def flat(tensors: Sequence[Optional], leading: int) -> Sequence[Optional]:
    """q, k, v, c1 and c2 with one leading dimension in place of so many."""
    if leading == 1:
        return tensors
    return [
        t
        if t is None or i not in (0, 1, 2, 3, 7)
        else t.reshape(math.prod(t.shape[:leading]), *t.shape[leading:])
        for i, t in enumerate(tensors)
    ]
