"""PTX text -> a list of instructions with flat register names and resolved labels.

Inline assembly needs nothing of its own: in PTX it is instructions in a `{ }` scope, whose
registers and labels are renamed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["WIDTH", "Instruction", "Kernel", "Unknown", "Variable", "parse", "split"]

# Bytes of a value; a predicate is a bit of a mask.
WIDTH = {
    "pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8,
    "f64": 8, "f32x2": 8, "b128": 16,
}  # fmt: skip


class Unknown(Exception):
    """An instruction or a directive that the machine has no model of, with its PTX line."""


@dataclass
class Instruction:
    """One instruction. line: in the PTX. source: file:line of the Python or CUDA source."""

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    source: str
    text: str


@dataclass
class Variable:
    """A variable of a state space: "shared", "local", "global" or "const"."""

    space: str
    align: int
    size: int
    data: bytes = b""


@dataclass
class Kernel:
    """One entry of a PTX file. threads: of a block, 0 where only the launch says. cluster: blocks
    of a cluster by dimension."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    param_sizes: list[int] = field(default_factory=list)
    param_bytes: int = 0
    threads: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)
    variables: dict[str, Variable] = field(default_factory=dict)


def split(text: str) -> list[str]:
    """The parts between commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _without_comments(text: str) -> str:
    """Comments blanked, lines kept."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+.*?)?([$\w]+)(?:\[(\d+)\])?$", re.S
)


def _params(kernel: Kernel, text: str) -> None:
    offset = 0
    for item in filter(None, (part.strip() for part in text.split(","))):
        m = _PARAM.search(item)
        if m is None or m[2] not in WIDTH:
            raise Unknown(f"parameter {item!r} of {kernel.name}")
        size = WIDTH[m[2]] * int(m[4] or 1)
        align = int(m[1] or WIDTH[m[2]])
        offset = -(-offset // align) * align
        kernel.params[m[3]] = offset
        kernel.param_sizes.append(size)
        offset += size
    kernel.param_bytes = offset


_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)"
    r"(?:\[(\d*)\])?(?:\s*=\s*\{?([^};]*)\}?)?$"
)


def _variable(kernel: Kernel, text: str) -> bool:
    """Enter what a declaration says; False where the text is none."""
    m = _VARIABLE.search(text)
    if m is None or m[3] not in WIDTH:
        return False
    width = WIDTH[m[3]]
    values = [int(v.strip().rstrip("U"), 0) for v in (m[6] or "").split(",") if v.strip()]
    data = b"".join((v & (1 << 8 * width) - 1).to_bytes(width, "little") for v in values)
    count = 1 if m[5] is None else int(m[5] or 0)
    size = max(count * width, len(data))
    if m[1] in ("global", "const"):
        data = data.ljust(size, b"\0")
    kernel.variables[m[4]] = Variable(m[1], int(m[2] or width), size, data)
    return True


def _entries(text: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"\.entry\s+([$\w]+)\s*\((.*?)\)([^{;]*)\{", text, re.S)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX file, or its only one. Raises Unknown for what has no model."""
    files = {int(n): path for n, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = _without_comments(text)
    heads = [m for m in _entries(text) if name in (None, m[1])]
    if len(heads) != 1:
        raise Unknown(f"{len(heads)} kernels named {name or 'anything'} in this PTX, not one")
    head = heads[0]
    kernel = Kernel(head[1])
    _params(kernel, head[2])
    before = re.sub(r"\.(visible|weak|extern)\b", "", text[: head.start()])
    for declaration in re.findall(r"^\s*(\.(?:shared|global|const)\b[^;]*);", before, re.M):
        if not _variable(kernel, " ".join(declaration.split())):
            raise Unknown(f"declaration {declaration!r}")
    if m := re.search(r"\.(?:req|max)ntid\s+(\d+)([\d,\s]*)", head[3]):
        kernel.threads = int(m[1])
        if set(re.findall(r"\d+", m[2])) - {"1"}:
            raise Unknown(f"{kernel.name} has blocks of several dimensions: {m[0].strip()}")
    if m := re.search(r"\.reqnctapercluster\s+([\d, ]+)", head[3]):
        numbers = [int(n) for n in m[1].split(",")]
        x, y, z = (*numbers, 1, 1)[:3]
        kernel.cluster = x, y, z
    _body(kernel, text, head.end(), files)
    return kernel


_TOKEN = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):(?!:)|(?P<rest>[^;]*;))")
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)[^\n]*\n")


class _Scopes:
    """Names that the open `{ }` scopes give to registers and labels."""

    def __init__(self) -> None:
        self.open: list[dict[str, str]] = [{}]
        self.opened = 0

    def declare(self, name: str) -> str:
        own = name if len(self.open) == 1 else f"{name}@{self.opened}"
        self.open[-1][name] = own
        return own


def _renamed(operand: str, scopes: list[dict[str, str]]) -> str:
    def name(m: re.Match[str]) -> str:
        return next((s[m[0]] for s in reversed(scopes) if m[0] in s), m[0])

    return re.sub(r"[%$]?[A-Za-z_][\w$]*", name, operand)


def _body(kernel: Kernel, text: str, at: int, files: dict[int, str]) -> None:
    line, source = text.count("\n", 0, at) + 1, ""
    scopes = _Scopes()
    inner: list[tuple[Instruction, list[dict[str, str]]]] = []  # and the scopes that it sees
    while scopes.open:
        if m := _LOC.match(text, at):
            source = f"{files.get(int(m[1]), m[1]).rpartition('/')[2]}:{m[2]}"
            line += m[0].count("\n")
            at = m.end()
            continue
        m = _TOKEN.match(text, at)
        if m is None or m.lastgroup is None:
            raise Unknown(f"PTX line {line}: {text[at : at + 80]!r}")
        line += text.count("\n", at, m.start(m.lastgroup))
        if m["open"]:
            scopes.opened += 1
            scopes.open.append({})
        elif m["close"]:
            scopes.open.pop()
        elif m["label"]:
            kernel.labels[scopes.declare(m["label"])] = len(kernel.instructions)
        else:
            statement = " ".join(m["rest"].rstrip(";").split())
            made = _statement(kernel, statement, scopes, line, source)
            if made is not None and len(scopes.open) > 1:
                inner.append((made, list(scopes.open)))
        line += text.count("\n", m.start(m.lastgroup), m.end())
        at = m.end()
    for instruction, seen in inner:  # labels may be used before they stand
        instruction.operands = [_renamed(o, seen) for o in instruction.operands]


def _statement(
    kernel: Kernel, text: str, scopes: _Scopes, line: int, source: str
) -> Instruction | None:
    if not text or text.startswith((".pragma", ".branchtargets")):
        return None
    if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
        for name in map(str.strip, m[2].split(",")):
            if many := re.match(r"(.*)<(\d+)>", name):
                kernel.registers |= {f"{many[1]}{i}": m[1] for i in range(int(many[2]))}
            else:
                kernel.registers[scopes.declare(name)] = m[1]
        return None
    if text.startswith("."):
        if _variable(kernel, text):
            return None
        raise Unknown(f"PTX line {line}: directive {text}")
    guard, negated, body = None, False, text
    if m := re.match(r"@(!?)([%$\w]+)\s+", text):
        guard, negated, body = _renamed(m[2], scopes.open), bool(m[1]), text[m.end() :]
    opcode, _, rest = body.partition(" ")
    made = Instruction(opcode, split(rest), guard, negated, line, source, text)
    kernel.instructions.append(made)
    return made
