"""Device code of every activation, x -> (f(x), f'(x)), in float32.

The table of activations is fusedmlp/reference/activations.py; each row of it has a jit function of
its name here, and a gate another for its factor of u, <name>_up. Parameters follow x, in the row's
order; they are scalars at run time, so that another limit is no other kernel. What begins with an
underscore is shared by several. A slope at a kink follows PyTorch: relu'(0) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..reference.activations import (
    ACTIVATIONS,
    BSILU_ALPHA,
    LAPLACE_DEVIATION,
    LAPLACE_MEAN,
    Activation,
    resolve,
)
from .exponentials import exp2, reciprocal, sigmoids

_BSILU_ALPHA = tl.constexpr(BSILU_ALPHA)
_LAPLACE_MEAN = tl.constexpr(LAPLACE_MEAN)
_LAPLACE_SCALE = tl.constexpr(1 / (LAPLACE_DEVIATION * math.sqrt(2)))
_LAPLACE_PEAK = tl.constexpr(1 / (LAPLACE_DEVIATION * math.sqrt(2 * math.pi)))


@triton.jit
def _x_sigmoid(x, z, dz):
    """x * sigmoid(z), where dz = z'(x). Silu, quick_gelu and tanh-gelu differ in z alone."""
    s, complement = sigmoids(z)
    y = x * s
    return y, s + y * complement * dz


@triton.jit
def silu(x):
    return _x_sigmoid(x, x, 1.0)


@triton.jit
def quick_gelu(x):
    return _x_sigmoid(x, 1.702 * x, 1.702)


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(z / 2)) / 2 = sigmoid(z), with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
    x2 = x * x
    z = 1.5957691216057308 * x * (1 + 0.044715 * x2)
    return _x_sigmoid(x, z, 1.5957691216057308 * (1 + 0.134145 * x2))


@triton.jit
def gelu(x):
    cdf = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * exp2(-0.7213475204444817 * x * x)
    return x * cdf, cdf + x * pdf


@triton.jit
def gelu2(x):
    y, slope = gelu(x)
    return y * y, 2 * y * slope


@triton.jit
def bsilu(x):
    s, complement = sigmoids(x)
    y = (x + _BSILU_ALPHA) * s
    return y - 0.5 * _BSILU_ALPHA, s + y * complement


@triton.jit
def relu(x):
    # Not maximum(): on the GPU that turns a NaN into 0.
    return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def relu_sq(x):
    r = tl.where(x <= 0, 0.0, x)
    return r * r, 2 * r


@triton.jit
def sigmoid(x):
    s, complement = sigmoids(x)
    return s, s * complement


@triton.jit
def tanh(x):
    # tanh(x) = sigmoid(2x) - sigmoid(-2x) cancels near 0; below 0.2 the odd series is good to 6e-8
    # of x.
    x2 = x * x
    series = x * (1 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    s, complement = sigmoids(2 * x)
    t = tl.where(tl.abs(x) < 0.2, series, s - complement)
    return t, 4 * s * complement


@triton.jit
def identity(x):
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def mish(x):
    # x t with t = tanh(softplus(x)) = n / (n + 2), n = e^2 + 2 e, e = exp(x). From 20 on t is 1 and
    # its slope t' = sigmoid(x) (1 - t^2) is 0, to float32; e^2 would overflow. As 4 e (1 + e) /
    # (n + 2)^2 t' does not cancel. Not minimum(): on the GPU that takes a NaN for 20.
    z = tl.where(x > 20, 20.0, x)
    e = exp2(1.4426950408889634 * z)
    n = e * (e + 2)
    r = reciprocal(n + 2)
    t = tl.where(x > 0, 1 - 2 * r, n * r)  # the first is exact far out
    return x * t, t + z * (4 * e * (1 + e) * r * r)


@triton.jit
def relu6(x):
    value = tl.where(x > 6, 6.0, tl.where(x <= 0, 0.0, x))
    return value, tl.where((x > 0) & (x < 6), 1.0, 0.0)


@triton.jit
def _hard(x):
    """(x + 3) / 6 between 0 and 1."""
    y = (x + 3) * 0.16666666666666666
    return tl.where(x >= 3, 1.0, tl.where(x <= -3, 0.0, y))


@triton.jit
def hardswish(x):
    slope = tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x * 0.3333333333333333 + 0.5))
    return x * _hard(x), slope


@triton.jit
def hardsigmoid(x):
    return _hard(x), tl.where((x > -3) & (x < 3), 0.16666666666666666, 0.0)


@triton.jit
def leaky_relu(x, negative_slope):
    slope = tl.where(x > 0, 1.0, negative_slope)
    return x * slope, slope


@triton.jit
def elu(x, alpha):
    # e - 1 cancels near 0; tanh(z / 2) (e + 1) is the same and does not.
    z = tl.where(x > 0, 0.0, x)
    t, _ = tanh(0.5 * z)
    e = exp2(1.4426950408889634 * z)
    return tl.where(x > 0, x, alpha * t * (e + 1)), tl.where(x > 0, 1.0, alpha * e)


@triton.jit
def selu(x):
    y, slope = elu(x, 1.6732632423543772)
    return 1.0507009873554805 * y, 1.0507009873554805 * slope


@triton.jit
def softplus(x, beta, threshold):
    # log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3: a series good to 2e-9 of it,
    # where a logarithm of 1 + e loses what e is small by. Divided once for all values, x too:
    # masked kernels have no registers for a division of each, nor for x beside z.
    z = beta * x
    e = exp2(-1.4426950408889634 * tl.abs(z))
    s = e * reciprocal(2 + e)
    q = s * s
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
    series = 1 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series)))
    y = tl.where(z > 0, z, 0.0) + 2 * s * series
    slope, _ = sigmoids(z)
    return tl.where(z > threshold, z, y) * (1 / beta), tl.where(z > threshold, 1.0, slope)


@triton.jit
def sqrtsoftplus(x):
    y, slope = softplus(x, 1.0, 20.0)
    root = tl.sqrt(y)
    # Far below 0 both are 0.
    return root, tl.where(y == 0, 0.0, 0.5 * slope / root)


@triton.jit
def laplace(x):
    z = (x - _LAPLACE_MEAN) * _LAPLACE_SCALE
    return 0.5 * (1 + tl.math.erf(z)), _LAPLACE_PEAK * exp2(-1.4426950408889634 * z * z)


@triton.jit
def _clip(u, limit):
    # Not minimum() and maximum(): on the GPU they turn a NaN into the limit.
    value = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return value, tl.where((u <= limit) & (u >= -limit), 1.0, 0.0)


@triton.jit
def swiglu_oai(x, limit, alpha):
    z = tl.where(x > limit, limit, x)
    y, slope = _x_sigmoid(z, alpha * z, alpha)
    return y, tl.where(x <= limit, slope, 0.0)


@triton.jit
def swiglu_oai_up(u, limit, alpha):
    value, slope = _clip(u, limit)
    return value + 1, slope


@triton.jit
def clipped_gelu(x, limit):
    y, slope = gelu(x)
    value, inside = _clip(y, limit)
    return value, slope * inside


@triton.jit
def clamped_swiglu(x, limit):
    y, slope = silu(tl.where(x > limit, limit, x))
    return y, tl.where(x <= limit, slope, 0.0)


@triton.jit
def clamped_swiglu_up(u, limit):
    return _clip(u, limit)


@triton.jit
def swiglu_step(x, limit):
    y, slope = silu(x)
    return tl.where(y > limit, limit, y), tl.where(y <= limit, slope, 0.0)


@triton.jit
def swiglu_step_up(u, limit):
    return _clip(u, limit)


@triton.jit
def _softcap(x, cap):
    t, slope = tanh(x / cap)
    return cap * t, slope


@triton.jit
def situ(x, beta, beta_up):
    y, slope = _softcap(x, beta)
    s, complement = sigmoids(x)
    return y * s, (slope + y * complement) * s


@triton.jit
def situ_up(u, beta, beta_up):
    return _softcap(u, beta_up)


@triton.jit
def softcap_swiglu(x, gate_cap, up_cap):
    return situ(x, gate_cap, up_cap)


@triton.jit
def softcap_swiglu_up(u, gate_cap, up_cap):
    return situ_up(u, gate_cap, up_cap)


@triton.jit
def scaled_swiglu(x, gate_scale, up_scale):
    y, slope = silu(gate_scale * x)
    return y, gate_scale * slope


@triton.jit
def scaled_swiglu_up(u, gate_scale, up_scale):
    return up_scale * u, tl.full(u.shape, 1.0, tl.float32) * up_scale


def _own_functions() -> dict[str, Any]:
    """The jit functions of this file, by name."""
    jit = type(_x_sigmoid)
    own = {name: f for name, f in globals().items() if isinstance(f, jit)}
    return {name: f for name, f in own.items() if name[0] != "_" and f.fn.__module__ == __name__}


def _check(rows: Mapping[str, Activation], functions: set[str]) -> None:
    """Every row has its functions, and every function its row."""
    where, table = "kernels/activations.py", "fusedmlp/reference/activations.py"
    needed = {
        name: f"def {name}({', '.join(('x', *row.parameters))})" for name, row in rows.items()
    }
    needed |= {
        f"{name}_up": f"def {name}_up({', '.join(('u', *row.parameters))})"
        for name, row in rows.items()
        if row.up is not None
    }
    for name in sorted(needed.keys() - functions):
        raise RuntimeError(
            f"{where}: activation {name!r} of {table} must have a device function, got none: write "
            f"`@triton.jit {needed[name]}` in {where}, which returns its value and slope in float32"
        )
    for name in sorted(functions - needed.keys()):
        raise RuntimeError(
            f"{where}: device function {name!r} must have a row, got none: write "
            f"`Activation({name!r}, ...)` in {table}, or name it with an underscore first"
        )


DEVICE: dict[str, Any] = _own_functions()
_check(ACTIVATIONS, set(DEVICE))


def act_of(activation: str) -> dict[str, Any]:
    """What a kernel takes of an argument `activation`: ACT and UP, its functions of g and of u
    (None: u itself), and `scalars`, which both are given."""
    row, scalars = resolve(activation)
    up = None if row.up is None else DEVICE[f"{row.name}_up"]
    return {"scalars": scalars, "ACT": DEVICE[row.name], "UP": up}
