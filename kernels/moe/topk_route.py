"""From logits to k experts a token, and to expert order: no sort, no host.

| kernel | a program | writes |
|---|---|---|
| _choose_kernel | a chunk of tokens | expert, prob, log-sum-exp; each choice's rank among those of its expert in the chunk; the chunk's histogram and sums of probabilities |
| top1_route's _place_kernel | a chunk of choices | tokens, rows, offsets, counts, mean probabilities |
| _bwd_kernel | a few tokens | dlogits, from the gradients of prob, mean probability and log-sum-exp |

Choice j of token t has the number t k + j, so that what places single choices places these. A token
takes the largest of what is compared k times over: as integers, which rise as the numbers do and
have a place above all for NaN and one below all for what cannot be chosen.
"""  # noqa: E501

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..exponentials import exp
from ..plans import noted
from ..tiles import rounded
from .top1_route import RouteCall, chunk_of, empty_groups, place, softmax

ELEMENTS = 2048  # of a (tokens, experts) tile: 16 a thread
_LEAST = tl.constexpr(-(2**31))
_MOST = tl.constexpr(2**31 - 1)


class Form(NamedTuple):
    """How a score becomes a weight: the options of topk_route that its gradient depends on."""

    score: str = "softmax"
    norm: bool = True
    eps: float = 0.0
    least: float = 0.0
    scale: float = 1.0


class Choice(NamedTuple):
    """How experts are compared. groups: 1 for none."""

    compared: str = "score"
    groups: int = 1
    topk_group: int = 1
    group_score: str = "top2"


@triton.jit
def _key(x):
    """An integer that rises with x; NaN is above all, and -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ _MOST, bits)
    return tl.where(x != x, _MOST, bits)


@triton.jit
def _value(key):
    """The number of a key."""
    return tl.where(key < 0, key ^ _MOST, key).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(y):
    """log(1 + y) without losing a small y."""
    u = 1 + y
    return tl.where(u == 1, y, tl.log(u) * tl.div_rn(y, tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _sigmoid(z):
    e = exp(-tl.abs(z))
    return tl.div_rn(tl.where(z < 0, e, 1.0), 1 + e)


@triton.jit
def _scores(z, SCORE: tl.constexpr):
    """What each expert scores; 0 where z is -inf."""
    if SCORE == "softmax":
        _, _, weight, total = softmax(z)
        s = weight * tl.div_rn(1.0, total)[:, None]
    elif SCORE == "sigmoid":
        s = _sigmoid(z)
    else:
        s = tl.sqrt_rn(tl.where(z > 0, z, 0.0) + _log1p(exp(-tl.abs(z))))
        s = tl.where(z != z, z, s)
    return s


@triton.jit
def _best(key, columns, BLOCK: tl.constexpr):
    """The column of each row's largest key, the lowest of equals."""
    top = tl.max(key, 1)
    return tl.min(tl.where(key == top[:, None], columns[None, :], BLOCK), 1)


@triton.jit
def _in_best_groups(
    key,
    groups,
    taken,
    GROUP_SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """1 for the columns of each row's best groups: BLOCK_G groups of BLOCK_M columns."""
    parts = tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_M))
    first = tl.max(parts, 2)
    if GROUP_SCORE == "top2":
        offs_m = tl.arange(0, BLOCK_M)[None, None, :]
        at = tl.min(tl.where(parts == first[:, :, None], offs_m, BLOCK_M), 2)
        second = tl.max(tl.where(offs_m == at[:, :, None], _LEAST, parts), 2)
        first = _key(_value(first) + _value(second))
    offs_g = tl.arange(0, BLOCK_G)
    first = tl.where(offs_g[None, :] < groups, first, _LEAST)
    inside = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
    for _ in tl.range(0, taken):
        hot = offs_g[None, :] == _best(first, offs_g, BLOCK_G)[:, None]
        inside = tl.where(hot, 1, inside)
        first = tl.where(hot, _LEAST, first)
    every = tl.broadcast_to(inside[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_M))
    return tl.reshape(every, (BLOCK_T, BLOCK_G * BLOCK_M))


@triton.jit
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    expert_ptr,
    prob_ptr,
    lse_ptr,
    rank_ptr,
    counts_ptr,
    sums_ptr,
    T,
    E,
    k,
    chunk,
    groups,
    taken,
    stride_t,
    stride_e,
    stride_b,
    eps,
    least,
    scale,
    SCORE: tl.constexpr,
    NORM: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns are experts, group by group, each padded to BLOCK_M."""
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_M
    columns = tl.arange(0, BLOCK_E)
    size = E // groups
    offs_e = columns // BLOCK_M * size + columns % BLOCK_M
    mask_e = (columns % BLOCK_M < size) & (columns // BLOCK_M < groups)
    offs_k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(0) * chunk
    end = min(begin + chunk, T)
    running = tl.zeros((BLOCK_E,), tl.int32)
    sums = tl.zeros((BLOCK_E,), tl.float32)
    for t0 in tl.range(begin, end, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        row = logits_ptr + offs_t.to(tl.int64)[:, None] * stride_t
        mask = mask_t[:, None] & mask_e[None, :]
        z = tl.load(row + offs_e[None, :] * stride_e, mask=mask, other=-float("inf"))
        z = z.to(tl.float32)
        _, top, _, total = softmax(z)
        tl.store(lse_ptr + offs_t, top + tl.log(total), mask=mask_t)
        s = _scores(z, SCORE)
        value = z if BY_LOGITS else s
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_e * stride_b, mask=mask_e, other=0.0)
            value += bias.to(tl.float32)[None, :]
        key = tl.where(mask_e[None, :], _key(value), _LEAST)
        inside = tl.where(mask_e[None, :], 1, 0)
        if GROUP_SCORE is not None:
            inside *= _in_best_groups(key, groups, taken, GROUP_SCORE, BLOCK_T, BLOCK_G, BLOCK_M)
        if bias_ptr is None and not BY_LOGITS:
            # Logits tell apart what a score rounds to the same number.
            key = _key(z)
        key = tl.where(inside != 0, key, _LEAST)
        chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        column = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
        weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for j in tl.range(0, k):
            at = _best(key, columns, BLOCK_E)
            hot = columns[None, :] == at[:, None]
            own = offs_k[None, :] == j
            column = tl.where(own, at[:, None], column)
            weight = tl.where(own, tl.sum(tl.where(hot, s, 0.0), 1)[:, None], weight)
            chosen = tl.where(hot, 1, chosen)
            key = tl.where(hot, _LEAST, key)
        if NORM:
            whole = tl.sum(weight, 1)
            weight = tl.div_rn(weight, (tl.where(whole < least, least, whole) + eps)[:, None])
        number = offs_t[:, None] * k + offs_k[None, :]
        mask = mask_t[:, None] & (offs_k[None, :] < k)
        expert = column // BLOCK_M * size + column % BLOCK_M
        tl.store(expert_ptr + number, expert.to(tl.int64), mask=mask)
        prob = rounded(weight * scale, prob_ptr.dtype.element_ty)
        tl.store(prob_ptr + number, prob, mask=mask)
        ones = tl.where(mask_t[:, None], chosen, 0)
        before = running[None, :] + tl.cumsum(ones, 0) - ones
        rank = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
        for j in tl.range(0, k):
            own = offs_k[None, :] == j
            at = tl.sum(tl.where(own, column, 0), 1)
            mine = tl.sum(tl.where(columns[None, :] == at[:, None], before, 0), 1)
            rank = tl.where(own, mine[:, None], rank)
        tl.store(rank_ptr + number, rank, mask=mask)
        running += tl.sum(ones, 0)
        p = s if SCORE == "softmax" else s * tl.div_rn(1.0, tl.sum(s, 1))[:, None]
        sums += tl.sum(tl.where(mask_t[:, None], p, 0.0), 0)
    row = tl.cast(tl.program_id(0), tl.int64) * E
    tl.store(counts_ptr + row + offs_e, running, mask=mask_e)
    # Times k: _place_kernel divides by the number of choices.
    tl.store(sums_ptr + row + offs_e, sums * k, mask=mask_e)


@triton.jit
def _bwd_kernel(
    logits_ptr,
    expert_ptr,
    dprob_ptr,
    dmean_ptr,
    dlse_ptr,
    dlogits_ptr,
    T,
    E,
    k,
    stride_t,
    stride_e,
    stride_dprob_t,
    stride_dprob_k,
    stride_dmean,
    stride_dlse,
    eps,
    least,
    scale,
    SCORE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """ds of the scores, then dz by their slope; dlse goes to the softmax of the logits."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E
    mask = mask_t[:, None] & mask_e[None, :]
    row = logits_ptr + offs_t.to(tl.int64)[:, None] * stride_t
    z = tl.load(row + offs_e[None, :] * stride_e, mask=mask, other=-float("inf")).to(tl.float32)
    s = _scores(z, SCORE)
    ds = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if dprob_ptr is not None:
        chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        for j in tl.range(0, k):
            expert = tl.load(expert_ptr + offs_t * k + j, mask=mask_t, other=-1)
            at = offs_t.to(tl.int64) * stride_dprob_t + j * stride_dprob_k
            dprob = tl.load(dprob_ptr + at, mask=mask_t, other=0.0).to(tl.float32)
            hot = offs_e[None, :] == expert[:, None]
            ds = tl.where(hot, dprob[:, None], ds)
            chosen = tl.where(hot, 1, chosen)
        if NORM:
            whole = tl.sum(tl.where(chosen != 0, s, 0.0), 1)
            below = tl.div_rn(1.0, tl.where(whole < least, least, whole) + eps)
            inner = tl.sum(tl.where(chosen != 0, s * ds, 0.0), 1) * below
            inner = tl.where(whole < least, 0.0, inner)
            ds = tl.where(chosen != 0, (ds - inner[:, None]) * below[:, None], 0.0)
        ds *= scale
    if dmean_ptr is not None:
        dmean = tl.load(dmean_ptr + offs_e * stride_dmean, mask=mask_e, other=0.0) / T
        if SCORE == "softmax":
            ds += dmean[None, :]
        else:
            below = tl.div_rn(1.0, tl.sum(s, 1))
            inner = tl.sum(s * dmean[None, :], 1) * below
            ds += (dmean[None, :] - inner[:, None]) * below[:, None]
    if SCORE == "softmax":
        dz = s * (ds - tl.sum(s * ds, 1)[:, None])
    elif SCORE == "sigmoid":
        dz = ds * s * _sigmoid(-z)
    else:
        # Where softplus has underflowed its root has no slope.
        dz = tl.where(s == 0, 0.0, tl.div_rn(ds * _sigmoid(z), 2 * tl.where(s == 0, 1.0, s)))
    if dlse_ptr is not None:
        _, _, weight, total = softmax(z)
        dlse = tl.load(dlse_ptr + offs_t * stride_dlse, mask=mask_t, other=0.0)
        dz += weight * (tl.div_rn(1.0, total) * dlse)[:, None]
    out = dlogits_ptr + offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(out, rounded(dz, dlogits_ptr.dtype.element_ty), mask=mask)


def _blocks(columns: int) -> dict[str, Any]:
    return {
        "BLOCK_T": max(2, ELEMENTS // columns),
        "num_warps": 4 if columns <= 512 else 8,
        "enable_fp_fusion": True,
        "maxnreg": 255,  # as tiles.compiler_options: without a limit sm_120 spills
    }


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 2))


Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_routing(logits: Tensor, k: int) -> Routed:
    """Memory for expert, prob, tokens, rows, offsets, counts, mean_prob and log_sum_exp."""
    T, E = logits.shape
    mean, lse = (logits.new_empty(n, dtype=torch.float32) for n in (E, T))
    expert, prob = logits.new_empty((T, k), dtype=torch.int64), logits.new_empty((T, k))
    return expert, prob, *empty_groups(logits, T * k, E), mean, lse


def topk_route_fwd(
    logits: Tensor, bias: Tensor | None, k: int, capacity: int | None, form: Form, choice: Choice
) -> Routed:
    """The fields of a Routing."""
    T, E = logits.shape
    routed = expert, prob, tokens, rows, offsets, counts, mean, lse = empty_routing(logits, k)
    if T == 0:
        for t in (offsets, counts, mean):
            t.zero_()
        return routed
    groups = choice.groups
    block_g, block_m = (1, _power(E)) if groups == 1 else (_power(groups), _power(E // groups))
    options = _blocks(block_g * block_m)
    chunk = chunk_of(logits, T, E, options["BLOCK_T"])
    chunks, R = cdiv(T, chunk), T * k
    new = lambda *shape: counts.new_empty(shape)  # noqa: E731
    rank, histograms, sums = new(R), new(chunks, E), mean.new_empty((chunks, E))
    noted(_choose_kernel)[chunks,](
        logits, bias, expert, prob, lse, rank, histograms, sums, T, E, k, chunk, groups,
        choice.topk_group, *logits.stride(), 0 if bias is None else bias.stride(0),
        form.eps, form.least, form.scale, SCORE=form.score, NORM=form.norm,
        BY_LOGITS=choice.compared == "logits",
        GROUP_SCORE=None if groups == 1 else choice.group_score,
        BLOCK_G=block_g, BLOCK_M=block_m, BLOCK_K=triton.next_power_of_2(k), **options,
    )  # fmt: skip
    kept = R if capacity is None else min(capacity, R)
    place(
        RouteCall(
            None, expert, None, None, mean, tokens, rows, offsets, counts, rank, histograms, sums,
            E, chunk * k, kept,
        )
    )  # fmt: skip
    return routed


def topk_route_bwd(
    logits: Tensor,
    expert: Tensor,
    dprob: Tensor | None,
    dmean: Tensor | None,
    dlse: Tensor | None,
    form: Form,
) -> Tensor:
    (T, E), k = logits.shape, expert.shape[1]
    dlogits = logits.new_empty((T, E))
    if T:
        block_e = _power(E)
        noted(_bwd_kernel)[cdiv(T, _blocks(block_e)["BLOCK_T"]),](
            logits, expert, dprob, dmean, dlse, dlogits, T, E, k, *logits.stride(),
            *((0, 0) if dprob is None else dprob.stride()),
            *(0 if t is None else t.stride(0) for t in (dmean, dlse)),
            form.eps, form.least, form.scale, SCORE=form.score, NORM=form.norm,
            BLOCK_E=block_e, **_blocks(block_e),
        )  # fmt: skip
    return dlogits
