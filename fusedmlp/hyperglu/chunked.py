"""The T x T core in PyTorch, a block of query rows at a time: as reference.hyper_attention, with
rows moved to their columns by strides.

For training each block is recomputed in backward, so that a block's tensors live one at a time:
chunk x T values a head instead of T x T. Compiled with a dynamic length it is one graph for
each number of blocks.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..check import wants_grad
from ..reference.hyper import Mixing, gate, mixed, scaled
from ..transforms import transformed


def laid_out(S: Tensor, width: int) -> Tensor:
    """Rows t = columns - rows .. columns - 1 of scores, (..., rows, columns), by lag: column j of
    the result holds source t - (width - 1) + j, or 0 where there is none."""
    rows, columns = S.shape[-2:]
    padded = F.pad(S, (width - 1 - (columns - rows), 0)).contiguous()
    step = padded.shape[-1]
    strides = (*padded.stride()[:-2], step + 1, 1)
    return padded.as_strided((*S.shape[:-1], width), strides)


def by_source(Y: Tensor, columns: int) -> Tensor:
    """The inverse of `laid_out`: (..., rows, width) as (..., rows, columns); later sources
    get 0."""
    rows, width = Y.shape[-2:]
    padded = F.pad(Y, (0, rows - 1)).contiguous()
    step = padded.shape[-1]
    strides = (*padded.stride()[:-2], step - 1, 1)
    return padded.as_strided((*Y.shape[:-1], columns), strides, width - 1 - (columns - rows))


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c1: Tensor | None,
    c2: Tensor | None,
    first: Mixing,
    second: Mixing,
    *,
    start: int,
    width: int,
    slots: slice,
    options: dict[str, Any],
) -> Tensor:
    """Rows start.. of the result, from the keys and values that they can see."""
    offset, causal = options["aligner"] == "offset", options["causal"]
    S = q @ k.mT
    t = start + torch.arange(q.shape[-2], device=q.device)[:, None]
    column = torch.arange(width, device=q.device)
    if offset:
        S = laid_out(S, width)
        outside = column < width - 1 - t
    else:
        outside = column > t
        S = S.masked_fill(outside, 0) if causal else S
    beyond1, beyond2 = (outside if causal and options[m] else None for m in ("mask1", "mask2"))
    P = mixed(S, c1, first, options["shortcut1"], slots, beyond1)
    A, n = gate(P, options["kind"], options["norm"], options["eps"])
    Y = mixed(A, c2, second, options["shortcut2"], slots, beyond2)
    if offset:
        Y = by_source(Y, k.shape[-2])
    return scaled(Y @ v, n)


def _sees_prefix_only(c1: Tensor | None, c2: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a block needs no column beyond its last row. Unmasked, mixing fills columns that have
    no source; in "offset" those of the second mixing are dropped unseen."""
    first = c1 is None or (options["causal"] and options["mask1"])
    second = c2 is None or (options["causal"] and options["mask2"])
    return first and (options["aligner"] == "offset" or (second and options["causal"]))


def chunked_attention(
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
    *,
    chunk: int | None,
    **options: Any,
) -> Tensor:
    """reference.hyper_attention in blocks of `chunk` rows; None: all rows at once, all kept."""
    T = q.shape[-2]
    if T == 0:
        return torch.zeros_like(v)
    first, second = (u1, vt1, d1), (u2, vt2, d2)
    L = next((u.shape[-2] for u in (u1, u2) if u is not None), T)
    prefix = _sees_prefix_only(c1, c2, options)
    offset = options["aligner"] == "offset"
    block = functools.partial(_block, options=options)
    again = chunk is not None and not transformed() and wants_grad(q, k, v, c1, c2, *first, *second)
    if again:
        block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    # The number of blocks alone is fixed where T is symbolic, not T.
    ends = [] if chunk is None else [chunk * i for i in range(1, -(-T // chunk))]
    made = []
    for start, end in itertools.pairwise((0, *ends, T)):
        sources = end if offset or prefix else T
        width = end if prefix else T
        low = L - width if offset else L - T
        here = slice(start, end)
        made.append(
            block(
                q[..., here, :],
                k[..., :sources, :],
                v[..., :sources, :],
                None if c1 is None else c1[..., here, :],
                None if c2 is None else c2[..., here, :],
                first,
                second,
                start=start,
                width=width,
                slots=slice(low, low + width),
            )  # fmt: skip
        )
    return torch.cat(made, -2)
