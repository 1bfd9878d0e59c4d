"""From logits or given experts to expert order, by histogram and stable rank: no sort, no host.

| kernel | a program | writes |
|---|---|---|
| _count_kernel | a chunk of tokens | expert, prob, log-sum-exp; each token's rank among those of its expert in the chunk; the chunk's histogram and sums of probabilities |
| _place_kernel | a chunk of tokens | tokens and rows, once it has summed the histograms before it; the first program also offsets, counts and mean probabilities |
| _bwd_kernel | a few tokens | dlogits, from the gradients of prob, mean probability and log-sum-exp |

Sums run in a fixed order and counts are integers: two runs give the same bits.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..device import multiprocessors
from ..exponentials import exp
from ..plans import noted
from ..tiles import rounded

ELEMENTS = 4096  # of a (tokens, experts) tile: 32 a thread
HISTOGRAMS = 1 << 16  # elements of all chunks' histograms, which every program reads


@triton.jit
def _load_logits(logits_ptr, offs_t, offs_e, T, E, stride_t, stride_e):
    mask = (offs_t[:, None] < T) & (offs_e[None, :] < E)
    rows = offs_t.to(tl.int64)[:, None] * stride_t
    z = tl.load(logits_ptr + rows + offs_e[None, :] * stride_e, mask=mask, other=-float("inf"))
    return z.to(tl.float32)


@triton.jit
def softmax(z):
    """(z with -inf for NaN, its row maxima, exp(z - maximum), their sums)."""
    number = tl.where(z != z, -float("inf"), z)
    top = tl.max(number, 1)
    weight = exp(z - top[:, None])
    return number, top, weight, tl.sum(weight, 1)


@triton.jit
def _count_kernel(
    logits_ptr,
    expert_ptr,
    prob_ptr,
    lse_ptr,
    rank_ptr,
    counts_ptr,
    sums_ptr,
    T,
    E,
    chunk,
    stride_t,
    stride_e,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Without logits, expert is read instead of written, and prob, lse and sums are None."""
    offs_e = tl.arange(0, BLOCK_E)
    begin = tl.program_id(0) * chunk
    end = min(begin + chunk, T)
    running = tl.zeros((BLOCK_E,), tl.int32)
    sums = tl.zeros((BLOCK_E,), tl.float32)
    for t0 in tl.range(begin, end, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        if logits_ptr is None:
            expert = tl.load(expert_ptr + offs_t, mask=mask_t, other=-1)
        else:
            z = _load_logits(logits_ptr, offs_t, offs_e, end, E, stride_t, stride_e)
            number, top, weight, total = softmax(z)
            # As torch.argmax: the first NaN wins, else the first of the largest.
            nan = tl.min(tl.where(z != z, offs_e[None, :], BLOCK_E), 1)
            expert = tl.where(nan < BLOCK_E, nan, tl.argmax(number, 1))
            tl.store(expert_ptr + offs_t, expert.to(tl.int64), mask=mask_t)
            prob = rounded(tl.div_rn(1.0, total), prob_ptr.dtype.element_ty)
            tl.store(prob_ptr + offs_t, prob, mask=mask_t)
            tl.store(lse_ptr + offs_t, top + tl.log(total), mask=mask_t)
            sums += tl.sum(
                tl.where(mask_t[:, None], weight * tl.div_rn(1.0, total)[:, None], 0.0), 0
            )
        hot = (offs_e[None, :] == expert[:, None]) & mask_t[:, None] & (offs_e[None, :] < E)
        ones = hot.to(tl.int32)
        before = running[None, :] + tl.cumsum(ones, 0) - 1
        tl.store(rank_ptr + offs_t, tl.sum(tl.where(hot, before, 0), 1), mask=mask_t)
        running += tl.sum(ones, 0)
    row = tl.cast(tl.program_id(0), tl.int64) * E
    tl.store(counts_ptr + row + offs_e, running, mask=offs_e < E)
    if sums_ptr is not None:
        tl.store(sums_ptr + row + offs_e, sums, mask=offs_e < E)


@triton.jit
def _place_kernel(
    expert_ptr,
    rank_ptr,
    chunk_counts_ptr,
    chunk_sums_ptr,
    tokens_ptr,
    rows_ptr,
    offsets_ptr,
    counts_ptr,
    mean_ptr,
    T,
    E,
    chunk,
    chunks,
    capacity,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    mine = tl.program_id(0)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    sums = tl.zeros((BLOCK_E,), tl.float32)
    for c0 in tl.range(0, chunks, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        at = offs_c[:, None] * E + offs_e[None, :]
        mask = (offs_c[:, None] < chunks) & (offs_e[None, :] < E)
        counts = tl.load(chunk_counts_ptr + at, mask=mask, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(offs_c[:, None] < mine, counts, 0), 0)
        if mean_ptr is not None:  # noqa: SIM102
            if mine == 0:  # apart: a constant above, a value of the program here
                sums += tl.sum(tl.load(chunk_sums_ptr + at, mask=mask, other=0.0), 0)
    kept = tl.minimum(total, capacity)
    ends = tl.cumsum(kept, 0)
    all_kept = tl.sum(kept, 0)
    if mine == 0:
        tl.store(offsets_ptr + offs_e + 1, ends, mask=offs_e < E)
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + E + 1, T)
        tl.store(counts_ptr + offs_e, total, mask=offs_e < E)
        if mean_ptr is not None:
            tl.store(mean_ptr + offs_e, sums / T, mask=offs_e < E)
    starts = ends - kept
    begin = mine * chunk
    end = min(begin + chunk, T)
    dropped = begin - tl.sum(tl.minimum(before, capacity), 0)
    for t0 in tl.range(begin, end, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        expert = tl.load(expert_ptr + offs_t, mask=mask_t, other=-1)
        rank = tl.load(rank_ptr + offs_t, mask=mask_t, other=0)
        hot = (offs_e[None, :] == expert[:, None]) & (offs_e[None, :] < E)
        place = tl.sum(tl.where(hot, before[None, :], 0), 1) + rank
        start = tl.sum(tl.where(hot, starts[None, :], 0), 1)
        inside = (expert >= 0) & (expert < E) & (place < capacity)
        outside = (mask_t & (inside == 0)).to(tl.int32)
        late = all_kept + dropped + tl.cumsum(outside, 0) - 1
        row = tl.where(inside, start + place, late)
        dropped += tl.sum(outside, 0)
        tl.store(rows_ptr + offs_t, row, mask=mask_t)
        tl.store(tokens_ptr + row, offs_t, mask=mask_t)


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
    stride_t,
    stride_e,
    stride_dprob,
    stride_dmean,
    stride_dlse,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """With q the gradient of the probabilities: dz = p (q - sum p q) + dlse p."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E
    z = _load_logits(logits_ptr, offs_t, offs_e, T, E, stride_t, stride_e)
    # Not exp(z - log-sum-exp): rounding that costs p the digits before its point.
    _, _, weight, total = softmax(z)
    p = weight * tl.div_rn(1.0, total)[:, None]
    q = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if dprob_ptr is not None:
        expert = tl.load(expert_ptr + offs_t, mask=mask_t, other=-1)
        dprob = tl.load(dprob_ptr + offs_t * stride_dprob, mask=mask_t, other=0.0).to(tl.float32)
        q = tl.where(offs_e[None, :] == expert[:, None], dprob[:, None], q)
    if dmean_ptr is not None:
        dmean = tl.load(dmean_ptr + offs_e * stride_dmean, mask=mask_e, other=0.0)
        q += dmean[None, :] / T
    dz = p * (q - tl.sum(p * q, 1)[:, None])
    if dlse_ptr is not None:
        dz += p * tl.load(dlse_ptr + offs_t * stride_dlse, mask=mask_t, other=0.0)[:, None]
    rows = offs_t.to(tl.int64)[:, None] * E
    dz = rounded(dz, dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows + offs_e[None, :], dz, mask=mask_t[:, None] & mask_e[None, :])


def _blocks(E: int) -> dict[str, Any]:
    block_e = triton.next_power_of_2(max(E, 2))
    return {
        "BLOCK_T": max(2, ELEMENTS // block_e),
        "BLOCK_E": block_e,
        "num_warps": 4 if block_e <= 512 else 8,
        "enable_fp_fusion": True,
        "maxnreg": 255,  # as tiles.compiler_options: without a limit sm_120 spills
    }


class RouteCall(NamedTuple):
    """What both kernels are given, in Triton and in CUDA. Without logits, `expert` is an input, and
    prob, lse, mean and sums are None."""

    logits: Tensor | None
    expert: Tensor
    prob: Tensor | None
    lse: Tensor | None
    mean: Tensor | None
    tokens: Tensor
    rows: Tensor
    offsets: Tensor
    counts: Tensor
    rank: Tensor
    histograms: Tensor
    sums: Tensor | None
    E: int
    chunk: int
    capacity: int


Launch = Callable[[RouteCall], None]
Groups = tuple[Tensor, Tensor, Tensor, Tensor]
Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_groups(like: Tensor, T: int, E: int) -> Groups:
    """Memory for tokens, rows, offsets and counts."""
    new = lambda n: like.new_empty(n, dtype=torch.int32)  # noqa: E731
    return new(T), new(T), new(E + 2), new(E)


def empty_choice(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for expert, prob, mean_prob and log_sum_exp."""
    T, E = logits.shape
    mean, lse = (logits.new_empty(n, dtype=torch.float32) for n in (E, T))
    return logits.new_empty(T, dtype=torch.int64), logits.new_empty(T), mean, lse


def _group(
    logits: Tensor | None,
    expert: Tensor,
    prob: Tensor | None,
    lse: Tensor | None,
    mean: Tensor | None,
    E: int,
    capacity: int | None,
    chunk: int,
    launch: Launch,
) -> Groups:
    """tokens, rows, offsets and counts; `launch` fills them and whatever else it is given."""
    T = expert.shape[0]
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=expert.device)  # noqa: E731
    groups = empty_groups(expert, T, E)
    if T == 0:
        for t in (*groups, *(() if mean is None else (mean,))):
            t.zero_()
        return groups
    chunks = cdiv(T, chunk)
    sums = None if mean is None else mean.new_empty((chunks, E))
    kept = T if capacity is None else min(capacity, T)
    ranks, counts = new(T), new(chunks, E)
    call = RouteCall(logits, expert, prob, lse, mean, *groups, ranks, counts, sums, E, chunk, kept)
    launch(call)
    return groups


def route_logits(logits: Tensor, capacity: int | None, chunk: int, launch: Launch) -> Routed:
    """expert, prob, groups, mean_prob and log_sum_exp, by chunks of so many tokens."""
    E = logits.shape[1]
    expert, prob, mean, lse = empty_choice(logits)
    groups = _group(logits, expert, prob, lse, mean, E, capacity, chunk, launch)
    return expert, prob, *groups, mean, lse


def route_experts(
    expert: Tensor, num_experts: int, capacity: int | None, chunk: int, launch: Launch
) -> Groups:
    """The groups of given experts."""
    expert = expert.contiguous()
    return _group(None, expert, None, None, None, num_experts, capacity, chunk, launch)


def chunk_of(like: Tensor, T: int, E: int, block: int) -> int:
    """Tokens of a program, a multiple of `block`: one program a multiprocessor, unless all would
    read too many histograms."""
    most = min(multiprocessors(like.device), max(1, HISTOGRAMS // triton.next_power_of_2(E)))
    return max(1, cdiv(cdiv(T, most), block)) * block


def _launch(call: RouteCall) -> None:
    T, chunks = call.expert.shape[0], call.histograms.shape[0]
    options = _blocks(call.E)
    noted(_count_kernel)[chunks,](
        call.logits, call.expert, call.prob, call.lse, call.rank, call.histograms, call.sums,
        T, call.E, call.chunk, *((0, 0) if call.logits is None else call.logits.stride()),
        **options,
    )  # fmt: skip
    place(call)


def place(call: RouteCall) -> None:
    """The second launch: from ranks and histograms to groups. With k choices a token, of all their
    numbers, by chunks of so many."""
    T, chunks = call.rank.shape[0], call.histograms.shape[0]
    options = _blocks(call.E)
    noted(_place_kernel)[chunks,](
        call.expert, call.rank, call.histograms, call.sums, call.tokens, call.rows, call.offsets,
        call.counts, call.mean, T, call.E, call.chunk, chunks, call.capacity,
        BLOCK_C=options["BLOCK_T"], **options,
    )  # fmt: skip


def top1_route_fwd(logits: Tensor, capacity: int | None) -> Routed:
    T, E = logits.shape
    return route_logits(logits, capacity, chunk_of(logits, T, E, _blocks(E)["BLOCK_T"]), _launch)


def route_to_fwd(expert: Tensor, num_experts: int, capacity: int | None) -> Groups:
    block = _blocks(num_experts)["BLOCK_T"]
    chunk = chunk_of(expert, expert.shape[0], num_experts, block)
    return route_experts(expert, num_experts, capacity, chunk, _launch)


def top1_route_bwd(
    logits: Tensor,
    expert: Tensor,
    dprob: Tensor | None,
    dmean: Tensor | None,
    dlse: Tensor | None,
) -> Tensor:
    T, E = logits.shape
    dlogits = logits.new_empty((T, E))
    if T:
        options = _blocks(E)
        strides = tuple(0 if t is None else t.stride(0) for t in (dprob, dmean, dlse))
        noted(_bwd_kernel)[cdiv(T, options["BLOCK_T"]),](
            logits, expert, dprob, dmean, dlse, dlogits, T, E, *logits.stride(), *strides,
            **options,
        )  # fmt: skip
    return dlogits
