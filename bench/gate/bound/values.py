"""Values of a warp's registers: an int where its 32 lanes agree, an array where they do not, None
where nobody knows. Operands are compiled once into functions that read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

LANES = np.arange(32, dtype=np.uint64)
WORD = 0xFFFFFFFF
Value = Any  # int | np.ndarray | None
Read = Callable[["State"], Value]
_CONSTANT = re.compile(r"c?x?\[(0x[0-9a-f]+|UR\d+)\]\[(.+)\]$")


class Unreadable(Exception):
    """What the walk cannot follow, and why."""


class State:
    """One warp: registers by name, the constant bank, what lies in memory and in its own part of
    shared memory."""

    def __init__(self, constants: dict[int, bytes], special: dict[str, Value]) -> None:
        self.r: dict[str, Value] = {}
        self.constants = constants
        self.special = special
        self.shared: dict[tuple[int, int], Value] = {}
        # Unknown register -> (bits that are known, their values), for flags kept in a register.
        self.bits: dict[str, tuple[int, Value]] = {}
        self.lost: dict[str, str] = {}  # register -> what left it unknown
        self.load: Callable[[int, int], int | None] = lambda address, size: None

    def constant(self, bank: int, offset: int, size: int = 4) -> Value:
        data = self.constants.get(bank, b"")[offset : offset + size]
        return int.from_bytes(data, "little") if len(data) == size else None


def uniform(value: Value) -> Value:
    """An array whose lanes agree as an int."""
    if isinstance(value, np.ndarray) and (value == value[0]).all():
        return value[0].item()
    return value


def signed(value: Value) -> Value:
    if isinstance(value, np.ndarray):
        return value.astype(np.uint32).view(np.int32).astype(np.int64)
    return value - (1 << 32) if value >> 31 else value


def word(value: Value) -> Value:
    """The low 32 bits."""
    if isinstance(value, np.ndarray):
        return value.astype(np.uint64) & np.uint64(WORD)
    return value & WORD


def wide(value: Value) -> Value:
    """As 64 bits without a sign, so that arrays and ints mix."""
    return value.astype(np.uint64) if isinstance(value, np.ndarray) else value & ((1 << 64) - 1)


def lanes(value: Value) -> np.ndarray:
    """One element a lane."""
    if isinstance(value, np.ndarray):
        return value
    return np.full(32, value, bool if isinstance(value, bool) else np.uint64)


def register(name: str) -> tuple[str, int]:
    """ "UR14" as ("UR", 14)."""
    found = re.match(r"(U?R)(\d+)", name)
    if found is None:
        raise Unreadable(f"no register: {name}")
    return found[1], int(found[2])


def following(name: str, steps: int) -> str:
    """The register `steps` behind; RZ stays what it is."""
    if name in ("RZ", "URZ", "SRZ"):
        return name
    kind, number = register(name)
    return f"{kind}{number + steps}"


def reader(operand: str) -> Read:
    """How a 32-bit operand, or a predicate, is read."""
    if operand.startswith("!"):
        inner = reader(operand[1:])
        return lambda s: None if (v := inner(s)) is None else _not(v)
    if operand.startswith("~"):
        inner = reader(operand[1:])
        return lambda s: None if (v := inner(s)) is None else word(v ^ WORD)
    if operand.startswith("-") and not re.match(r"-(0x|\d)", operand):
        inner = reader(operand[1:])
        return lambda s: None if (v := inner(s)) is None else word(0 - v)
    if operand.startswith("|"):
        return lambda s: None
    if operand in ("RZ", "URZ", "SRZ"):
        return lambda s: 0
    if operand in ("PT", "UPT"):
        return lambda s: True
    if re.fullmatch(r"U?[RP]\d+", operand):
        # What was never written holds anything, and right code does not depend on it: bits of such
        # a register are set one by one.
        nothing = 0 if "R" in operand else False
        return lambda s: s.r.get(operand, nothing)
    if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
        number = int(operand, 0) & WORD
        return lambda s: number
    if found := _CONSTANT.match(operand):
        bank, offset = reader(found[1]), address(found[2])
        return lambda s: None if None in ((b := bank(s)), (o := offset(s))) else s.constant(b, o)
    return lambda s: None  # a float, or a register's half: of no matter for where a warp goes


def _not(value: Value) -> Value:
    return ~value if isinstance(value, np.ndarray) else not value


def pair(operand: str) -> Read:
    """How a 64-bit operand is read: a register and the one behind it."""
    name = operand.removesuffix(".64").lstrip("-")
    if not re.fullmatch(r"U?R(\d+|Z)", name):
        low = reader(operand)
        if found := _CONSTANT.match(operand):
            bank, offset = reader(found[1]), address(found[2])
            return lambda s: (
                None if None in ((b := bank(s)), (o := offset(s))) else s.constant(b, o, 8)
            )
        return low
    low, high = reader(name), reader(following(name, 1))
    negative = operand.startswith("-")

    def read(s: State) -> Value:
        a, b = low(s), high(s)
        if a is None or b is None:
            return None
        both = wide(a) | wide(b) << 32 if isinstance(b, int) else wide(a) | wide(b) << np.uint64(32)
        return wide(0 - both) if negative else both

    return read


def address(inside: str) -> Read:
    """The sum of what stands inside brackets, in 64 bits where a part of it says so."""
    reads, scales = [], []
    for part in re.split(r"\+(?!-)|\+(?=-)", inside.replace(" ", "")):
        name, _, how = part.partition(".")
        if how == "64":
            reads.append(pair(name))
        else:
            reads.append(reader(name))
        scales.append(int(how[1:]) if re.fullmatch(r"X\d+", how) else 1)
    negative = [bool(re.match(r"-0x|-\d", p)) for p in re.split(r"\+", inside.replace(" ", ""))]

    def read(s: State) -> Value:
        total: Value = 0
        for fn, scale, minus in zip(reads, scales, negative, strict=True):
            v = fn(s)
            if v is None:
                return None
            if minus:
                v = v - (1 << 32)
            total = total + (wide(v) * scale if isinstance(v, np.ndarray) else v * scale)
        return total

    return read


def brackets(operand: str) -> str:
    """What the last brackets of a memory operand hold."""
    return operand[operand.rindex("[") + 1 : operand.rindex("]")]


def write(s: State, name: str, value: Value, keep: Value = True) -> None:
    """Write a register where the lanes of `keep` say so; PT and RZ take nothing. Lanes left out of
    an unknown register are taken to get the value too: who reads it is predicated alike."""
    if name in ("RZ", "URZ", "PT", "UPT"):
        return
    if keep is not True and name[0] == "U":
        keep = None if keep is None else bool(lanes(keep).any())
        if keep is False:
            return
    if keep is not True:
        old = s.r.get(name)
        if value is None or keep is None:
            value = None
        elif old is not None:
            value = np.where(keep, lanes(value), lanes(old))
    if value is not None:
        s.bits.pop(name, None)
    s.r[name] = uniform(value)
