"""What instructions compute, as far as a warp's way depends on it: integers, predicates, addresses.

Each entry takes an instruction and gives a function of the state that returns the values of its
destinations, in order, or None where one is unknown. What has no entry has unknown results: floats
decide nothing here, and where a jump needs one the walk says so.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .sass import Instruction
from .values import (
    LANES,
    WORD,
    Read,
    State,
    Value,
    address,
    brackets,
    following,
    lanes,
    pair,
    reader,
    signed,
    wide,
    word,
)

Results = tuple[Value, ...]
Step = Callable[[State], Results]
Made = tuple[tuple[str, ...], Step]


def _is_predicate(operand: str) -> bool:
    return operand.lstrip("!").startswith(("P", "UP")) and "R" not in operand


def _cut(i: Instruction) -> tuple[list[str], list[str], list[str]]:
    """(destinations, sources, predicates read): a register, then the predicates right behind it are
    written, those behind a source are read."""
    to = [i.operands[0]]
    sources: list[str] = []
    predicates: list[str] = []
    for operand in i.operands[1:]:
        if _is_predicate(operand):
            (predicates if sources else to).append(operand)
        else:
            sources.append(operand)
    return to, sources, predicates


def _all(reads: list[Read], s: State) -> list[Value] | None:
    got = [read(s) for read in reads]
    return None if any(v is None for v in got) else got


def _simple(i: Instruction, fn: Callable[..., Value]) -> Made:
    """One register from 32-bit sources."""
    to, sources, _ = _cut(i)
    reads = [reader(x) for x in sources]

    def step(s: State) -> Results:
        got = _all(reads, s)
        rest = (None,) * (len(to) - 1)
        return (None if got is None else word(fn(*got)), *rest)

    return tuple(to), step


def _iadd3(i: Instruction) -> Made:
    to, sources, predicates = _cut(i)
    reads, carries = [reader(x) for x in sources], [reader(p) for p in predicates]
    # -x is ~x + 1, whose carry counts where the sum goes on in a second word.
    minus = sum(x.startswith("-") and not x.startswith("-0x") for x in sources)
    extended = "X" in i.parts
    plain = [reader(x[1:]) if x.startswith("-") and not x.startswith("-0x") else None
             for x in sources]  # fmt: skip

    def step(s: State) -> Results:
        if extended or len(to) > 1:
            got = _all([p or r for p, r in zip(plain, reads, strict=True)], s)
            inn = _all(carries, s) if extended else []
            if got is None or inn is None:
                return (None,) * len(to)
            parts = [wide(v ^ WORD) if p else wide(v) for v, p in zip(got, plain, strict=True)]
            total = sum(parts) + (0 if extended else minus) + sum(map(_one, inn))
            return (word(total), *([_high(total) != 0] * (len(to) - 1)))
        got = _all(reads, s)
        return (None if got is None else word(sum(map(wide, got))),)

    return tuple(to), step


def _one(value: Value) -> Value:
    return value.astype(np.uint64) if isinstance(value, np.ndarray) else int(value)


def _high(value: Value) -> Value:
    return value >> np.uint64(32) if isinstance(value, np.ndarray) else value >> 32


def _imad(i: Instruction) -> Made:
    to, sources, predicates = _cut(i)
    is_wide, is_high = "WIDE" in i.parts, "HI" in i.parts
    unsigned = "U32" in i.parts
    reads = [reader(x) for x in sources[:2]]
    third = (pair if is_wide or is_high else reader)(sources[2])
    carries = [reader(p) for p in predicates if p not in ("PT", "!PT", "UPT", "!UPT")]
    if is_wide:
        to = [to[0], following(to[0], 1), *to[1:]]

    def step(s: State) -> Results:
        got, c, inn = _all(reads, s), third(s), _all(carries, s)
        if got is None or c is None or inn is None:
            return (None,) * len(to)
        a, b = got
        if not is_wide and not is_high:
            total = wide(a) * wide(b) + wide(c) + sum(map(_one, inn))
            return (word(total), *([None] * (len(to) - 1)))
        product = a * b if unsigned else signed(a) * signed(b)
        total = _modulo(product) + wide(c)
        if isinstance(total, int):
            total &= (1 << 64) - 1
        low, high = word(total), word(_high(total))
        return (low, high, *([None] * (len(to) - 2))) if is_wide else (high,)

    return tuple(to), step


def _modulo(product: Value) -> Value:
    if isinstance(product, np.ndarray):
        return product.astype(np.uint64)
    return product & ((1 << 64) - 1)


def _lea(i: Instruction) -> Made:
    to, sources, predicates = _cut(i)
    carries = [reader(p) for p in predicates]
    high, extend = "HI" in i.parts, "SX32" in i.parts
    shift = int(sources[-1], 0)
    a, b = reader(sources[0]), reader(sources[1])
    c = reader(sources[2]) if high and not extend and len(sources) > 3 else None

    def step(s: State) -> Results:
        x, y, inn = a(s), b(s), _all(carries, s)
        z = c(s) if c else 0
        if x is None or y is None or z is None or inn is None:
            return (None,) * len(to)
        if high:
            both = _modulo(signed(x)) if extend else wide(x) | _up(z)
            part = word(_high(_left(both, shift)))
        else:
            part = word(_left(wide(x), shift))
        total = wide(part) + wide(y) + sum(map(_one, inn if "X" in i.parts else []))
        return (word(total), *([_high(total) != 0] * (len(to) - 1)))

    return tuple(to), step


def _up(value: Value) -> Value:
    return _left(wide(value), 32)


def _left(value: Value, by: Value) -> Value:
    if isinstance(value, np.ndarray) or isinstance(by, np.ndarray):
        v, n = lanes(wide(value)).astype(np.uint64), lanes(by).astype(np.uint64)
        return np.where(n > 63, np.uint64(0), v << np.minimum(n, np.uint64(63)))
    return value << by & ((1 << 64) - 1) if by < 64 else 0


def _right(value: Value, by: Value, arithmetic: bool) -> Value:
    if isinstance(value, np.ndarray) or isinstance(by, np.ndarray):
        n = np.minimum(lanes(by).astype(np.uint64), np.uint64(63))
        v = lanes(wide(value)).astype(np.uint64)
        if arithmetic:
            return (v.view(np.int64) >> n.astype(np.int64)).view(np.uint64)
        return np.where(lanes(by) > 63, np.uint64(0), v >> n)
    if arithmetic:
        value = value - (1 << 64) if value >> 63 else value
        return value >> min(by, 63) & ((1 << 64) - 1)
    return value >> by if by < 64 else 0


def _shf(i: Instruction) -> Made:
    to, sources, _ = _cut(i)
    a, n, c = map(reader, sources)
    left, high = i.parts[0] == "L", "HI" in i.parts
    wraps, arithmetic = "W" in i.parts, any(p in ("S32", "S64") for p in i.parts)

    def step(s: State) -> Results:
        low, by, top = a(s), n(s), c(s)
        if low is None or by is None or top is None:
            return (None,)
        if wraps:
            by = by & 31
        both = wide(low) | _up(top)
        moved = _left(both, by) if left else _right(both, by, arithmetic)
        return (word(_high(moved) if high else moved),)

    return tuple(to), step


def _lut(table: int, *inputs: Value) -> Value:
    a, b, c = (wide(v) for v in inputs)
    out: Value = 0
    for k in range(8):
        if table >> k & 1:
            x = a if k & 4 else a ^ WORD
            y = b if k & 2 else b ^ WORD
            z = c if k & 1 else c ^ WORD
            out = out | (x & y & z)
    return word(out)


def _lop3(i: Instruction) -> Made:
    operands = list(i.operands)
    to = []
    if _is_predicate(operands[0]):
        to.append(operands.pop(0))
    to.append(operands.pop(0))
    reads = [reader(x) for x in operands[:3]]
    table = int(operands[3], 0)
    with_predicate = len(to) > 1
    # Predicates kept as bits of a register: one bit may be known and its neighbour not.
    source, bits = operands[0], operands[1]
    flags = int(bits, 0) if bits.startswith("0x") and operands[2] == "RZ" else None
    setting, clearing = table == 0xFC and to == [source], table == 0xC0 and to == [source]

    def step(s: State) -> Results:
        got = _all(reads, s)
        if got is None and flags is not None and source in s.bits:
            known, value = s.bits[source]
            if setting or clearing:
                s.bits[source] = known | (flags if setting else ~flags & WORD), (
                    value | flags if setting else value & flags)  # fmt: skip
            elif with_predicate and table == 0xC0 and flags & ~known == 0:
                return (value & flags != 0, value & flags)
        if got is None:
            return (None,) * len(to)
        out = _lut(table, *got)
        return (out != 0, out) if with_predicate else (out,)

    return tuple(to), step


def _compare(how: str, a: Value, b: Value) -> Value:
    return {
        "LT": lambda: a < b, "LE": lambda: a <= b, "GT": lambda: a > b, "GE": lambda: a >= b,
        "EQ": lambda: a == b, "NE": lambda: a != b, "T": lambda: True, "F": lambda: False,
    }[how]()  # fmt: skip


_STRICT = {"LE": "LT", "GE": "GT"}


def _isetp(i: Instruction) -> Made:
    to, rest = i.operands[:2], i.operands[2:]
    a, b, join = map(reader, rest[:3])
    lower = reader(rest[3]) if len(rest) > 3 else None
    how, joined = i.parts[0], next(p for p in i.parts[1:] if p in ("AND", "OR", "XOR"))
    unsigned = "U32" in i.parts

    def step(s: State) -> Results:
        x, y, p = a(s), b(s), join(s)
        if joined == "AND" and p is False:
            return (False, None)
        if joined == "OR" and p is True:
            return (True, None)
        if x is None or y is None or p is None:
            return (None, None)
        if not unsigned:
            x, y = signed(x), signed(y)
        out = _compare(how, x, y)
        if lower is not None:
            q = lower(s)
            if q is None:
                return (None, None)
            strict = _compare(_STRICT.get(how, how), x, y)
            out = (strict | ((x == y) & q)) if how != "EQ" else ((x == y) & q)
        other = ~out if isinstance(out, np.ndarray) else not out
        return _join(out, p, joined), _join(other, p, joined)

    return tuple(to), step


def _join(a: Value, b: Value, how: str) -> Value:
    return a & b if how == "AND" else a | b if how == "OR" else a ^ b


def _plop3(i: Instruction) -> Made:
    to, reads = i.operands[:2], [reader(p) for p in i.operands[2:5]]
    tables = [int(x, 0) for x in i.operands[5:7]]

    def step(s: State) -> Results:
        got = _all(reads, s)
        if got is None:
            return _partly(tables, reads, s)
        bits = [np.where(lanes(v), WORD, 0).astype(np.uint64) for v in got]
        first, second = (_lut(t, *bits) != 0 for t in tables)
        return first, second

    return tuple(to), step


def _partly(tables: list[int], reads: list[Read], s: State) -> Results:
    """A predicate that is the same whatever the unknown inputs are."""
    got = [v if isinstance(v := read(s), bool) else None for read in reads]
    outs: list[Value] = []
    for table in tables:
        seen = {
            bool(table >> k & 1)
            for k in range(8)
            if all(v is None or bool(k >> (2 - n) & 1) == v for n, v in enumerate(got))
        }
        outs.append(seen.pop() if len(seen) == 1 else None)
    return tuple(outs)


def _sel(i: Instruction) -> Made:
    a, b, p = map(reader, i.operands[1:4])

    def step(s: State) -> Results:
        which = p(s)
        if which is True or which is False:
            return ((a if which else b)(s),)
        x, y = a(s), b(s)
        if which is None:
            return (x if x is not None and _same(x, y) else None,)
        return (None if x is None or y is None else np.where(which, lanes(x), lanes(y)),)

    return i.operands[:1], step


def _same(x: Value, y: Value) -> bool:
    return isinstance(x, int) and isinstance(y, int) and x == y


def _least(i: Instruction, added: int = 0) -> Made:
    to, sources, predicates = _cut(i)
    reads, which = [reader(x) for x in sources], reader(predicates[-1])
    unsigned = "U32" in i.parts

    def step(s: State) -> Results:
        got, least = _all(reads, s), which(s)
        rest = (None,) * (len(to) - 1)
        if got is None or not isinstance(least, bool):
            return (None, *rest)
        if added:
            got = [word(wide(got[0]) + wide(got[1])), got[2]]
        x, y = got if unsigned else map(signed, got)
        pick = np.minimum if least else np.maximum
        if isinstance(x, int) and isinstance(y, int):
            return (word(min(x, y) if least else max(x, y)), *rest)
        return (word(pick(x, y)), *rest)

    return tuple(to), step


def _constant(i: Instruction) -> Made:
    size = next((int(p) // 8 for p in i.parts if p in ("64", "128")), 4)
    small = next((p for p in i.parts if p in ("U8", "S8", "U16", "S16")), None)
    to = tuple(following(i.operands[0], k) for k in range(size // 4))
    source = i.operands[1]
    bank = reader(source[source.index("[") + 1 : source.index("]")])
    where = address(brackets(source))

    def step(s: State) -> Results:
        b, offset = bank(s), where(s)
        if not isinstance(b, int) or not isinstance(offset, int):
            return (None,) * len(to)
        if small:
            return (s.constant(b, offset, int(small[1:]) // 8),)
        return tuple(s.constant(b, offset + 4 * k) for k in range(len(to)))

    return to, step


def _special(i: Instruction) -> Made:
    name = i.operands[1]
    if i.stem == "CS2R":
        zero = 0 if name == "SRZ" else None
        to = (i.operands[0],) if "32" in i.parts else (
            i.operands[0], following(i.operands[0], 1))  # fmt: skip
        return to, lambda s: (zero,) * len(to)
    return i.operands[:1], lambda s: (s.special.get(name),)


def _single(bits: Value) -> np.ndarray:
    return lanes(bits).astype(np.uint32).view(np.float32)


def _bits(value: np.ndarray) -> Value:
    return value.astype(np.float32).view(np.uint32).astype(np.uint64)


def _to_float(i: Instruction) -> Made:
    read, unsigned = reader(i.operands[1]), "U32" in i.parts
    up = "RP" in i.parts

    def step(s: State) -> Results:
        v = read(s)
        if v is None:
            return (None,)
        exact = lanes(v if unsigned else signed(v)).astype(np.float64)
        near = exact.astype(np.float32)
        if up:
            near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
        return (_bits(near),)

    return i.operands[:1], step


def _mufu(i: Instruction) -> Made:
    read = reader(i.operands[1])

    def step(s: State) -> Results:
        v = read(s) if "RCP" in i.parts else None
        if v is None:
            return (None,)
        with np.errstate(divide="ignore", over="ignore"):
            return (_bits(1.0 / _single(v).astype(np.float64)),)

    return i.operands[:1], step


def _to_int(i: Instruction) -> Made:
    read, unsigned = reader(i.operands[-1]), "U32" in i.parts
    down = "FLOOR" in i.parts

    def step(s: State) -> Results:
        v = read(s)
        if v is None or ("TRUNC" not in i.parts and not down):
            return (None,)
        x = np.nan_to_num(_single(v).astype(np.float64), posinf=2.0**40)
        x = np.floor(x) if down else np.trunc(x)
        x = np.clip(x, 0, WORD) if unsigned else np.clip(x, -(2.0**31), 2.0**31 - 1)
        return (word(x.astype(np.int64).astype(np.uint64)),)

    return i.operands[:1], step


def _prmt(i: Instruction) -> Made:
    to, sources, _ = _cut(i)
    reads = [reader(x) for x in sources]

    def step(s: State) -> Results:
        got = _all(reads, s)
        if got is None:
            return (None,)
        a, pick, c = got
        if isinstance(pick, np.ndarray):
            return (None,)
        both, out = wide(a) | _up(c), 0
        for k in range(4):
            n = pick >> 4 * k & 15
            byte = _right(both, 8 * (n & 7), False) & (
                np.uint64(255) if isinstance(both, np.ndarray) else 255)  # fmt: skip
            if n & 8:
                byte = (byte >> 7) * 255
            out = out | _left(byte, 8 * k)
        return (word(out),)

    return tuple(to), step


def _sgxt(value: Value, bits: Value) -> Value:
    out = _left(wide(value), 32 + 32 - bits)
    return _right(out, 64 - bits, True)


def _elect(i: Instruction) -> Made:
    """The first lane; the warps of these kernels are whole where they choose one."""
    return (i.operands[0],), lambda s: (LANES == 0,)


def _vote(i: Instruction) -> Made:
    how, read = i.parts[0], reader(i.operands[-1])
    to = i.operands[:-1]

    def step(s: State) -> Results:
        v = read(s)
        if v is None:
            return (None,) * len(to)
        each = lanes(v)
        verdict = bool(each.all() if how == "ALL" else each.any())
        ballot = int((each.astype(np.uint64) << LANES).sum())
        return tuple(ballot if "R" in t else verdict for t in to)

    return tuple(to), step


def _shfl(i: Instruction) -> Made:
    to = i.operands[:2]
    a, b, c = map(reader, i.operands[2:5])
    how = i.parts[0]

    def step(s: State) -> Results:
        v, n, clamp = a(s), b(s), c(s)
        if v is None or n is None or clamp is None:
            return (None, None)
        if isinstance(v, int) and how in ("IDX", "BFLY"):
            return (True, v)
        me, by, most = LANES.astype(np.int64), lanes(n).astype(np.int64), lanes(clamp)
        segment, most = (most.astype(np.int64) >> 8) & 31, most.astype(np.int64) & 31
        low, high = me & segment, (me & segment) | (most & ~segment)
        source = {
            "UP": me - by, "DOWN": me + by, "BFLY": me ^ by, "IDX": low | (by & ~segment),
        }[how]  # fmt: skip
        inside = source >= most if how == "UP" else source <= high
        return inside, lanes(v)[np.where(inside, source, me)]

    return tuple(to), step


def _redux(i: Instruction) -> Made:
    to, sources, _ = _cut(i)
    read = reader(sources[0])

    def step(s: State) -> Results:
        v = read(s)
        if v is None:
            return (None,) * len(to)
        each = lanes(v).astype(np.uint64)
        if "SUM" in i.parts:
            out: Value = int(each.sum()) & WORD
        elif "OR" in i.parts:
            out = int(np.bitwise_or.reduce(each))
        elif "MIN" in i.parts or "MAX" in i.parts:
            x = signed(each) if "S32" in i.parts else each
            out = int(x.min() if "MIN" in i.parts else x.max()) & WORD
        else:
            out = v if isinstance(v, int) else int(np.bitwise_and.reduce(each))
        return (out, *([None] * (len(to) - 1)))

    return tuple(to), step


def _p2r(i: Instruction) -> Made:
    uniform = i.stem == "UP2UR"
    old, mask = reader(i.operands[2]), int(i.operands[3], 0)
    names = [f"{'UP' if uniform else 'P'}{k}" for k in range(7)]

    def step(s: State) -> Results:
        out = old(s)
        if out is None:
            return (None,)
        out = out & (WORD ^ mask)
        for k, name in enumerate(names):
            if mask >> k & 1:
                v = s.r.get(name)
                if v is None:
                    return (None,)
                out = out | _left(_one(v), k)
        return (out,)

    return i.operands[:1], step


def _r2p(i: Instruction) -> Made:
    read, mask = reader(i.operands[1]), int(i.operands[2], 0)
    shift = next((8 * int(p[1]) for p in i.parts if p[0] == "B"), 0)
    kept = [k for k in range(7) if mask >> k & 1]

    def step(s: State) -> Results:
        v = read(s)
        if v is None:
            return (None,) * len(kept)
        return tuple((_right(wide(v), k + shift, False) & _unit(v)) != 0 for k in kept)

    return tuple(f"P{k}" for k in kept), step


def _unit(v: Value) -> Any:
    return np.uint64(1) if isinstance(v, np.ndarray) else 1


def _flo(value: Value) -> Value:
    def one(v: int) -> int:
        return v.bit_length() - 1 if v else WORD

    if isinstance(value, np.ndarray):
        return np.array([one(int(v)) for v in value], np.uint64)
    return one(value)


def _popc(value: Value) -> Value:
    if isinstance(value, np.ndarray):
        return np.array([int(v).bit_count() for v in value], np.uint64)
    return value.bit_count()


def _brev(value: Value) -> Value:
    def one(v: int) -> int:
        return int(f"{v:032b}"[::-1], 2)

    if isinstance(value, np.ndarray):
        return np.array([one(int(v)) for v in value], np.uint64)
    return one(value)


def _iabs(value: Value) -> Value:
    return abs(signed(value))


def _move(i: Instruction) -> Made:
    read = reader(i.operands[-1])
    return i.operands[:1], lambda s: (read(s),)


def _move_out(i: Instruction) -> Made:
    """R2UR takes the first lane's value; its predicate says which lanes have another, and code goes
    round until none is left. None has: one thread asks for TMA."""
    read = reader(i.operands[-1])
    to = i.operands[:-1]

    def step(s: State) -> Results:
        v = read(s)
        v = int(v[0]) if isinstance(v, np.ndarray) else v
        return tuple(False if _is_predicate(name) else v for name in to)

    return to, step


def _half(i: Instruction) -> Made:
    """HFMA2 R, -RZ, RZ, x, y moves two constants; other halves decide nothing."""
    a = i.operands
    numbers = a[3:5]
    if len(a) != 5 or set(a[1:3]) - {"RZ", "-RZ"}:
        return a[:1], lambda s: (None,)
    try:
        packed = struct.pack("<ee", float(numbers[1]), float(numbers[0]))
    except (ValueError, OverflowError):
        return a[:1], lambda s: (None,)
    known = int.from_bytes(packed, "little") if not any(map(math.isnan, map(float, numbers))) else 0
    return a[:1], lambda s: (known,)


_SUM: dict[str, Callable[[Instruction], Made]] = {
    "IADD3": _iadd3, "IMAD": _imad, "LEA": _lea, "SHF": _shf, "LOP3": _lop3, "ISETP": _isetp,
    "PLOP3": _plop3, "SEL": _sel, "PRMT": _prmt, "MOV": _move,
    "IADD": _iadd3,
    "VIADD": lambda i: _simple(i, lambda a, b: wide(a) + wide(b)),
    "VIMNMX": _least, "IMNMX": _least, "VIADDMNMX": lambda i: _least(i, 1),
    "IABS": lambda i: _simple(i, _iabs),
    "SGXT": lambda i: _simple(i, (lambda a, b: a & ((1 << b) - 1)) if "U32" in i.parts else _sgxt),
    "FLO": lambda i: _simple(i, _flo), "POPC": lambda i: _simple(i, _popc),
    "BREV": lambda i: _simple(i, _brev),
    "BMSK": lambda i: _simple(i, lambda a, b: _left(_left(1, b) - 1, a)),
    "VOTE": _vote, "P2R": _p2r,
}  # fmt: skip
MEANINGS: dict[str, Callable[[Instruction], Made]] = {
    **_SUM, **{f"U{name}": made for name, made in _SUM.items()},
    "VOTEU": _vote, "R2UR": _move_out, "R2P": _r2p, "UP2UR": _p2r,
    "S2R": _special, "S2UR": _special, "CS2R": _special,
    "LDC": _constant, "ULDC": _constant, "LDCU": _constant,
    "I2F": _to_float, "I2FP": _to_float, "F2I": _to_int, "MUFU": _mufu, "HFMA2": _half,
    "ELECT": _elect, "SHFL": _shfl, "REDUX": _redux, "CREDUX": _redux,
}  # fmt: skip
__all__ = ["MEANINGS", "Made", "Step", "pair"]
