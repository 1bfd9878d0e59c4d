"""The launches of hyper_attention's backward, and the sum of its bands of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arch.tile import cdiv
from ..device import multiprocessors
from ..pick import hyper_tile
from ..plans import noted
from .backward import (
    coefficient_kernel,
    dz2_kernel,
    gate_kernel,
    scores_kernel,
    sum_kernel,
)
from .chunks import SCORE_GRADS, WEIGHTS, Chunk, chunks_of, planes_of
from .plan import Core, HyperCall, PassLaunch, heads_last, mix_of, plan_launch, rows
from .products import columns_kernel, dq_kernel
from .slots import Bands, slots_kernel


def _fold(bands: Tensor, length: int, rank: int) -> Tensor:
    """(B, heads, lag tiles, block, BLOCK_R) as (heads, length, rank): the first lag tile holds the
    last slots."""
    made = bands.sum(0).flip(1).flatten(1, 2)[..., :rank]
    out = made.new_zeros((made.shape[0], length, rank))
    used = min(made.shape[1], length)
    out[:, length - used :] = made[:, made.shape[1] - used :]
    return out


class _Backward:
    """The launches of one backward, chunk by chunk."""

    def __init__(self, do: Tensor, core: Core, tensors: Sequence[Tensor | None], L: int,
                 options: tuple[bool, tuple[bool, bool], float]) -> None:  # fmt: skip
        q, _, v, c1, _, _, _, c2 = tensors[:8]
        assert q is not None and v is not None
        self.do, self.core, self.q, self.v, self.L = do, core, q, v, L
        self.controls = (c1, c2)
        normed, shorts, self.eps = options
        ranks = (0 if c1 is None else c1.shape[-1], 0 if c2 is None else c2.shape[-1])
        self.call = HyperCall(q, v, ranks, shorts, normed)
        self.B, self.H, self.T = v.shape[:3]
        self.subs = q.shape[1] // self.H
        self.block = hyper_tile("hyper_attention_scores", q).block_m
        self.tiles = cdiv(self.T, self.block)
        self.chunks = chunks_of(self.B * self.H, self.tiles, multiprocessors(q.device))
        self.coefficient = do.new_empty(0, dtype=torch.float32)

    def make_coefficient(self, out: Tensor) -> None:
        launch = plan_launch("hyper_attention_scores", self.call)
        self.coefficient = self.do.new_empty((self.B, self.H, self.T), dtype=torch.float32)
        noted(coefficient_kernel)[self.tiles * self.B * self.H,](
            rows(self.do), rows(out), self.core.n_ptr, self.coefficient, self.T, self.eps,
            **launch.options,
        )  # fmt: skip

    def bands(self, u: Tensor | None, d: Tensor | None, block_r: int) -> Bands:
        """Memory for the slots' gradients of one mixing; nothing but None where none are wanted."""
        if u is None:
            return Bands(None, None, None)
        shape = (self.B, u.shape[0], self.tiles, self.block, block_r)
        du, dvt = (self.q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        return Bands(du, dvt, None if d is None else du.new_empty(shape[:-1]))

    def plan(self, name: str, chunk: Chunk, count: int, width: int = 0) -> PassLaunch:
        return plan_launch(
            f"hyper_attention_{name}", self.call, count=count * chunk.heads, width=width,
            block=self.block,
        )  # fmt: skip

    def planes(self) -> Tensor:
        """Memory for the largest chunk's tiles."""
        plan = plan_launch("hyper_attention_scores", self.call).plan
        most = max(chunk.elements(plan, planes_of(plan)) for chunk in self.chunks)
        return self.q.new_empty(most)

    def parts(self, chunk: Chunk, subs: int, block_r: int) -> Tensor:
        """Memory for what each segment adds to dz."""
        shape = (chunk.segments, subs, chunk.heads, chunk.rows, self.block, block_r)
        return self.q.new_empty(shape, dtype=torch.float32)

    def add_up(
        self, chunk: Chunk, mixing: int, parts: Tensor, dz: Tensor, launch: PassLaunch
    ) -> None:
        """dz of what `launch` left in parts."""
        noted(sum_kernel)[chunk.rows * chunk.heads * parts.shape[1],](
            self.core, rows(self.controls[mixing - 1]), dz, parts, *chunk, self.T, MIXING=mixing,
            **launch.options,
        )  # fmt: skip

    def make_dz2(self, chunk: Chunk, planes: Tensor, dz: Tensor) -> None:
        """dY, and with the second mixing dz2."""
        launch = self.plan("dz2", chunk, chunk.rows * chunk.segments, self.v.shape[-1])
        parts = self.parts(chunk, 1, launch.plan.block_r2) if launch.plan.rank2 else None
        noted(dz2_kernel)[launch.programs,](
            self.core, rows(self.do), launch.rings(self.q), planes, parts, *chunk, self.T, self.L,
            **launch.options,
        )  # fmt: skip
        if parts is not None:
            self.add_up(chunk, 2, parts, dz, launch)

    def make_scores(self, chunk: Chunk, planes: Tensor) -> None:
        count = chunk.rows * self.subs * chunk.segments
        launch = self.plan("scores", chunk, count, self.q.shape[-1])
        noted(scores_kernel)[launch.programs,](self.core, planes, *chunk, self.T, **launch.options)

    def gate(self, chunk: Chunk, planes: Tensor, dz: Tensor, grads: bool) -> None:
        """A; with `grads` dP and, with the first mixing, dz1."""
        launch = self.plan("gate", chunk, chunk.rows * chunk.segments, self.block)
        summed = grads and launch.plan.rank1 > 0
        parts = self.parts(chunk, self.subs, launch.plan.block_r1) if summed else None
        noted(gate_kernel)[launch.programs,](
            self.core, self.coefficient, planes, parts, *chunk, self.T, self.L, GRADS=grads,
            **launch.options,
        )  # fmt: skip
        if parts is not None:
            self.add_up(chunk, 1, parts, dz, launch)

    def mix(self, chunk: Chunk, mixing: int, planes: Tensor, bands: Bands) -> None:
        """The slots' gradients of one mixing, and dS or Y."""
        subs = self.subs if mixing == 1 else 1
        launch = self.plan("dslots", chunk, chunk.high * subs)
        noted(slots_kernel)[launch.programs,](
            self.core, bands, planes, *chunk, self.T, self.L, self.tiles, MIXING=mixing,
            WANTED=bands.du is not None, **launch.options,
        )  # fmt: skip

    def dq(self, chunk: Chunk, planes: Tensor, grad: Tensor) -> None:
        width = self.q.shape[-1]
        parts = cdiv(width, min(hyper_tile("hyper_attention_dq", self.q).block_k, width))
        count = chunk.rows * self.subs * parts
        launch = self.plan("dq", chunk, count, width)
        noted(dq_kernel)[launch.programs,](
            self.core.k, rows(grad), planes, *chunk, self.T, parts, **launch.options
        )

    def columns(self, chunk: Chunk, planes: Tensor, grad: Tensor, name: str) -> None:
        """dk or dv."""
        width, dv = self.q.shape[-1], self.v.shape[-1]
        tile = hyper_tile(f"hyper_attention_{name}", self.q)
        if name == "dk":
            parts, subs = cdiv(width, min(tile.block_k, width)), self.subs
        else:
            parts, subs, width = cdiv(dv, min(tile.block_n, dv)), 1, dv
        launch = self.plan(name, chunk, chunk.high * subs * parts, width)
        noted(columns_kernel)[launch.programs,](
            self.core.q if name == "dk" else rows(self.do), rows(grad), self.core, planes, *chunk,
            self.T, parts, KIND=(SCORE_GRADS if name == "dk" else WEIGHTS).value,
            **launch.options,
        )  # fmt: skip

    def accumulator(self, like: Tensor) -> Tensor:
        """Memory for dk or dv: in float32 where chunks of a head add to it."""
        whole = self.chunks[0].high == self.tiles
        return heads_last(like, like.dtype if whole else torch.float32)


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
        z1, z2 = (torch.empty_like(h, dtype=q.dtype) for h in (h1, h2))
        for h, c, z in ((h1, c1, z1), (h2, c2, z2)):
            if c is not None:
                torch.mul(h, c, out=z)
        core = Core(
            rows(q), rows(k), rows(v),
            mix_of(u1, vt1, d1, z1, dh1), mix_of(u2, vt2, d2, z2, dh2), n,
            q.shape[-1], v.shape[-1],
        )  # fmt: skip
        L = next((u.shape[1] for u in (u1, u2) if u is not None), q.shape[2])
        run = _Backward(do, core, tensors, L, (normed, (shortcut1, shortcut2), eps))
        before_gate = any(need[:2]) or any(need[3:7])  # dP is needed
        weights = before_gate or need[2] or any(need[8:])  # A is
        if normed and before_gate:
            run.make_coefficient(out)
        grads[:3] = (
            heads_last(q) if need[0] else None,
            run.accumulator(k) if need[1] else None,
            run.accumulator(v) if need[2] else None,
        )
        plan = plan_launch("hyper_attention_dslots", run.call, block=run.block).plan
        first = run.bands(u1 if any(need[4:7]) else None, d1, plan.block_r1)
        second = run.bands(u2 if any(need[8:]) else None, d2, plan.block_r2)
        planes = run.planes()
        for chunk in run.chunks:
            if before_gate or any(need[7:]):
                run.make_dz2(chunk, planes, dz2)
            if weights:
                run.make_scores(chunk, planes)
                run.gate(chunk, planes, dz1, before_gate)
            if c1 is not None and (any(need[:2]) or any(need[4:7])):
                run.mix(chunk, 1, planes, first)
            if c2 is not None and (need[2] or any(need[8:])):
                run.mix(chunk, 2, planes, second)
            if grads[0] is not None:
                run.dq(chunk, planes, grads[0])
            for name, grad in (("dk", grads[1]), ("dv", grads[2])):
                if grad is not None:
                    run.columns(chunk, planes, grad, name)
        grads[:3] = (None if g is None else g.to(q.dtype) for g in grads[:3])
        grads[3] = (dz1 * h1).to(q.dtype) if need[3] else None
        grads[7] = (dz2 * h2).to(q.dtype) if need[7] else None
        grads[4:7] = _slots(first, L, q, plan.rank1)
        grads[8:11] = _slots(second, L, q, plan.rank2)
    else:
        grads = [None if t is None else torch.zeros_like(t) for t in tensors]
    return [g if g is not None and w else q.new_empty(0) for g, w in zip(grads, need, strict=True)]


def _slots(bands: Bands, L: int, like: Tensor, rank: int) -> list[Tensor | None]:
    """du, dvt, dd of one mixing; None where not wanted."""
    if bands.du is None:
        return [None, None, None]
    fold = lambda t, r: _fold(t, L, r).to(like.dtype)  # noqa: E731
    dd = None if bands.dd is None else fold(bands.dd[..., None], 1)[..., 0]
    return [fold(bands.du, rank), fold(bands.dvt, rank).mT.contiguous(), dd]
