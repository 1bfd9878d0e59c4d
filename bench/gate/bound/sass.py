"""Machine code as nvdisasm prints it: instructions, their operands and their control codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What nvdisasm is asked for; --no-dataflow leaves out an analysis that takes half its time.
FLAGS = ("--print-code", "--print-instruction-encoding", "--no-dataflow")

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$.]+):\s*$")
_SECTION = re.compile(r"\.section\s+\.text\.(\S+?),")
_SPLIT = re.compile(r",\s*(?![^\[\]]*\])")


@dataclass(frozen=True)
class Control:
    """Bits 105 to 125 of an instruction, as Volta to Hopper have them (Jia et al., "Dissecting the
    NVIDIA Volta GPU Architecture via Microbenchmarking", 2018; maxas and turingas use the same).

    stall: clocks until the warp's next instruction. writes, reads: the scoreboard that it frees
    when its result is there, when its operands are read; 7 is none. waits: a bit for each of six
    scoreboards that it waits for first. sm_100's are ASSUMED to lie there too.
    """

    stall: int
    yields: bool
    writes: int
    reads: int
    waits: int


@dataclass
class Instruction:
    """One instruction. predicate: "P0", "!UP1" or none. target: the index that it jumps to."""

    at: int
    predicate: str
    name: str
    operands: tuple[str, ...]
    control: Control
    target: int | None = None
    text: str = ""
    stem: str = field(init=False)
    parts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.stem, *parts = self.name.split(".")
        self.parts = tuple(parts)


@dataclass
class Code:
    """One kernel. blocks and loops are in loops.py."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)


def control_of(high: int) -> Control:
    """high: the upper 64 bits of an instruction."""
    bits = high >> 41
    return Control(bits & 15, not bits >> 4 & 1, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


def _encodings(lines: list[str], at: int) -> Control:
    """An instruction's second word stands on the line below it; hand-written code may have none."""
    second = _WORD.search(lines[at + 1]) if at + 1 < len(lines) else None
    if second is None or _LINE.match(lines[at + 1]):
        return Control(1, False, 7, 7, 0)
    return control_of(int(second[1], 16))


def parse(text: str) -> Iterator[Code]:
    """Every kernel of a disassembly; text without a section is one kernel."""
    lines = text.splitlines()
    cuts = [k for k, line in enumerate(lines) if _SECTION.search(line)] or [0]
    for begin, end in zip(cuts, [*cuts[1:], len(lines)], strict=True):
        found = _SECTION.search(lines[begin])
        yield _one(found[1] if found else "", lines[begin:end])


def _one(name: str, lines: list[str]) -> Code:
    code, labels = Code(name), {}
    for k, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(code.instructions)
        elif found := _LINE.match(line):
            at, predicate, opcode, rest = found.groups()
            operands = tuple(_SPLIT.split(rest)) if rest else ()
            code.instructions.append(
                Instruction(
                    int(at, 16), predicate or "", opcode, tuple(map(_bare, operands)),
                    _encodings(lines, k), None, found[0].partition("*/")[2].strip(),
                )
            )  # fmt: skip
    for instruction in code.instructions:
        goal = re.search(r"`\(([^)]+)\)", instruction.text)
        if goal and goal[1] in labels:
            instruction.target = labels[goal[1]]
    return code


def _bare(operand: str) -> str:
    """An operand without the mark that its register is kept for the next instruction."""
    return operand.strip().replace(".reuse", "")
