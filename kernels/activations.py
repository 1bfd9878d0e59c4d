"""Device code of every activation, x -> (f(x), f'(x)), in float32.

The table of activations is fusedmlp/reference/activations.py; each row of it has a function here of
its name behind an underscore. A slope at a kink follows PyTorch: relu'(0) = 0.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..reference.activations import ACTIVATIONS, BSILU_ALPHA
from .tiles import INTERPRETED

_BSILU_ALPHA = tl.constexpr(BSILU_ALPHA)


@triton.jit
def _exp2(x):
    """2^x, to 2 ulp; below 2^-126 it is 0. Triton's own handles those, by 3 instructions more."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _reciprocal(x):
    """1 / x, to 1 ulp, for x far from float32's ends. A division takes 6 instructions more."""
    if INTERPRETED:
        y = 1 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _sigmoids(z):
    """sigmoid(z) and sigmoid(-z), neither by 1 - the other, which cancels; nothing overflows."""
    e = _exp2(-1.4426950408889634 * tl.abs(z))
    large = _reciprocal(1 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def _x_sigmoid(x, z, dz):
    """x * sigmoid(z), where dz = z'(x). Silu, quick_gelu and tanh-gelu differ in z alone."""
    s, complement = _sigmoids(z)
    y = x * s
    return y, s + y * complement * dz


@triton.jit
def _silu(x):
    return _x_sigmoid(x, x, 1.0)


@triton.jit
def _quick_gelu(x):
    return _x_sigmoid(x, 1.702 * x, 1.702)


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh(z / 2)) / 2 = sigmoid(z), with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
    x2 = x * x
    z = 1.5957691216057308 * x * (1 + 0.044715 * x2)
    return _x_sigmoid(x, z, 1.5957691216057308 * (1 + 0.134145 * x2))


@triton.jit
def _gelu(x):
    cdf = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * _exp2(-0.7213475204444817 * x * x)
    return x * cdf, cdf + x * pdf


@triton.jit
def _gelu2(x):
    y, slope = _gelu(x)
    return y * y, 2 * y * slope


@triton.jit
def _bsilu(x):
    s, complement = _sigmoids(x)
    y = (x + _BSILU_ALPHA) * s
    return y - 0.5 * _BSILU_ALPHA, s + y * complement


@triton.jit
def _relu(x):
    # Not maximum(): on the GPU that turns a NaN into 0.
    return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _relu_sq(x):
    r = tl.where(x <= 0, 0.0, x)
    return r * r, 2 * r


@triton.jit
def _sigmoid(x):
    s, complement = _sigmoids(x)
    return s, s * complement


@triton.jit
def _tanh(x):
    # tanh(x) = sigmoid(2x) - sigmoid(-2x) cancels near 0; below 0.2 the odd series is good to 6e-8
    # of x.
    x2 = x * x
    series = x * (1 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    s, complement = _sigmoids(2 * x)
    t = tl.where(tl.abs(x) < 0.2, series, s - complement)
    return t, 4 * s * complement


@triton.jit
def _identity(x):
    return x, tl.full(x.shape, 1.0, tl.float32)


# Functions here are named as the rows of reference/activations.py, behind an underscore.
DEVICE: dict[str, Any] = {name: globals()[f"_{name}"] for name in ACTIVATIONS}
