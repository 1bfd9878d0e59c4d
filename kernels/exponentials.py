"""Exponentials and what is made of them, in float32: few instructions, and nothing overflows."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED


@triton.jit
def exp2(x):
    """2^x, to 2 ulp; below 2^-126 it is 0. Triton's own handles those, by 3 instructions more."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def exp(x):
    """e^x for x <= 0, to 2 ulp, where `tl.exp` loses |x| / 2 ulp more to the rounding of x log2(e).
    That is found by a fused product, with the rest of log2(e), and put back by the slope."""
    z = 1.4426950408889634 * x
    lost = tl.fma(x, 1.4426950408889634, -z) + 1.925963033500115e-08 * x
    y = exp2(z)
    return tl.where(y == 0, 0.0, y + y * (0.6931471805599453 * lost))


@triton.jit
def reciprocal(x):
    """1 / x, to 1 ulp, for x far from float32's ends. A division takes 6 instructions more."""
    if INTERPRETED:
        y = 1 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def sigmoids(z):
    """sigmoid(z) and sigmoid(-z), neither by 1 - the other, which cancels; nothing overflows."""
    e = exp2(-1.4426950408889634 * tl.abs(z))
    large = reciprocal(1 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)
