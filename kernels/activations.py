"""Device code of every activation, x -> (f(x), f'(x)), in float32.

The table of activations is fusedmlp/reference/activations.py; each row of it has a jit function of
its name here, and a gate another for its factor of u, <name>_up. Parameters follow x, in the row's
order; they are scalars at run time, so that another limit is no other kernel. What begins with an
underscore is shared by several. A slope at a kink follows PyTorch: relu'(0) = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..reference.activations import ACTIVATIONS, BSILU_ALPHA, Activation, resolve
from .exponentials import exp2, reciprocal, sigmoids

_BSILU_ALPHA = tl.constexpr(BSILU_ALPHA)


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
