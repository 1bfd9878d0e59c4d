"""Floating point numbers of PTX by NumPy: from bits to float64 and back, rounded once."""

from dataclasses import dataclass

import numpy as np

F64 = np.float64


@dataclass(frozen=True)
class Kind:
    """A floating point type: its bits, digits of its significand, exponent of its smallest step."""

    bits: int
    digits: int
    step: int
    largest: float

    @property
    def unsigned(self):
        return np.dtype(f"u{self.bits // 8}")

    def decode(self, u):
        u = u.astype(self.unsigned)
        held = (u.astype(np.uint32) << 16).view(np.float32) if self is BF16 else u
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return held.view(f"f{held.itemsize}").astype(F64)

    def encode(self, x):
        """To the nearest, ties to even. What was rounded to float64 before must have been rounded
        to odd."""
        with np.errstate(all="ignore"):
            exponent = np.frexp(x)[1] - self.digits
            scale = np.ldexp(1.0, np.maximum(np.where(np.isfinite(x), exponent, 0), self.step))
            y = np.where(np.isfinite(x), np.rint(x / scale) * scale, x)
            y = np.where(np.abs(y) > self.largest, np.copysign(np.inf, y), y)
            single = y.astype(np.float32)
        if self is BF16:
            return (single.view(np.uint32) >> 16).astype(np.uint16)
        return y.astype(np.float16).view(np.uint16) if self is F16 else single.view(np.uint32)

    def same(self, got, expected):
        """Equal bits, or both NaN: the ISA leaves open which NaN it is."""
        a, b = self.decode(got), self.decode(expected)
        return (got == expected) | (np.isnan(a) & np.isnan(b))


F32 = Kind(32, 24, -149, float(np.finfo(np.float32).max))
F16 = Kind(16, 11, -24, 65504.0)
BF16 = Kind(16, 8, -133, float.fromhex("0x1.fep127"))
KINDS = {"f32": F32, "f16": F16, "bf16": BF16}


def odd_sum(a, b):
    """a + b in float64, rounded to odd: the last bit tells that something was cut off."""
    with np.errstate(all="ignore"):
        s = a + b
        part = s - a
        error = (a - (s - part)) + (b - part)
        cut = np.isfinite(s) & (error != 0) & np.isfinite(error)
        even = s.view(np.int64) & 1 == 0
        away = np.sign(error) == np.sign(s)
        return np.where(cut & even, (s.view(np.int64) + np.where(away, 1, -1)).view(F64), s)


def flush(x):
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def least(a, b, sign=1):
    """The smaller (sign 1) or larger (-1) of two, a number before a NaN, -0 below +0."""
    with np.errstate(all="ignore"):
        x, y = sign * a, sign * b
        first = (x < y) | ((x == y) & np.signbit(x))
    return np.where(np.isnan(a), b, np.where(np.isnan(b) | first, a, b))
