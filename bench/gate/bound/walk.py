"""A warp's way through a kernel: every instruction that it issues, with the values of its integer
registers, from the parameters of a launch. So trip counts are executed, not guessed.

Branches take the lanes apart and bring them together at the lowest address. What waits for another
warp or for TMA finds it done; what it costs is timeline.py's affair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .cubin import Layout
from .machine import Machine, pipes_of
from .meaning import MEANINGS
from .sass import Code, Instruction
from .timeline import Timeline, left_of, width
from .values import (
    State,
    Unreadable,
    Value,
    address,
    brackets,
    following,
    lanes,
    pair,
    reader,
    write,
)

MOST = 400_000  # instructions of one walk
BANK_ADDRESS = 1 << 50  # where a kernel finds its parameters as memory
_POINTER = {528: 0x198, 896: 0x348}  # base of the parameters -> word that holds their address


@dataclass(frozen=True)
class Launched:
    """One launch: parameters as bytes, a grid, memory that can be read, boxes of tensor maps by
    their offset in the parameters."""

    layout: Layout
    parameters: tuple[bytes, ...]
    grid: tuple[int, ...]
    threads: int
    load: Callable[[int, int], int | None] = lambda address, size: None
    boxes: dict[int, int] | None = None
    block: tuple[int, int, int] = (0, 0, 0)


class Walk:
    """Compiles a kernel's instructions once, then walks."""

    def __init__(self, code: Code, machine: Machine) -> None:
        self.code, self.machine = code, machine
        self.steps = [_compiled(i, machine) for i in code.instructions]

    def run(self, launch: Launched, warp: int, role: int) -> tuple[list[int], Timeline]:
        """How often each instruction was issued, and the time; role: warps that run alike."""
        state = _state(launch, warp)
        line = Timeline(self.machine, role / 4)
        counts = [0] * len(self.steps)
        context = _Context(state, line, launch, self.code)
        # pc -> lanes there; all lanes are alive.
        at: dict[int, np.ndarray | None] = {0: None}
        for _ in range(MOST):
            if not at:
                return counts, line
            pc = min(at)
            mask = at.pop(pc)
            if pc >= len(self.steps):
                raise Unreadable("the code ends without EXIT")
            counts[pc] += 1
            for goal, who in self.steps[pc](context, pc, mask):
                _join(at, goal, who)
        hot = max(range(len(counts)), key=counts.__getitem__)
        text = self.code.instructions[hot].text
        raise Unreadable(f"no end after {MOST} instructions; most often {text}")


def _join(at: dict[int, np.ndarray | None], pc: int, who: np.ndarray | None) -> None:
    if pc in at and who is not None and at[pc] is not None:
        both = at[pc] | who
        at[pc] = None if both.all() else both
    else:
        at[pc] = who


@dataclass
class _Context:
    state: State
    line: Timeline
    launch: Launched
    code: Code


def _state(launch: Launched, warp: int) -> State:
    bank = bytearray(launch.layout.bank(launch.parameters, launch.grid, launch.threads))
    word = _POINTER.get(launch.layout.base)
    if word:
        bank[word : word + 8] = BANK_ADDRESS.to_bytes(8, "little")
    tid = np.arange(32, dtype=np.uint64) + np.uint64(32 * warp)
    special: dict[str, Value] = {
        "SR_TID.X": tid, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": np.arange(32, dtype=np.uint64),
        **dict(zip(("SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z"), launch.block, strict=True)),
        "SR_CgaCtaId": 0, "SR_CLUSTERID.X": 0,
        "SR_WARPID": warp, "SR_SWINHI": 0, "SR_CLUSTER_CTARANK": 0,
    }  # fmt: skip
    state = State({**launch.layout.constants, 0: bytes(bank)}, special)
    state.load = launch.load
    return state


Goals = list[tuple[int, np.ndarray | None]]


def _compiled(
    i: Instruction, machine: Machine
) -> Callable[[_Context, int, np.ndarray | None], Goals]:
    read = reader(i.predicate) if i.predicate else None
    act, control, pipes = _action(i), i.control, pipes_of(i.stem, machine)

    def step(context: _Context, pc: int, mask: np.ndarray | None) -> Goals:
        context.line.issue(control, pipes)
        taken: Value = read(context.state) if read else True
        return act(context, pc, mask, taken)

    return step


def _who(mask: np.ndarray | None, taken: Value) -> Value:
    """True, False, an array of lanes, or None where nobody knows."""
    if mask is None or taken is False or taken is None:
        return taken
    both = mask & lanes(taken)
    return False if not both.any() else both


def _count(who: Value) -> int:
    return 32 if who is True or who is None else 0 if who is False else int(who.sum())


Action = Callable[[_Context, int, np.ndarray | None, Value], Goals]


def _action(i: Instruction) -> Action:
    if i.stem in ("BRA", "EXIT", "RET", "BPT", "BRX", "JMP", "CALL"):
        return _flow(i)
    effect = _EFFECTS[i.stem](i) if i.stem in _EFFECTS else _written(i)

    def act(c: _Context, pc: int, mask: np.ndarray | None, taken: Value) -> Goals:
        effect(c, _who(mask, taken))
        return [(pc + 1, mask)]

    return act


def _flow(i: Instruction) -> Action:
    # BRA.U UP0, and BRA.DIV, whose lanes never part here.
    extra = reader(i.operands[0]) if i.stem == "BRA" and len(i.operands) > 1 else None
    divided = "DIV" in i.parts or "CONV" in i.parts

    def act(c: _Context, pc: int, mask: np.ndarray | None, taken: Value) -> Goals:
        if divided:
            return [(pc + 1, mask)]
        if extra is not None and taken is not False:
            taken = extra(c.state)
        if taken is None:
            if i.stem == "BRA" and trapped(c.code, i.target):
                return [(pc + 1, mask)]
            name = (i.operands[0] if extra else i.predicate).lstrip("!")
            raise Unreadable(f"/*{i.at:04x}*/ {i.text} hangs on {_blame(c, name)}")
        who = _who(mask, taken)
        if who is not False and "ANY" in i.parts:
            who = True
        if who is False:
            return [(pc + 1, mask)]
        if i.stem == "BRX":
            return _jump(c, i, pc, mask, who)
        # CALL.REL.NOINC to a label is a jump: it keeps no way back.
        jumps = i.stem == "BRA" or (
            i.stem == "CALL" and "NOINC" in i.parts and i.target is not None
        )
        if not jumps and i.stem != "EXIT":
            raise Unreadable(f"/*{i.at:04x}*/ {i.text}: such a jump is not followed")
        every = np.ones(32, bool) if mask is None else mask
        stay = every & ~lanes(who)
        goals: Goals = []
        if stay.any():
            goals.append((pc + 1, stay))
        if jumps:
            if i.target is None:
                raise Unreadable(f"/*{i.at:04x}*/ {i.text}: its goal is not in this kernel")
            if i.target == pc:  # a trap: nobody comes back
                return goals
            goals.append((i.target, mask if who is True else lanes(who)))
        return goals

    return act


def _jump(c: _Context, i: Instruction, pc: int, mask: np.ndarray | None, who: Value) -> Goals:
    """BRX R2 -0x3960: to the table's entry, which lies before what stands beside it is added."""
    register, _, offset = i.operands[0].partition(" ")
    at = reader(register)(c.state)
    following_at = c.code.instructions[pc + 1].at if pc + 1 < len(c.code.instructions) else 0
    if not isinstance(at, int) or who is not True:
        raise Unreadable(f"/*{i.at:04x}*/ {i.text} hangs on {_blame(c, register)}")
    goal = at + following_at + int(offset or "0", 0) & 0xFFFFFFFF
    for k, other in enumerate(c.code.instructions):
        if other.at == goal:
            return [(k, mask)]
    raise Unreadable(f"/*{i.at:04x}*/ {i.text}: its goal {goal:#x} is not in this kernel")


def _forget_flags(s: State, i: Instruction) -> None:
    """R |= bits under a predicate that nobody knows: those bits alone are unknown from now on."""
    name, bits = i.operands[0], i.operands[2]
    old = s.r.get(name, 0)
    if name != i.operands[1] or not bits.startswith("0x"):
        return
    known, value = s.bits.get(name, (0, 0)) if old is None else (0xFFFFFFFF, old)
    s.bits[name] = known & ~int(bits, 0), value


def trapped(code: Code, at: int | None) -> bool:
    """Is this the way to a trap, which a right program never takes?"""
    for i in code.instructions[at : at + 64] if at is not None else ():
        if i.stem == "BPT" or (i.stem == "CALL" and "trap" in i.text):
            return True
        if i.stem in ("BRA", "EXIT", "RET"):
            return False
    return False


def _blame(c: _Context, name: str, depth: int = 5) -> str:
    """The register and the instructions that left it unknown, from the last on."""
    parts: list[str] = []
    while name in c.state.lost and len(parts) < depth:
        text = c.state.lost[name]
        parts.append(text.removesuffix(";").strip())
        sources = re.findall(r"!?(U?[RP]\d+)", text)[1:]
        unknown = [
            r for r in sources if r != name and r in c.state.lost and c.state.r.get(r) is None
        ]
        name = unknown[0] if unknown else ""
    return " <- ".join(parts) or f"{name}, which nothing wrote"


def _written(i: Instruction) -> Callable[[_Context, Value], None]:
    """Destinations by what the instruction means; unknown where it has no meaning here."""
    if i.stem in MEANINGS and i.operands:
        to, step = MEANINGS[i.stem](i)
        nothing = (None,) * len(to)

        def known(c: _Context, who: Value) -> None:
            if who is False:
                return
            if who is None and i.stem == "LOP3":
                _forget_flags(c.state, i)
            for name, value in zip(to, step(c.state) if who is not None else nothing, strict=True):
                write(c.state, name, value, True if who is True else who)
                if value is None or who is None:
                    c.state.lost[name] = i.text
                    if i.stem != "LOP3":
                        c.state.bits.pop(name, None)
            if i.stem == "SHFL":
                c.line.load(i, _count(who))

        return known
    blurred = _blurred(i)

    def unknown(c: _Context, who: Value) -> None:
        if who is not False:
            for name in blurred:
                c.state.r[name] = None
                c.state.lost[name] = i.text
                c.state.bits.pop(name, None)

    return unknown


def _blurred(i: Instruction) -> list[str]:
    """The registers that an instruction without a meaning writes."""
    if not i.operands or not re.fullmatch(r"U?[RP]\d+", i.operands[0]):
        return []
    names = [i.operands[0]]
    if "P" not in names[0]:
        size = 4 if "128" in i.parts else 2 if {"64", "WIDE"} & set(i.parts) else 1
        if i.stem == "LDSM":
            size = width(i) // 4
        elif i.stem == "HMMA":
            size = 4
        names += [following(names[0], k) for k in range(1, size)]
    # FSETP P0, P1, ...: a predicate behind a predicate is written too.
    if "P" in names[0] and len(i.operands) > 1 and re.fullmatch(r"U?P\d", i.operands[1]):
        names.append(i.operands[1])
    return names


# ---- what touches memory, products and barriers

Effect = Callable[[_Context, Value], None]


def _memory(i: Instruction) -> Effect:
    loads = i.stem in ("LDG", "LDS", "LD", "LDC")
    source = next((o for o in i.operands if "[" in o), None)
    where = address(brackets(source)) if source else None
    size = {"128": 4, "64": 2}.get(next((p for p in i.parts if p in ("128", "64")), ""), 1)
    bytes_each = next((int(p[1:]) // 8 for p in i.parts if p in ("U8", "U16", "S8", "S16")), 4)
    data = i.operands[-1] if i.stem in ("STS", "STG", "ST") else ""
    # LDGSTS may end in a predicate of its own.
    gate = reader(i.operands[-1]) if re.fullmatch(r"!?U?P\d", i.operands[-1]) else None

    def effect(c: _Context, who: Value) -> None:
        c.line.load(i, 0 if gate and gate(c.state) is False else _count(who))
        if who is False:
            return
        at = where(c.state) if where else None
        if loads:
            for k in range(size):
                value = _loaded(c, i, at, 4 * k, bytes_each)
                if value is None:
                    c.state.lost[following(i.operands[0], k)] = i.text
                write(c.state, following(i.operands[0], k), value, True if who is True else who)
        elif i.stem == "STS" and at is not None:
            _store(c, at, data, size, bytes_each, who)

    return effect


def _loaded(c: _Context, i: Instruction, at: Value, offset: int, size: int) -> Value:
    if at is None:
        return None
    if i.stem == "LDS":
        found = [c.state.shared.get((int(a) + offset, size)) for a in _each(at)]
    else:
        found = [c.state.load(int(a) + offset, size) for a in _each(at)]
    if any(v is None for v in found):
        return None
    return found[0] if len(found) == 1 else np.array(found, np.uint64)


def _each(value: Value) -> list[int]:
    return list(value) if isinstance(value, np.ndarray) else [value]


def _store(c: _Context, at: Value, data: str, size: int, each: int, who: Value) -> None:
    for k in range(size):
        value = c.state.r.get(following(data, k), 0 if data == "RZ" else None)
        masked = lanes(True if who is None else who)
        for lane, place in enumerate(lanes(at)):
            if masked[lane]:
                one = None if value is None or who is None else int(lanes(value)[lane])
                c.state.shared[int(place) + 4 * k, each] = one


def _port(i: Instruction) -> Effect:
    """Moves bytes that nobody's way depends on."""
    blurred = _blurred(i)

    def effect(c: _Context, who: Value) -> None:
        c.line.load(i, _count(who))
        for name in blurred:
            c.state.r[name] = None

    return effect


def _product(i: Instruction) -> Effect:
    if i.stem == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[i.parts[0]]

        def mma(c: _Context, who: Value) -> None:
            c.line.product(2 * m * n * k / (c.line.machine.tensor / 4), False)
            for name in _blurred(i):
                c.state.r[name] = None

        return mma
    if i.stem == "HGMMA":
        m, n, k = map(int, i.parts[0].split("x"))
        from_registers = len(re.findall(r"gdesc", " ".join(i.operands))) < 1 or i.operands[
            1
        ].startswith("R")
        committed = any("gsb0" in o for o in i.operands)

        def wgmma(c: _Context, who: Value) -> None:
            # A quarter of the operands' bytes, for each of the four warps.
            operands = 2 * k * ((0 if from_registers else m) + n) / 4
            c.line.product(2 * m * n * k / c.line.machine.tensor, True, operands)
            if committed:
                c.line.commit()

        return wgmma
    described = next((o for o in i.operands if o.startswith("idesc")), None)
    read = reader(brackets(described)) if described else lambda s: None
    two = "2CTA" in i.parts

    def tcgen05(c: _Context, who: Value) -> None:
        if who is False:
            return
        bits = read(c.state)
        if not isinstance(bits, int):
            raise Unreadable(f"/*{i.at:04x}*/ {i.text}: the shape of the product is not known")
        n, m = (bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16
        m = m // 2 if two else m
        # One thread asks for all of it, on every scheduler's part at once.
        share = c.line.warps
        clocks = 2 * m * n * 16 / c.line.machine.tensor
        c.line.product(clocks / share, True, 2 * 16 * (m + n) / (4 * share))

    return tcgen05


def _barrier(i: Instruction) -> Effect:
    source = next((o for o in i.operands if "[" in o), None)
    where = address(brackets(source)) if source else lambda s: None
    predicate = next((o for o in i.operands if re.fullmatch(r"U?P\d", o)), None)
    expected = reader(i.operands[-1]) if i.parts[-1:] == ("TRANS64",) else lambda s: None

    def effect(c: _Context, who: Value) -> None:
        if who is False:
            return
        at = where(c.state)
        at = int(at[0]) if isinstance(at, np.ndarray) else at
        if "PHASECHK" in i.parts:
            if at is not None:
                c.line.wait_barrier(at)
            if predicate:
                c.state.r[predicate] = True
        elif "ARRIVE" in i.parts and "A1T0" not in i.parts and at is not None:
            size = expected(c.state)
            size = int(size[0]) if isinstance(size, np.ndarray) else size
            c.line.arrive(at)
            c.line.bring(size or 0)

    return effect


def _commit(i: Instruction) -> Effect:
    where = address(brackets(i.operands[0]))

    def effect(c: _Context, who: Value) -> None:
        at = where(c.state)
        if who is not False and isinstance(at, int):
            c.line.arrive(at, c.line.tensor)

    return effect


def _tma(i: Instruction) -> Effect:
    """Loads are counted where their barrier is told of their bytes, for other warps may ask for a
    part of them. Stores are counted by their box, the smallest one where it cannot be told."""
    target, map_at = brackets(i.operands[0]), pair(brackets(i.operands[1]))
    barrier = reader(following(target, 1))

    def effect(c: _Context, who: Value) -> None:
        if who is False:
            return
        if i.stem == "UTMALDG":
            there = barrier(c.state)
            if isinstance(there, int):
                c.line.fill(there)
            return
        at, boxes = map_at(c.state), c.launch.boxes
        if boxes:
            offset = at - BANK_ADDRESS if isinstance(at, int) else -1
            c.line.totals.once += boxes.get(offset, min(boxes.values()))

    return effect


def _synchronise(i: Instruction) -> Effect:
    return lambda c, who: c.line.meet() if "SYNC" in i.parts or "RED" in i.parts else None


def _wait(i: Instruction) -> Effect:
    def effect(c: _Context, who: Value) -> None:
        if "DEPBAR" in i.parts:
            c.line.wait_products(left_of(i))

    return effect


def _depbar(i: Instruction) -> Effect:
    return lambda c, who: c.line.wait_copies(left_of(i))


def _copied(i: Instruction) -> Effect:
    return lambda c, who: c.line.copies.append(c.line.now + c.line.machine.latency.l2)


def _allocated(i: Instruction) -> Effect:
    """tcgen05.alloc finds its columns, setmaxnreg its registers."""

    def effect(c: _Context, who: Value) -> None:
        for name in i.operands[:2]:
            if re.fullmatch(r"UP\d", name):
                c.state.r[name] = True
            elif re.fullmatch(r"UR\d+", name):
                c.state.r[name] = 0

    return effect


_EFFECTS: dict[str, Callable[[Instruction], Effect]] = {
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDGSTS", "LD", "ST"), _memory),
    **dict.fromkeys(("LDSM", "STSM", "ATOMS", "ATOMG", "RED", "LDL", "STL"), _port),
    "HMMA": _product, "HGMMA": _product, "UTCHMMA": _product, "SYNCS": _barrier,
    "UTCBAR": _commit, "UTMALDG": _tma, "UTMASTG": _tma, "BAR": _synchronise, "WARPGROUP": _wait,
    "DEPBAR": _depbar, "LDGDEPBAR": _copied, "UTCATOMSWS": _allocated, "USETMAXREG": _allocated,
}  # fmt: skip
