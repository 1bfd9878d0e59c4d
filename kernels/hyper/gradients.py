"""The launches of hyper_attention's backward, and the sum of its diagonals' bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arch.tile import cdiv
from ..device import multiprocessors
from ..pick import hyper_tile
from ..plans import noted
from .backward import coefficient_kernel, dk_kernel, dq_kernel, dv_kernel, dz1_kernel, dz2_kernel
from .plan import Core, HyperCall, heads_last, mix_of, plan_launch, rows
from .slots import Bands, slots_kernel


def _fold(bands: Tensor, block: int, length: int, rank: int) -> Tensor:
    """(splits, heads, diagonals, 2 block, BLOCK_R) as (heads, length, rank), slots from the end.
    The lower half of a diagonal's band and the upper half of the next are the same lags."""
    total = bands.sum(0)
    lags = total[:, :, :block]
    lags[:, :-1] += total[:, 1:, block:]
    # Diagonal 0 holds the last slots.
    made = lags.flip(1).flatten(1, 2)[..., :rank]
    out = made.new_zeros((made.shape[0], length, rank))
    used = min(made.shape[1], length)
    out[:, length - used :] = made[:, made.shape[1] - used :]
    return out


class _Backward:
    """The launches of one backward: what each pass needs, made once."""

    def __init__(self, do: Tensor, core: Core, tensors: Sequence[Tensor | None], L: int,
                 options: tuple[bool, tuple[bool, bool], float]) -> None:  # fmt: skip
        q, _, v = tensors[:3]
        assert q is not None and v is not None
        self.do, self.core, self.q, self.v, self.L = do, core, q, v, L
        normed, shorts, self.eps = options
        c1, c2 = tensors[3], tensors[7]
        ranks = (0 if c1 is None else c1.shape[-1], 0 if c2 is None else c2.shape[-1])
        self.call = HyperCall(q, v, ranks, shorts, normed)
        self.B, self.H, self.T = v.shape[:3]
        self.coefficient = do.new_empty(0, dtype=torch.float32)

    def make_coefficient(self, out: Tensor) -> None:
        launch = plan_launch("hyper_attention_dz2", self.call)
        self.coefficient = self.do.new_empty((self.B, self.H, self.T), dtype=torch.float32)
        noted(coefficient_kernel)[cdiv(self.T, launch.plan.block) * self.B * self.H,](
            rows(self.do), rows(out), self.core.n_ptr, self.coefficient, self.T, self.eps,
            **launch.options,
        )  # fmt: skip

    def make_dz2(self, c: Tensor, dz: Tensor) -> None:
        launch = plan_launch("hyper_attention_dz2", self.call)
        noted(dz2_kernel)[launch.programs,](
            self.core, rows(self.do), rows(c), dz, launch.scratch(self.q, 2),
            self.B, self.T, self.L, **launch.options,
        )  # fmt: skip

    def make_dz1(self, c: Tensor, dz: Tensor) -> None:
        launch = plan_launch("hyper_attention_dz1", self.call)
        noted(dz1_kernel)[launch.programs,](
            self.core, rows(self.do), rows(c), dz, self.coefficient,
            launch.scratch(self.q, 5), self.B, self.T,
            self.L, **launch.options,
        )  # fmt: skip

    def score_grad(self, kernel: Any, name: str) -> Tensor:
        """dq or dk, heads side by side."""
        B, Q, T, dq = self.q.shape
        grad = heads_last(self.q)
        parts = cdiv(dq, min(hyper_tile(name, self.q).block_k, dq))
        launch = plan_launch(name, self.call, parts=parts)
        noted(kernel)[launch.programs,](
            self.core, rows(self.do), rows(grad), self.coefficient, launch.scratch(self.q, 10),
            B, T, self.L, parts, **launch.options,
        )  # fmt: skip
        return grad

    def dv(self) -> Tensor:
        B, H, T, dv = self.v.shape
        grad = heads_last(self.v)
        parts = cdiv(dv, min(hyper_tile("hyper_attention_dv", self.q).block_n, dv))
        launch = plan_launch("hyper_attention_dv", self.call, parts=parts)
        noted(dv_kernel)[launch.programs,](
            self.core, rows(self.do), rows(grad), launch.scratch(self.q, 6), B, T, self.L, parts,
            **launch.options,
        )  # fmt: skip
        return grad

    def slots(
        self,
        z2: Tensor,
        first: tuple[Tensor | None, ...] | None,
        second: tuple[Tensor | None, ...] | None,
    ) -> list[Tensor | None]:
        """du, dvt, dd of both mixings, from their (u, d); None for one that is not wanted."""
        name = "hyper_attention_dslots"
        tiles = cdiv(self.T, hyper_tile(name, self.q).block_m)
        wanted = 2 * multiprocessors(self.q.device)
        splits = max(1, min(self.B, wanted // (tiles * self.H)))
        launch = plan_launch(name, self.call, count=tiles * self.H * splits)
        plan = launch.plan

        def bands(pair: tuple[Tensor | None, ...] | None, block_r: int) -> Bands | None:
            if pair is None or pair[0] is None:
                return None
            shape = (splits, pair[0].shape[0], tiles, 2 * plan.block, block_r)
            du, dvt = (self.q.new_empty(shape, dtype=torch.float32) for _ in range(2))
            dd = None if pair[1] is None else self.q.new_empty(shape[:-1], dtype=torch.float32)
            return Bands(du, dvt, dd)

        made = (bands(first, plan.block_r1), bands(second, plan.block_r2))
        for which, band in ((1, made[0]), (2, made[0] if plan.glu else None), (3, made[1])):
            if band is not None:
                noted(slots_kernel)[launch.programs,](
                    self.core, rows(self.do), z2, band, self.coefficient,
                    launch.scratch(self.q, 6), self.B, splits, self.T, self.L, WHICH=which,
                    **launch.options,
                )  # fmt: skip
        grads: list[Tensor | None] = []
        for band, rank in zip(made, (plan.rank1, plan.rank2), strict=True):
            if band is None:
                grads += [None, None, None]
                continue
            fold = lambda t, r: _fold(t, plan.block, self.L, r).to(self.q.dtype)  # noqa: E731
            dd = None if band.dd is None else fold(band.dd[..., None], 1)[..., 0]
            grads += [fold(band.du, rank), fold(band.dvt, rank).mT.contiguous(), dd]
        return grads


def hyper_attention_bwd(
    do: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c1: Tensor | None,
    u1: Tensor | None,
    vt1: Tensor | None,
    d1: Tensor | None,
    c2: Tensor | None,
    u2: Tensor | None,
    vt2: Tensor | None,
    d2: Tensor | None,
    h1: Tensor,
    h2: Tensor,
    n: Tensor,
    normed: bool,
    shortcut1: bool,
    shortcut2: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2; empty where not `wanted`."""
    tensors = (q, k, v, c1, u1, vt1, d1, c2, u2, vt2, d2)
    grads: list[Tensor | None] = [None] * len(tensors)
    need = [w and t is not None for w, t in zip(wanted, tensors, strict=True)]
    if do.numel():
        dz1, dz2 = torch.empty_like(h1), torch.empty_like(h2)
        dh1, dh2 = (torch.empty_like(h, dtype=q.dtype) for h in (h1, h2))
        z1, z2, plain = (torch.empty_like(h, dtype=q.dtype) for h in (h1, h2, h2))
        if c1 is not None:
            torch.mul(h1, c1, out=z1)
        if c2 is not None:
            torch.mul(h2, c2, out=plain)
            torch.mul(h2 * n[..., None] if normed else h2, c2, out=z2)
        core = Core(
            rows(q), rows(k), rows(v),
            mix_of(u1, vt1, d1, z1, dh1), mix_of(u2, vt2, d2, z2, dh2), n,
            q.shape[-1], v.shape[-1],
        )  # fmt: skip
        L = next((u.shape[1] for u in (u1, u2) if u is not None), q.shape[2])
        run = _Backward(do, core, tensors, L, (normed, (shortcut1, shortcut2), eps))
        before_gate = any(need[:2]) or any(need[3:7])  # dP is needed
        if normed and before_gate:
            run.make_coefficient(out)
        if c2 is not None and (before_gate or any(need[7:])):
            run.make_dz2(c2, dz2)
        if c1 is not None and (any(need[:2]) or any(need[3:7])):
            run.make_dz1(c1, dz1)
        if need[0]:
            grads[0] = run.score_grad(dq_kernel, "hyper_attention_dq")
        if need[1]:
            grads[1] = run.score_grad(dk_kernel, "hyper_attention_dk")
        if need[2]:
            grads[2] = run.dv()
        grads[3] = (dz1 * h1).to(q.dtype) if need[3] else None
        grads[7] = (dz2 * h2).to(q.dtype) if need[7] else None
        grads[4:7], grads[8:11] = _pairs(
            run.slots(
                plain, (u1, d1) if any(need[4:7]) else None, (u2, d2) if any(need[8:]) else None
            )
        )
    else:
        grads = [None if t is None else torch.zeros_like(t) for t in tensors]
    return [g if g is not None and w else q.new_empty(0) for g, w in zip(grads, need, strict=True)]


def _pairs(six: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    return six[:3], six[3:]
