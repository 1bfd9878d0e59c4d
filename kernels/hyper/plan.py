"""What the launches of hyper_attention share: how tensors are handed to kernels, how a launch is
planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arch.hyper import least_columns
from ..arch.tile import Tile, cdiv
from ..device import arch_of, multiprocessors
from ..pick import LAST, hyper_tile
from ..tiles import compiler_options, precision
from .lag import RING


class Rows(NamedTuple):
    """(B, heads, T, width)."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    stride_d: Any


class Slots(NamedTuple):
    """(heads, L, rank): u, vt or d of one mixing."""

    ptr: Any
    stride_h: Any
    stride_p: Any
    stride_r: Any


class Mix(NamedTuple):
    """One mixing. z: control times h = X u (in forward the second mixing's times n too), the
    operand that meets vt; dh: the one that meets u in backward, control times dz. Both are
    contiguous (B, heads, T, rank): strides would cost registers."""

    u: Slots
    vt: Slots
    d: Slots
    z_ptr: Any
    dh_ptr: Any


class Core(NamedTuple):
    """What every pass reads. n (B, H, T): 1 / |P1| of each row. Widths are passed at run time
    too: with constants the compiler unrolls loops and spills."""

    q: Rows
    k: Rows
    v: Rows
    first: Mix
    second: Mix
    n_ptr: Any
    width_qk: int
    width_v: int


@dataclass(frozen=True)
class PassPlan:
    """Constants of a launch. rank1, rank2: 0 without that mixing. quick: 16 bits hold no more than
    quick functions give."""

    glu: bool
    normed: bool
    heads: int
    sub_heads: int
    width_qk: int
    width_v: int
    rank1: int
    rank2: int
    short1: bool
    short2: bool
    block: int
    block_d: int
    block_v: int
    block_r1: int
    block_r2: int
    precision: str
    quick: bool


def rows(t: Tensor | None) -> Any:
    return None if t is None else Rows(t, *t.stride())


def slots(t: Tensor | None, rank_first: bool = False) -> Any:
    """u (heads, L, rank), vt (heads, rank, L) with `rank_first`, or d (heads, L)."""
    if t is None:
        return Slots(None, 0, 0, 0)
    if t.dim() == 2:
        return Slots(t, t.stride(0), t.stride(1), 0)
    head, a, b = t.stride()
    return Slots(t, head, b, a) if rank_first else Slots(t, head, a, b)


def mix_of(
    u: Tensor | None,
    vt: Tensor | None,
    d: Tensor | None,
    z: Tensor | None = None,
    dh: Tensor | None = None,
) -> Mix:
    """Nothing but None without that mixing."""
    if u is None:
        return Mix(slots(None), slots(None), slots(None), None, None)
    return Mix(slots(u), slots(vt, True), slots(d), z, dh)


def block_of(width: int, least: int = 16) -> int:
    """The power of 2 that holds `width`, at least what a tensor core takes."""
    return max(least, 1 << (width - 1).bit_length())


class PassLaunch(NamedTuple):
    plan: PassPlan
    programs: int
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        return {
            "P": self.plan,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            **compiler_options(self.tile),
        }

    def rings(self, like: Tensor) -> Tensor:
        """A ring of each block's."""
        return like.new_empty(self.programs * RING.value * self.plan.block**2)


def heads_last(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for (B, heads, T, width) with a token's heads side by side, as the next projection
    takes them. dtype: None is that of `t`."""
    B, heads, T, width = t.shape
    return t.new_empty((B, T, heads, width), dtype=dtype).transpose(1, 2)


class HyperCall(NamedTuple):
    """What all launches of one call share."""

    q: Tensor
    v: Tensor
    ranks: tuple[int, int]
    shorts: tuple[bool, bool]
    normed: bool


def plan_launch(
    kernel: str, call: HyperCall, *, count: int | None = None, width: int = 0, block: int = 0
) -> PassLaunch:
    """The launch of `kernel`, whose blocks walk over `count` pieces of work (None: one for each
    head and row tile). width: of what it multiplies in steps; 0 is the widest operand's. block: the
    side of the tiles it finds; 0 is its own."""
    q, v, ranks, shorts, normed = call
    _, Q, T, dq = q.shape
    B, H, _, dv = v.shape
    tile = LAST[kernel] = hyper_tile(kernel, q)
    tile = replace(tile, block_m=block or tile.block_m)
    least = least_columns(arch_of(q.device).mma, tile)
    plan = PassPlan(
        glu=Q == 2 * H, normed=normed, heads=H, sub_heads=Q, width_qk=dq, width_v=dv,
        rank1=ranks[0], rank2=ranks[1], short1=shorts[0], short2=shorts[1],
        block=tile.block_m, block_d=min(tile.block_k, block_of(width or max(dq, dv))),
        block_v=min(tile.block_n, block_of(dv)),
        block_r1=block_of(max(ranks[0], 1), least), block_r2=block_of(max(ranks[1], 1), least),
        precision=precision(q.dtype), quick=q.element_size() == 2,
    )  # fmt: skip
    work = B * H * cdiv(T, tile.block_m) if count is None else count
    return PassLaunch(plan, min(work, 4 * multiprocessors(q.device)), tile)
