"""Bit planes of binary masks: how they are packed, and how a kernel lays them over a weight tile.

Byte (h, j, i) of `planes` (H, ceil(D / 8), n_m) holds mask i of the weights (h, 8 j .. 8 j + 7),
lowest bit first; bits past D are 0. So the n_m bytes of eight neighbouring weights, which are one
16-byte load in 16 bits, lie together: one aligned load where n_m is a power of 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arch.tile import cdiv
from ..left import in_registers
from ..plans import noted
from ..tiles import INTERPRETED, load_tile, load_weight, multiplied, zeros

_PACK = {"BLOCK_H": 16, "BLOCK_D": 128, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def load_words(
    planes_ptr,
    index,
    r0,
    c0,
    R,
    C,
    N_M: tl.constexpr,
    PER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASK_C: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Planes PER * index .. of rows r0.. and columns c0.. of an (R, C) weight: a (BLOCK_R,
    BLOCK_C // 8) tile of words with PER bytes in use. PER divides N_M; c0 is a multiple of 8."""
    if PER == 4:
        words_ptr = planes_ptr.to(tl.pointer_type(tl.uint32))
    elif PER == 2:
        words_ptr = planes_ptr.to(tl.pointer_type(tl.uint16))
    else:
        words_ptr = planes_ptr
    WORDS: tl.constexpr = N_M // PER
    octets = tl.cdiv(C, 8)
    if LEFT:
        # Unsigned 32 bits hold a tile's own offsets, which takes the fewest registers: there are no
        # others beside the products of two masks.
        rows = tl.arange(0, BLOCK_R)[:, None]
        columns = c0 // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
        there = rows < R - r0
        if MASK_C:
            there = there & (columns < octets)
        first = words_ptr + (tl.cast(r0, tl.int64) * octets * WORDS + index)
        words = tl.load(first + ((rows * octets + columns) * WORDS).to(tl.uint32), there, other=0)
    else:
        words = load_tile(
            words_ptr + index, octets * WORDS, WORDS, r0, c0 // 8, R, octets, BLOCK_R, BLOCK_C // 8,
            False, MASK_C,
        )  # fmt: skip
    return words.to(tl.uint32)


@triton.jit
def bits_of(words, byte: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of a tile's (BLOCK_R, BLOCK_C) weights byte `byte` of their words keeps."""
    bit = (1 << (8 * byte + tl.arange(0, 8))).to(tl.uint32)
    return tl.reshape((words[:, :, None] & bit[None, None, :]) != 0, (BLOCK_R, BLOCK_C))


@triton.jit
def keep(bits, tile):
    """`tile` where its bit is set, else 0."""
    if INTERPRETED:  # it mixes up bf16 with the 0
        tile = tile.to(tl.float32)
    return tl.where(bits, tile, 0.0)


@triton.constexpr_function
def _both(byte):
    """PTX that keeps two neighbours of 16 bits where bytes `byte` of their words have the top bit,
    which prmt spreads over a half: 2 instructions."""
    low, high = 8 + byte, 12 + byte
    halves = f"0x{high:x}{high:x}{low:x}{low:x}"
    return f"{{ .reg .b32 m; prmt.b32 m, $2, $3, {halves}; and.b32 $0, $1, m; }}"


@triton.jit
def keep_pairs(
    words, shift, byte: tl.constexpr, tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The (BLOCK_R, BLOCK_C) `tile` where byte `byte` of its words has the weight's bit, else 0: of
    16 bits two neighbours at once."""
    if INTERPRETED or tile.dtype.primitive_bitwidth != 16:
        kept = keep(bits_of(words, byte, BLOCK_R, BLOCK_C), tile)
    else:
        tops = tl.reshape(words[:, :, None] << shift[None, None, :], (BLOCK_R, BLOCK_C))
        kept = tl.inline_asm_elementwise(
            _both(byte), "=r,r,r,r", [tile, tops], dtype=tile.dtype, is_pure=True, pack=2
        )
    return kept


@triton.jit
def _pack_kernel(
    logits_ptr,
    planes_ptr,
    H,
    D,
    stride_i,
    stride_h,
    stride_d,
    N_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    octets = tl.cdiv(D, 8)
    r0 = tl.program_id(0) * BLOCK_H
    c0 = tl.program_id(1) * BLOCK_D
    rows = (r0 + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    columns = c0 // 8 + tl.arange(0, BLOCK_D // 8)[None, :]
    bit = (1 << tl.arange(0, 8))[None, None, :]
    for i in tl.static_range(N_M):
        logits = load_tile(
            logits_ptr + tl.cast(stride_i, tl.int64) * i, stride_h, stride_d, r0, c0, H, D,
            BLOCK_H, BLOCK_D, False,
        )  # fmt: skip
        if INTERPRETED:  # it compares bf16 wrongly
            logits = logits.to(tl.float32)
        kept = tl.where(tl.reshape(logits, (BLOCK_H, BLOCK_D // 8, 8)) > 0, bit, 0)
        pointers = planes_ptr + (rows * octets + columns) * N_M + i
        tl.store(pointers, tl.sum(kept, 2).to(tl.uint8), mask=(rows < H) & (columns < octets))


@triton.jit
def multiply_masked(
    x,
    stride_xm,
    stride_xd,
    w,
    stride_wh,
    stride_wd,
    planes_ptr,
    shift,
    m0,
    n0,
    k_begin,
    k_end,
    M,
    H,
    D,
    first,
    MASKS: tl.constexpr,
    TOTAL: tl.constexpr,
    N_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of x w' (if TOTAL = 1) and of x (m_i * w)' for masks first.. of N_M, over
    k_begin..k_end: a tuple of float32 tiles, transposed if LEFT, which share the x and w tiles. A
    word of planes serves PER masks, which divides `first`, as MASKS does."""
    PER: tl.constexpr = 4 if MASKS % 4 == 0 else 2 if MASKS % 2 == 0 else 1
    accs = ()
    for _ in tl.static_range(TOTAL + MASKS):
        accs = accs + (zeros(BLOCK_M, BLOCK_N, LEFT),)
    if LEFT:  # or zeros meet the products that are awaited behind the loop: wgmma one by one
        tl.assume(k_begin < k_end)
    for k in tl.range(k_begin, k_end, BLOCK_K):
        a = load_tile(x, stride_xm, stride_xd, m0, k, M, D, BLOCK_M, BLOCK_K, TMA, MASK_K)
        b = load_weight(
            w, stride_wh, stride_wd, n0, k, H, D, BLOCK_N, BLOCK_K, TMA, K_MAJOR, MASK_K
        )
        sums = ()
        if TOTAL:
            # From registers as well, or Triton waits too late for those of the masked products.
            sums = sums + (multiplied(a, in_registers(b.T, LEFT).T, accs[0], LEFT, PRECISION),)
        for i in tl.static_range(MASKS // PER):
            words = load_words(
                planes_ptr, first // PER + i, n0, k, H, D, N_M, PER, BLOCK_N, BLOCK_K, MASK_K,
                LEFT,
            )  # fmt: skip
            for j in tl.static_range(PER):
                if LEFT or TMA:
                    kept = keep_pairs(words, shift, j, b.T, BLOCK_N, BLOCK_K).T
                else:  # from registers of a load, where pairs would wait for each other
                    kept = keep(bits_of(words, j, BLOCK_N, BLOCK_K).T, b)
                sums = sums + (multiplied(a, kept, accs[TOTAL + i * PER + j], LEFT, PRECISION),)
        accs = sums
    return accs


def words_of(planes: Tensor) -> Tensor:
    """Planes as `load_words` reads them, on 4 bytes; bytes may begin anywhere, in a buffer of many
    parameters say, and are copied then."""
    return planes if planes.data_ptr() % 4 == 0 else planes.clone()


def empty_planes(logits: Tensor) -> Tensor:
    """Memory for the bit planes of logits."""
    n_m, H, D = logits.shape
    return logits.new_empty((H, cdiv(D, 8), n_m), dtype=torch.uint8)


def pack_masks(logits: Tensor) -> Tensor:
    n_m, H, D = logits.shape
    planes = empty_planes(logits)
    if planes.numel():
        grid = cdiv(H, _PACK["BLOCK_H"]), cdiv(D, _PACK["BLOCK_D"])
        noted(_pack_kernel)[grid](logits, planes, H, D, *logits.stride(), N_M=n_m, **_PACK)
    return planes
