"""What PTX instructions of lanes compute, by NumPy, after the PTX ISA's own pseudocode.

expected(name, operands) gives the bits of the results, and where they are defined at all.
"""

import re

import numpy as np
from ptx_numbers import F64, KINDS, flush, least, odd_sum

RELATIONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b, "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}  # fmt: skip
# Relative errors that the ISA grants.
BOUNDS = {
    "div.approx": 2.0**-22, "div.full": 2.0**-22, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9,
    "rcp": 2.0**-23, "ex2": 2.0**-22, "lg2": 2.0**-22, "sin": 2.0**-20, "cos": 2.0**-20,
    "tanh": 2.0**-11,
}  # fmt: skip


def objects(u, kind):
    """Python's own integers: no width limits what is computed."""
    bits = int(kind[1:])
    u = u.astype(f"u{max(bits // 8, 1)}")
    return (u.view(f"i{bits // 8}") if kind[0] == "s" else u).astype(object)


def bits_of(values, bits):
    return np.array([int(v) & ((1 << bits) - 1) for v in values], np.uint64)


def every(f, *operands):
    return np.array([f(*one) for one in zip(*operands, strict=True)], object)


# ---- integers


def _field(a, at, count, signed):
    at, count, bits = at & 255, count & 255, 32
    sign = a >> min(at + count - 1, bits - 1) & 1 if signed and count else 0
    picked = [a >> at + k & 1 if k < count and at + k < bits else sign for k in range(bits)]
    return sum(bit << k for k, bit in enumerate(picked))


def _insert(a, b, at, count):
    at, count = at & 255, count & 255
    mask = ((1 << count) - 1) << at & 0xFFFFFFFF
    return b & ~mask | a << at & mask


def _permute(a, b, how):
    pool = (b << 32 | a).to_bytes(8, "little")
    nibbles = [how >> 4 * k & 15 for k in range(4)]
    return sum((255 * (pool[n & 7] >> 7) if n & 8 else pool[n]) << 8 * k
               for k, n in enumerate(nibbles))  # fmt: skip


def _lop3(a, b, c, table):
    columns = [(a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1 for k in range(32)]
    return sum((table >> column & 1) << k for k, column in enumerate(columns))


def _quotient(a, b):
    q = abs(a) // abs(b) if b else 0
    return q if (a < 0) == (b < 0) else -q


_SINGLE = {
    "bfe.u32": lambda a, b, c: _field(a, b, c, False),
    "bfe.s32": lambda a, b, c: _field(a, b, c, True),
    "bfi.b32": _insert,
    "prmt.b32": _permute,
    "lop3.b32": _lop3,
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "popc.b32": lambda a: a.bit_count(),
    "clz.b32": lambda a: 32 - a.bit_length(),
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32": lambda a: a.bit_length() - 1,
}
_OPS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b, "not": lambda a: ~a, "neg": lambda a: -a, "abs": abs,
    "mov": lambda a: a, "shl": lambda a, b: a << b if b < 64 else 0,
    "shr": lambda a, b: a >> min(b, 64), "min": min, "max": max,
    "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b,
    "mul.wide": lambda a, b: a * b, "mad.wide": lambda a, b, c: a * b + c,
}  # fmt: skip


def integers(name, operands):
    """Bits of an instruction whose type is an integer, and where they are defined."""
    op, _, kind = name.rpartition(".")
    bits = int(kind[1:])
    defined = np.ones(len(operands[0]), bool)
    if name in _SINGLE:
        return bits_of(every(_SINGLE[name], *(objects(o, "u32") for o in operands)), 32), defined
    kinds = [kind] * len(operands)
    if op in ("shl", "shr"):
        kinds[1] = "u32"
    if op == "mad.wide":
        kinds[2] = f"{kind[0]}{2 * bits}"
    values = [objects(o, k) for o, k in zip(operands, kinds, strict=True)]
    if op in ("div", "rem"):
        low = -(1 << bits - 1)
        defined = np.array([b != 0 and not (a == low and b == -1 and kind[0] == "s")
                            for a, b in zip(*values, strict=True)])  # fmt: skip
    if op == "mul.hi":
        return bits_of(every(lambda a, b: a * b >> bits, *values), bits), defined
    wide = 2 * bits if op.endswith("wide") else bits
    return bits_of(every(_OPS[op], *values), wide), defined


# ---- floating point


def _ne(a, b):
    return (a != b) & ~np.isnan(a) & ~np.isnan(b)


def relation(name, a, b):
    """A comparison of floats: with u at its end, NaN makes it true."""
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    ordered = {**RELATIONS, "ne": _ne}[name[:2]](a, b)
    return (ordered & ~unordered) | (unordered & (len(name) == 3))


def _nan_wins(sign):
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, least(a, b, sign))


def _huge(a, b):
    """div.approx by what lies above 2^126 is 0, or NaN where infinity is divided."""
    huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(huge, np.where(np.isfinite(a), np.copysign(0.0, a) * np.sign(b), np.nan), a / b)


def _down(a, b, c):
    """a b + c as the largest float32 that is not above it."""
    exact = a.astype(np.longdouble) * b + c
    near = exact.astype(np.float32)
    above = near > exact
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near).astype(F64)


_FLOATS = {
    "add": odd_sum, "sub": lambda a, b: odd_sum(a, -b), "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: odd_sum(a * b, c), "min": least, "max": lambda a, b: least(a, b, -1),
    "min.NaN": _nan_wins(1), "max.NaN": _nan_wins(-1), "div": lambda a, b: a / b,
    "copysign": lambda a, b: np.copysign(b, a), "abs": np.abs, "neg": lambda a: -a,
    "sqrt": np.sqrt, "rcp": lambda a: 1 / a, "div.full": lambda a, b: a / b, "div.approx": _huge,
    "sqrt.approx": np.sqrt, "rsqrt.approx": lambda a: 1 / np.sqrt(a), "rcp.approx": lambda a: 1 / a,
    "ex2.approx": np.exp2, "lg2.approx": np.log2, "sin.approx": np.sin, "cos.approx": np.cos,
    "tanh.approx": np.tanh, "fma.rm": lambda a, b, c: _down(a, b, c),
}  # fmt: skip
ROUNDINGS = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


def floats(name, operands):
    """Bits and exact values of one instruction; of a mixed one, the last operand is float32."""
    parts = name.split(".")
    kind = KINDS[parts[-1]]
    op = ".".join(p for p in parts[:-1] if p not in ("ftz", "f32"))
    kinds = [kind] * len(operands)
    if "f32" in parts[:-1]:  # the last operand and the result are float32
        kinds[-1] = KINDS["f32"]
    values = [k.decode(o) for k, o in zip(kinds, operands, strict=True)]
    flushes = "ftz" in parts
    values = [flush(v) for v in values] if flushes else values
    exact = _FLOATS[op](*values)
    bits = kinds[-1].encode(exact)
    if flushes:
        bits = kinds[-1].encode(flush(kinds[-1].decode(bits)))
    return bits.astype(np.uint64), exact


def bound(name):
    """The relative error of an approximate instruction; None of an exact one."""
    if ".approx" not in name and ".full" not in name:
        return None
    op = name.split(".")[0]
    return BOUNDS.get(op) or BOUNDS[".".join(name.split(".")[:2])]


def halves(name, operands, one):
    """An instruction on two packed numbers, by its like on one."""
    bits = 32 if name.endswith("f32x2") else 16
    mask = np.uint64((1 << bits) - 1)
    narrow = name[:-2]
    low, *_ = one(narrow, [o & mask for o in operands])
    high, *_ = one(narrow, [o >> np.uint64(bits) for o in operands])
    return high << np.uint64(bits) | low


# ---- conversions


def conversion(name, operands):
    _, *how, to, of = name.split(".")
    if to.endswith("x2"):
        kind = KINDS[to[:-2]]
        high, low = (kind.encode(KINDS[of].decode(o)).astype(np.uint64) for o in operands)
        return high << np.uint64(16) | low
    if to == "tf32":  # ties away from zero
        u = operands[0].astype(np.uint32)
        finite = u & 0x7F800000 != 0x7F800000
        return np.where(finite, u + np.uint32(0x1000) & np.uint32(0xFFFFE000), u).astype(np.uint64)
    if of not in KINDS:
        values = objects(operands[0], of)
        if to in KINDS:
            return KINDS[to].encode(every(_odd_float, values).astype(F64)).astype(np.uint64)
        bits = int(to[1:])
        held = bits_of(values, bits)
        sign = to[0] == "s" and bits == 8  # lives in 16 bits, its sign extended
        return np.where(sign & (held >> np.uint64(7) & np.uint64(1) == 1),
                        held | np.uint64(0xFF00), held)  # fmt: skip
    x = KINDS[of].decode(operands[0])
    if "ftz" in how and of == "f32":
        x = flush(x)
    if how == ["sat"]:  # NaN becomes 0
        return KINDS[to].encode(np.clip(np.nan_to_num(x, nan=0.0), 0, 1) + 0.0).astype(np.uint64)
    rounding = next((ROUNDINGS[h] for h in how if h in ROUNDINGS), None)
    if to in KINDS:
        y = KINDS[to].decode(KINDS[to].encode(rounding(x) if rounding else x))
        return KINDS[to].encode(flush(y) if "ftz" in how and to == "f32" else y).astype(np.uint64)
    return bits_of([_saturated(v, to) for v in rounding(x)], int(to[1:]))


def _odd_float(n):
    """An integer of 64 bits in float64, rounded to odd."""
    cut = max(abs(n).bit_length() - 53, 0)
    kept = abs(n) >> cut
    kept |= int(kept << cut != abs(n))
    return float((kept << cut) * (-1 if n < 0 else 1))


def _saturated(x, to):
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    if np.isnan(x):  # "Zero", but of 64 bits the sign bit alone
        return 1 << 63 if bits == 64 else 0
    return min(max(int(x), low), high) if np.isfinite(x) else (high if x > 0 else low)


def comparison(name, operands):
    """setp: the predicate, or two of packed halves."""
    _, how, *flushing, kind = name.split(".")
    if kind.endswith("x2"):
        parts = [(o & np.uint64(0xFFFF), o >> np.uint64(16)) for o in operands]
        narrow = f"setp.{how}.{kind[:-2]}"
        return [comparison(narrow, [p[half] for p in parts])[0] for half in (0, 1)]
    if kind in KINDS:
        values = [KINDS[kind].decode(o) for o in operands]
        return [relation(how, *(map(flush, values) if flushing else values))]
    return [RELATIONS[how](*(objects(o, kind) for o in operands)).astype(bool)]


def is_float(name):
    return re.search(r"\.(f32|bf16|f16)(x2)?$", name) is not None
