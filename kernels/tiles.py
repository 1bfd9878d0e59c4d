"""What the GEMM kernels share: loads and stores of tiles, the schedule, the main loop; and, on the
host, how a matrix is handed to a kernel.

A matrix reaches a kernel either as a TMA descriptor (TMA=True) or as a pointer with two strides.
Both read zeros past the edges, so ragged sizes need no special case. Address arithmetic is int64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch.tile import Fit, Tile, cdiv
from .device import INTERPRETED as _interpreted, multiprocessors
from .maps import doubtful

# Triton's interpreter neither multiplies bf16 nor rounds to it as a GPU does (kernels/README.md).
INTERPRETED = tl.constexpr(_interpreted)
# Columns of an adapter that a step multiplies.
RANK_STEP = tl.constexpr(16)


@triton.constexpr_function
def half_vector(dtype):
    """Elements of 8 bytes: beside 16 bytes of interleaved pairs a thread takes as many of either
    half, so that nothing passes through shared memory."""
    return 64 // dtype.primitive_bitwidth


@triton.jit
def load_tile(
    t,
    stride_r,
    stride_c,
    r0,
    c0,
    R,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
    MASK_C: tl.constexpr = True,
    MOST: tl.constexpr = None,
):
    """Rows r0.. and columns c0.. of an (R, C) matrix; MASK_C=False promises whole column tiles.
    MOST: neighbours that a thread takes at most; None is 16 bytes."""
    if TMA:
        tile = t.load([r0, c0])
    else:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        offs_c = c0 + tl.arange(0, BLOCK_C)
        if MOST is not None:
            offs_c = tl.max_contiguous(offs_c, MOST)
        mask = offs_r[:, None] < R
        if MASK_C:
            mask = mask & (offs_c[None, :] < C)
        rows = offs_r.to(tl.int64)[:, None] * stride_r
        tile = tl.load(t + rows + offs_c.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0)
    return tile


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 `value` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def store_tile(
    t,
    stride_r,
    r0,
    c0,
    R,
    C,
    value,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
    MOST: tl.constexpr = None,
):
    """Write `value` to an (R, C) matrix whose columns are contiguous, in its dtype; cut at the
    edges. MOST: as for load_tile."""
    if TMA:
        t.store([r0, c0], rounded(value, t.dtype))
    else:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        offs_c = c0 + tl.arange(0, BLOCK_C)
        if MOST is not None:
            offs_c = tl.max_contiguous(offs_c, MOST)
        mask = (offs_r[:, None] < R) & (offs_c[None, :] < C)
        pointers = t + offs_r.to(tl.int64)[:, None] * stride_r + offs_c[None, :]
        tl.store(pointers, rounded(value, t.dtype.element_ty), mask=mask)


@triton.jit
def load_slice(t, i, r0, c0, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr):
    """Rows r0.. and columns c0.. of matrix i of a contiguous (n, R, C) stack."""
    if TMA:
        tile = tl.reshape(t.load([i, r0, c0]), (BLOCK_R, BLOCK_C))
    else:
        first = tl.cast(i, tl.int64) * R * C
        tile = load_tile(t + first, C, 1, r0, c0, R, C, BLOCK_R, BLOCK_C, False)
    return tile


@triton.jit
def store_slice(
    t, i, r0, c0, R, C, value, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr
):
    """Write `value` to matrix i of a contiguous (n, R, C) stack; cut at the edges."""
    if TMA:
        t.store([i, r0, c0], tl.reshape(rounded(value, t.dtype), (1, BLOCK_R, BLOCK_C)))
    else:
        first = tl.cast(i, tl.int64) * R * C
        store_tile(t + first, C, r0, c0, R, C, value, BLOCK_R, BLOCK_C, False)


@triton.jit
def load_weight(
    w,
    stride_n,
    stride_k,
    n0,
    k0,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """A (BLOCK_K, BLOCK_N) operand from an (N, K) weight. With TMA the descriptor lies along
    whichever of its dimensions is contiguous: (N, K) if K_MAJOR, else (K, N)."""
    if TMA:
        if K_MAJOR:
            tile = w.load([n0, k0]).T
        else:
            tile = w.load([k0, n0])
    else:
        offs_n = n0 + tl.arange(0, BLOCK_N)
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = offs_n[None, :] < N
        if MASK_K:
            mask = mask & (offs_k[:, None] < K)
        columns = offs_n.to(tl.int64)[None, :] * stride_n
        tile = tl.load(w + offs_k.to(tl.int64)[:, None] * stride_k + columns, mask=mask, other=0.0)
    return tile


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr):
    """Where a (BLOCK_M, BLOCK_N) result is summed, which is made transposed if LEFT."""
    if LEFT:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return acc


@triton.jit
def multiplied(a, b, acc, LEFT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, both transposed if LEFT: b, a weight, is the left operand there."""
    if LEFT:
        acc = dot(b.T, a.T, acc, PRECISION)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def upright(t, LEFT: tl.constexpr):
    """A part of the result, from what `multiplied` made."""
    if LEFT:
        t = t.T
    return t


@triton.jit
def multiply(
    x,
    stride_xm,
    stride_xk,
    w1,
    stride_1n,
    stride_1k,
    w2,
    stride_2n,
    stride_2k,
    m0,
    n0,
    k_begin,
    k_end,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    K_MAJOR_1: tl.constexpr,
    K_MAJOR_2: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT: tl.constexpr = False,
):
    """One tile of x w1' and x w2' over k_begin..k_end, in float32: both products share the x tile.
    With w2 = None the second result is the first. Both are transposed if LEFT."""
    acc1 = zeros(BLOCK_M, BLOCK_N, LEFT)
    acc2 = acc1
    for k in tl.range(k_begin, k_end, BLOCK_K):
        a = load_tile(x, stride_xm, stride_xk, m0, k, M, K, BLOCK_M, BLOCK_K, TMA, MASK_K)
        b = load_weight(
            w1, stride_1n, stride_1k, n0, k, N, K, BLOCK_N, BLOCK_K, TMA, K_MAJOR_1, MASK_K
        )
        acc1 = multiplied(a, b, acc1, LEFT, PRECISION)
        if w2 is not None:
            b = load_weight(
                w2, stride_2n, stride_2k, n0, k, N, K, BLOCK_N, BLOCK_K, TMA, K_MAJOR_2, MASK_K
            )
            acc2 = multiplied(a, b, acc2, LEFT, PRECISION)
    if w2 is None:
        acc2 = acc1
    return acc1, acc2


@triton.jit
def add_low_rank(
    acc,
    t,
    b,
    sizes,
    m0,
    n0,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + t b' of (a part of) a tile, where t (M, r) and b (N, r) are an adapter's; acc where t
    is None. sizes: r, where its steps end, the row stride of t, and both strides of b. In an
    accumulator and a loop of its own: with one accumulator for both, or without the loop (which a
    bound of 1 is compiled into), ptxas waits after every wgmma of the main loop (sm_90, Triton 3.9,
    2026-11). Nothing is loaded ahead, which would take shared memory beside the tiles'."""
    if t is not None:
        r, end, stride_tm, stride_bn, stride_bk = sizes
        low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, end, RANK_STEP, num_stages=1):
            left = load_tile(t, stride_tm, 1, m0, k, M, r, BLOCK_M, RANK_STEP, False)
            right = load_weight(
                b, stride_bn, stride_bk, n0, k, N, r, BLOCK_N, RANK_STEP, False, True, True
            )
            low = dot(left, right, low, PRECISION)
        acc += low
    return acc


@triton.jit
def multiply_stacked(
    x,
    w,
    m0,
    n0,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of x w1' and x w2', where w is one descriptor over both, (2, N, K): a single product
    twice as wide, whose halves a thread holds at the same row and column."""
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        b = tl.reshape(w.load([0, n0, k]), (2 * BLOCK_N, BLOCK_K)).T
        acc = dot(x.load([m0, k]), b, acc, PRECISION)
    first, second = halve(acc, BLOCK_M, 2 * BLOCK_N)
    return first, second


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the index-th tile: GROUP_M rows of tiles at a time, column by column, so
    that blocks running together share weight columns and x rows in L2."""
    group = index // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = index % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def halve(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(t, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    return left, right


@triton.jit
def unweave(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The even and the odd columns of a (BLOCK_M, 2 BLOCK_N) tile. An accumulator's neighbours are
    one thread's: nothing moves."""
    even, odd = tl.split(tl.reshape(t, (BLOCK_M, BLOCK_N, 2)))
    return even, odd


@triton.jit
def weave(even, odd, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The (BLOCK_M, 2 BLOCK_N) tile of which these are the even and the odd columns."""
    return tl.reshape(tl.join(even, odd), (BLOCK_M, 2 * BLOCK_N))


@triton.jit
def column_parts(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """A (BLOCK_M, BLOCK_N) tile as a tuple of PARTS (a power of 2) tiles side by side."""
    if PARTS == 1:
        parts = (t,)
    else:
        left, right = halve(t, BLOCK_M, BLOCK_N)
        first = column_parts(left, BLOCK_M, BLOCK_N // 2, PARTS // 2)
        second = column_parts(right, BLOCK_M, BLOCK_N // 2, PARTS // 2)
        parts = first + second
    return parts


@triton.jit
def parts_of(
    acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, LEFT: tl.constexpr
):
    """The column parts of a (BLOCK_M, BLOCK_N) result as it was made: of a transposed one, rows of
    the result, still transposed."""
    if LEFT:
        parts = column_parts(acc, BLOCK_N, BLOCK_M, SUBTILES)
    else:
        parts = column_parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
    return parts


def compiler_options(tile: Tile) -> dict[str, Any]:
    """Triton 3.9 turns fusion off by default. Without a register limit ptxas may aim at two blocks
    a multiprocessor and spill at 128 registers."""
    return {"enable_fp_fusion": True, "maxnreg": min(255, 2048 // tile.num_warps)}


def grid_of(tile: Tile, x: Tensor, rows: int, columns: int) -> tuple[int]:
    """A TMA tile runs persistently, as many blocks a multiprocessor as `tile.blocks` says; but of
    tiles for few rows more fit, and the next ones read while the last one stores."""
    tiles = cdiv(rows, tile.block_m) * cdiv(columns, tile.block_n)
    persistent = tile.tma and not tile.few
    return (min(tiles, tile.blocks * multiprocessors(x.device)) if persistent else tiles,)


@functools.lru_cache(1024)
def gemm_options(tile: Tile, masked: bool, precision: str) -> dict[str, Any]:
    """Constants of a GEMM launch. masked: K does not end on a K step."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "SUBTILES": tile.subtiles,
        "TMA": tile.tma,
        "MASK_K": masked,
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **compiler_options(tile),
    }


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch.backends.cuda.matmul.fp32_precision says, which
    torch.set_float32_matmul_precision sets too."""
    if dtype != torch.float32:
        return "ieee"
    # Not get_float32_matmul_precision(): it raises once this, its successor, has been set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def fit_of(*rows: Tensor | None, weights: tuple[Tensor | None, ...] = ()) -> Fit:
    """How these may be read and written. 16-byte loads and TMA descriptors need one dimension
    contiguous, the other stepping by 16 bytes from a 16-byte base without overlap. `rows` are
    contiguous along columns, `weights` along either. Of `rows` may be a stack of matrices."""
    if not all(t is None or _stack_aligned(t) for t in rows) or not all(
        t is None
        or _aligned(t, *t.stride(), *t.shape)
        or _aligned(t, t.stride(1), t.stride(0), t.shape[1], t.shape[0])
        for t in weights
    ):
        return Fit.ELEMENT
    return Fit.VECTOR if doubtful(*rows, *weights) else Fit.TMA


def _stack_aligned(t: Tensor) -> bool:
    *apart, outer, inner = t.stride()
    return all(step > 0 and step * t.element_size() % 16 == 0 for step in apart) and _aligned(
        t, outer, inner, *t.shape[-2:]
    )


def _aligned(t: Tensor, outer: int, inner: int, rows: int, columns: int) -> bool:
    return (
        inner == 1
        and (outer >= columns or rows == 1)
        and outer * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and rows * columns > 0
    )


def descriptor_of(
    t: Tensor,
    block: list[int],
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> TensorDescriptor:
    """TensorDescriptor.from_tensor without its checks, which `fit_of` has made: 1 us, not 6."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.block_shape = t, block
    descriptor.shape, descriptor.strides = shape or t.shape, strides or t.stride()
    return descriptor


def rows_of(t: Tensor | None, block_r: int, block_c: int, tma: bool) -> Any:
    """A matrix with contiguous columns (x, h, g, ...) as a kernel takes it."""
    return t if t is None or not tma else descriptor_of(t, [block_r, block_c])


def pair_of(gu: Tensor, block_r: int, block_c: int, tma: bool) -> tuple[Any, Any]:
    """g and u, a stack (2, R, C), as a kernel takes them: both by one descriptor, in its place for
    g."""
    return (descriptor_of(gu, [2, block_r, block_c]), None) if tma else (gu[0], gu[1])


def slices_of(t: Tensor | None, block_r: int, block_c: int, tma: bool) -> Any:
    """A contiguous (n, R, C) stack of matrices as a kernel takes it."""
    return t if t is None or not tma else descriptor_of(t, [1, block_r, block_c])


def low_rank_of(t: Tensor | None, b: Tensor | None) -> tuple[int, ...] | None:
    """`sizes` of add_low_rank."""
    if t is None or b is None:
        return None
    if t.stride(1) != 1 and t.shape[1] > 1:
        raise AssertionError("an adapter's product x a' has contiguous columns")
    r, step = t.shape[1], RANK_STEP.value
    # Never 1, which Triton would compile in.
    return r, -(-r // step) * step, t.stride(0), *b.stride()


def weight_of(
    t: Tensor | None, block_n: int, block_k: int, tma: bool
) -> tuple[Any, int, int, bool]:
    """An (N, K) weight as a kernel takes it: (descriptor or tensor, stride_n, stride_k,
    K_MAJOR)."""
    if t is None:
        return None, 0, 0, True
    stride_n, stride_k = t.stride()
    if not tma:
        return t, stride_n, stride_k, True
    k_major = stride_k == 1  # a step of one element is no descriptor's
    view, block = (t, [block_n, block_k]) if k_major else (t.t(), [block_k, block_n])
    return descriptor_of(view, block), stride_n, stride_k, k_major
