"""The rows that a kernel becomes: operands found or made, instructions entered one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .library import operands_of
from .text import WIDTH, Instruction, Kernel, Unknown

__all__ = ["WAITS", "WINDOWS", "Lowered", "Lowering", "addresses_of"]

# As machine/base.h has them.
SHARED_BASE = 1024
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = (n << 56 for n in (1, 2, 3))
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
CONVERGENT, WAITS, COPIES, MARKS = 1, 2, 4, 8

# In the order of machine.cpp's Special.
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
    "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank",
    "%clusterid.x",
)  # fmt: skip
SLOT = {0: 64, 1: 64, 2: 64, 4: 128, 8: 256}  # bytes of 32 lanes; a predicate is one mask

# Every live lane must carry these out together.
_ALIGNED = (
    "bar.", "barrier.", "wgmma.", "ldmatrix", "stmatrix", "mma.", "tcgen05.alloc",
    "tcgen05.dealloc", "tcgen05.ld", "tcgen05.st", "tcgen05.wait", "setmaxnreg",
)  # fmt: skip


@dataclass
class Lowered:
    """rows: of 8 numbers, as machine.cpp's ptx_load takes them. granules: bytes of the shortest
    store to shared and to global memory. shared, local: bytes of variables that the PTX declares.
    """

    kernel: Kernel
    names: list[bytes]
    rows: np.ndarray
    ops: np.ndarray
    imms: np.ndarray
    constants: bytes
    register_bytes: int
    special: np.ndarray
    shared: int
    local: int
    granules: tuple[int, int]
    stores_boxes: bool


@dataclass
class _Row:
    name: str
    ops: list[int | str]  # a register's name, or the offset of a constant
    imms: list[int]
    guard: str
    negated: bool
    target: int  # an instruction, or -1
    line: int
    flags: int


@dataclass
class Lowering:
    """What becomes of one kernel. symbols: addresses of names that are no registers."""

    kernel: Kernel
    symbols: dict[str, int]
    rows: list[_Row] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # row of an instruction: some take two
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)
    size: int = 0
    meets: dict[int, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=lambda: {"shared": 16, "global": 16})
    instruction: Instruction = field(init=False)
    multiplied: set[str] = field(default_factory=set)  # registers that a wgmma uses

    # ---- operands

    def constant(self, value: int, width: int) -> int:
        """The offset of 32 lanes that hold `value`; of a mask where the width is 0."""
        bytes_ = width or 4
        key = width, value & (1 << 8 * bytes_) - 1
        if key not in self.constants:
            self.constants[key] = self.size
            lanes = 1 if width == 0 else 32
            block = (key[1].to_bytes(bytes_, "little") * lanes).ljust(SLOT[width], b"\0")
            self.blocks.append(block)
            self.size += len(block)
        return self.constants[key]

    def width_of(self, name: str) -> int | None:
        kind = self.kernel.registers.get(name)
        return None if kind is None else max(WIDTH[kind], 2) if kind != "pred" else 0

    def operand(self, text: str, width: int) -> int | str:
        """A register, or a constant; -1 for `_`."""
        text = text.strip()
        if text == "_":
            return -1
        if text in SPECIAL:
            return text
        own = self.width_of(text)
        if own is not None:
            if own == width:
                return text
            if own > width > 0 and self.instruction.opcode.startswith(("cvt", "st")):
                narrow = f"{text}/{width}"  # the rest of the register counts for nothing
                self.kernel.registers[narrow] = f"b{8 * width}"
                self.emit(f"narrow.{own}.{width}", [narrow, text])
                return narrow
            raise Unknown(f"{text} is {own} bytes wide, not {width}")
        for names in (self.symbols, self.kernel.params):
            if text in names:
                return self.constant(names[text], width)
        return self.constant(_number(text), width)

    def narrowed(self, wide: int | str) -> str:
        """The low half of a register of 8 bytes."""
        narrow = f"{wide}/4"
        self.kernel.registers[narrow] = "b32"
        self.emit("narrow.8.4", [narrow, wide])
        return narrow

    def predicate(self, text: str) -> int | str:
        text = text.strip()
        if text in self.kernel.registers:
            if self.kernel.registers[text] != "pred":
                raise Unknown(f"{text} is no predicate")
            return text
        return self.constant(-1 if int(text, 0) else 0, 0)

    def operands(self, texts: Sequence[str], width: int) -> list[int | str]:
        return [self.operand(t, width) for t in texts]

    def address(self, text: str, width: int) -> tuple[int | str, int]:
        """(register or constant, offset) of `[base + offset]`."""
        inside = text.strip()[1:-1].strip()
        m = re.match(r"^([%$@\w.]+?)\s*(?:([+-])\s*(-?\w+))?$", inside)
        if not m:
            raise Unknown(f"address {text}")
        offset = int(m[3], 0) if m[3] else 0
        return self.operand(m[1], width), -offset if m[2] == "-" else offset

    def stored(self, space: str, bytes_: int) -> None:
        for one in ("shared", "global") if space == "generic" else (space,):
            if one in self.stores:
                self.stores[one] = min(self.stores[one], bytes_)

    # ---- rows

    def emit(
        self,
        name: str,
        ops: Sequence[int | str],
        imms: Sequence[int] = (),
        target: int = -1,
        writes: int = 1,
        flags: int = 0,
    ) -> None:
        """One row. writes: how many of the first operands the instruction sets."""
        if operands_of(name) is None:
            raise Unknown(f"no model of {name}")
        i = self.instruction
        if i.opcode.startswith(_ALIGNED) and ".warp" not in i.opcode:
            flags |= CONVERGENT
        if not flags & WAITS and self.multiplied.intersection(map(str, ops[:writes])):
            flags |= writes << MARKS | (COPIES if i.opcode.startswith("mov") else 0)
        row = _Row(name, list(ops), list(imms), i.guard or "", i.negated, target, 0, flags)
        row.line = len(self.first) - 1
        self.rows.append(row)

    def done(self) -> Lowered:
        place: dict[str, int] = {}
        size = self.size

        def at(name: int | str) -> int:
            nonlocal size
            if isinstance(name, int):
                return name
            if name not in place:
                place[name] = size
                width = 4 if name in SPECIAL else self.width_of(name)
                if width not in SLOT:
                    raise Unknown(f"{name} of {self.kernel.registers[name]}")
                size += SLOT[width]
            return place[name]

        rows: list[tuple[int, ...]] = []
        ops: list[int] = []
        imms: list[int] = []
        for r in self.rows:
            guard = at(r.guard) if r.guard else -1
            target = self.first[r.target] if r.target >= 0 else -1
            rows.append(
                (len(ops), len(r.ops), len(imms), guard, int(r.negated), target, r.line, r.flags)
            )
            ops += map(at, r.ops)
            imms += [self.first[r.imms[0]]] if r.name == "bra" else r.imms
        special = [place.get(name, -1) for name in SPECIAL]
        _, ends = addresses_of(self.kernel)
        return Lowered(
            self.kernel, [r.name.encode() for r in self.rows],
            np.array(rows, np.int32), np.array(ops or [0], np.int32),
            np.array(imms or [0], np.int64), b"".join(self.blocks), size,
            np.array(special, np.int32), ends["shared"] - SHARED_BASE, ends["local"],
            (self.stores["shared"], self.stores["global"]),
            any(r.name == "tma.store" for r in self.rows),
        )  # fmt: skip


def addresses_of(kernel: Kernel) -> tuple[dict[str, int], dict[str, int]]:
    """Addresses of shared and local variables in their order, and where each space ends. Dynamic
    shared memory, which the PTX gives no size, begins behind all the rest."""
    places: dict[str, int] = {}
    ends = {"shared": SHARED_BASE, "local": 0}
    known = [(n, v) for n, v in kernel.variables.items() if v.space in ends]
    for name, v in sorted(known, key=lambda pair: pair[1].size == 0):
        places[name] = -(-ends[v.space] // v.align) * v.align
        ends[v.space] = places[name] + v.size
    return places, ends


def _number(text: str) -> int:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)
