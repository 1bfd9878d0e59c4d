"""A parsed kernel -> the arrays that the machine runs.

What lanes do each for themselves needs nothing here: the machine's table says of every name how
wide its operands are. Instructions of warps have their forms in forms.py.
"""

from __future__ import annotations

import re

from . import forms
from .flow import meeting_points
from .library import operands_of
from .lowering import Lowered, Lowering, addresses_of
from .text import Instruction, Kernel, Unknown

__all__ = ["lower"]

# Suffixes that change nothing here. Memory orders are among them: see README.md.
_IDLE = re.compile(
    r"\.(uni|relaxed|acquire|release|acq_rel|gpu|cta|sys|nc|volatile|weak|L1::\w+|L2::\w+|level::\w+)"
    r"(?=\.|$)"
)


def plain(opcode: str) -> str:
    """An opcode without what makes no difference here."""
    opcode = re.sub(r"\.sync(?=\.|$)|\.aligned(?=\.|$)", "", opcode)
    return _IDLE.sub(
        "", opcode.replace("shared::cta", "shared").replace("shared::cluster", "shared")
    )


def lower(kernel: Kernel, symbols: dict[str, int]) -> Lowered:
    """symbols: addresses of the kernel's global constants. Raises Unknown for an instruction
    without a model, with its PTX line."""
    low = Lowering(kernel, {**addresses_of(kernel)[0], **symbols})
    low.meets = meeting_points(kernel)
    for i in kernel.instructions:
        if i.opcode.startswith("wgmma.mma"):
            low.multiplied.update(forms.vector(i.operands[0]))
            low.multiplied.update(v for v in forms.vector(i.operands[1]) if "{" in i.operands[1])
    for index, i in enumerate(kernel.instructions):
        low.first.append(len(low.rows))
        low.instruction = i
        try:
            _one(low, i, index)
        except (Unknown, KeyError, ValueError, IndexError, AttributeError) as error:
            why = str(error) if isinstance(error, Unknown) else f"{type(error).__name__} {error}"
            raise Unknown(f"{kernel.name}, PTX line {i.line}: {i.text} ({why})") from error
    low.first.append(len(low.rows))
    low.instruction = Instruction("ret", [], None, False, 0, "", "the end")
    low.emit("ret", [])
    return low.done()


def _one(low: Lowering, i: Instruction, index: int) -> None:
    op = plain(i.opcode)
    head = op.partition(".")[0]
    if head == "bra":
        # Branches name instructions; done() makes rows of them.
        return low.emit("bra", [], [low.meets[index]], low.kernel.labels[i.operands[0]])
    if head in ("ret", "exit", "trap"):
        return low.emit("trap" if head == "trap" else "ret", [])
    form = forms.find(op)
    if form is not None:
        return form(low, op, op.split("."), i.operands)
    return _of_lanes(low, op, i.operands)


def _of_lanes(low: Lowering, op: str, given: list[str]) -> None:
    """By the machine's own list of operands."""
    if op[:4] in ("max.", "min.") and op.endswith(".f32") and len(given) == 4:
        # sm_100 takes three: the extreme of the first two, and of that and the third.
        out, a, b, c = given
        between = f"{out}/two"
        low.kernel.registers[between] = "b32"
        _of_lanes(low, op, [between, a, b])
        given = [out, between, c]
    name = op if op.startswith("cvt.") else op.replace(".rn", "")
    widths = operands_of(name)
    if not widths:
        raise Unknown(f"no model of {op}")
    outs = given[0].split("|") if "|" in given[0] else [given[0]]
    texts = [*outs, *given[1:]]
    kinds = widths.split(",")
    if len(texts) != len(kinds):
        raise Unknown(f"{len(texts)} operands, not {len(kinds)}")
    wide = texts[0]
    texts[0] = _result(low, op, wide, kinds[0])
    ops = [
        low.predicate(t) if k == "p" else low.operand(t, int(k))
        for t, k in zip(texts, kinds, strict=True)
    ]
    low.emit(name, ops, writes=len(outs))
    if texts[0] != wide:
        sign, own = op.split(".")[-2][0], low.width_of(wide) or 0
        low.emit(f"cvt.{sign}{8 * own}.{sign}{8 * int(kinds[0])}", [wide, texts[0]])


def _result(low: Lowering, op: str, register: str, width: str) -> str:
    """The register that a conversion writes; one of its own where the named one is wider, which
    takes the value extended by its sign (PTX ISA, "Operand Size Exceeding Instruction-Type
    Size")."""
    if not op.startswith("cvt.") or (low.width_of(register) or 0) <= int(width):
        return register
    own = f"{register}/{width}"
    low.kernel.registers[own] = f"b{8 * int(width)}"
    return own
