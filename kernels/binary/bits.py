"""Signs of weights in words of 32 bits, and how a kernel makes a weight tile of them.

Bit k % 32 of word (n, k // 32) of `qweight`, int32 (N, 4 G) and contiguous, is the sign of weight
(n, k), 1 for +; `scales` (N, G), contiguous, has one value for each GROUP weights of a row, with
G = ceil(K / 128). Bits past K are not to be used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import INTERPRETED

# Two weights of 16 bits: prmt puts the words' highest bytes into those of the halves, and the
# scales' signs change where their highest bit is 0.
_BOTH = tl.constexpr(
    "{ .reg .b32 m; prmt.b32 m, $2, $3, 0x7030; lop3.b32 $0, $1, m, 0x80008000, 0xd2; }"
)


@triton.jit
def load_words(q_ptr, n0, k0, N, groups, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words of rows n0.. and weights k0.. < K, (BLOCK_N, BLOCK_K // 32). BLOCK_K is a multiple
    of 32 that divides 128, and k0 one of BLOCK_K: a row has them all."""
    WORDS: tl.constexpr = BLOCK_K // 32
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_w = k0 // 32 + tl.arange(0, WORDS)
    rows = offs_n.to(tl.int64)[:, None] * (4 * groups)
    return tl.load(q_ptr + rows + offs_w[None, :], mask=offs_n[:, None] < N, other=0)


@triton.jit
def load_scales(s_ptr, n0, k0, N, groups, BLOCK_N: tl.constexpr):
    """The scales of rows n0.. in the group of weight k0, (BLOCK_N,) in float32."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    pointers = s_ptr + offs_n.to(tl.int64) * groups + k0 // 128
    return tl.load(pointers, mask=offs_n < N, other=0.0).to(tl.float32)


@triton.jit
def signed(words, scales, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """+-scales (BLOCK_N,) by the bits of `words`, (BLOCK_N, BLOCK_K) in float32.

    The sign of each weight is shifted to the top of its word, five times halving the distance: a
    thread then holds the neighbours of a row, which are stored together.
    """
    t = words
    WORDS: tl.constexpr = BLOCK_K // 32
    for i in tl.static_range(5):
        t = tl.join(t << (16 >> i), t)
        t = tl.reshape(t, (BLOCK_N, WORDS << (i + 1)))
    minus = ~t & -2147483648
    magnitude = scales.to(tl.int32, bitcast=True)[:, None]
    return (magnitude ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def signed_pairs(words, shift, scales, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """`signed` in the dtype of the scales, of 16 bits, two neighbours at once. `shift` is 31 .. 0
    (kernels/left.py)."""
    if INTERPRETED:
        tile = signed(words, scales.to(tl.float32), BLOCK_N, BLOCK_K).to(scales.dtype)
    else:
        tops = tl.reshape(
            words.to(tl.uint32)[:, :, None] << shift[None, None, :], (BLOCK_N, BLOCK_K)
        )
        every = tl.broadcast_to(scales[:, None], (BLOCK_N, BLOCK_K))
        tile = tl.inline_asm_elementwise(
            _BOTH, "=r,r,r,r", [every, tops], dtype=scales.dtype, is_pure=True, pack=2
        )
    return tile
