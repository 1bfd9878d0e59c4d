"""Single faults of CUDA C++, a line at a time. Lines that the host runner does not compile as they
are for a GPU are left out, for no test here could fail: those of an #if on the CUDA compiler."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mutants_base import Mutant

SWAPS = {
    "comparison": {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    "arithmetic": {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/"},
    "and, or": {"&&": "||", "||": "&&"},
}
CALL = re.compile(r"^\s*(?:if \([^()]*\) )?([\w.:]+(?:<[^;]*>)?\([^;]*\);)\s*$")
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
CONDITION = re.compile(r"\bif \((?!constexpr)([^()]*(?:\([^()]*\)[^()]*)*)\) ")
# x < y ? x : y is the same at the boundary.
LEAST = re.compile(r"([\w.]+(?: [-+] \w+)?) [<>]=? ([\w.]+) \? (?:\1 : \2|\2 : \1)(?!\w)")
# A longer array is none the worse, and a shorter one does not compile or is undefined.
DECLARATION = re.compile(r"^\s*(?:(?:__shared__|const|constexpr) )*[\w:<>]+ \w+(?:\[[^\]]*\])+")
# The size of an array that is a parameter says nothing to the compiler.
PARAMETER = re.compile(r"(?<=[(,])\s*(?:const )?[\w:]+ \w+\[\d+\](?=[,)])")
STRING = re.compile(r'"[^"]*"')
DECLARED = re.compile(r"^\s*(#|template|using|namespace|static_assert|asm|__global__|\})")


def cuda_mutants(path: str, text: str) -> list[Mutant]:
    found = []
    for start, line in code_lines(text):
        found += (
            Mutant(path, start + a, start + b, new, operator)
            for operator, a, b, new in faults_of(line)
            if not (operator == "comparison" and LEAST.search(line))
        )
    return sorted(set(found))


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are mutated, and where each begins; without comments, blanks for strings."""
    start, branches = 0, []
    for line in text.splitlines(keepends=True):
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        if word.startswith("#if"):
            branches.append("__CUDA" in line)
        elif word == "#endif":
            branches.pop()
        elif not any(branches) and not DECLARED.match(line):
            shown = STRING.sub(lambda found: " " * len(found[0]), line)
            yield start, shown.split("//")[0].rstrip()
        start += len(line)


def faults_of(line: str) -> Iterator[tuple[str, int, int, str]]:
    """(operator, from, to, what takes its place)"""
    for operator, table in SWAPS.items():
        for old, new in table.items():
            for match in re.finditer(rf"(?<= ){re.escape(old)}(?= )", line):
                yield operator, *match.span(), new
    sizes = [found.span() for of in (DECLARATION, PARAMETER) for found in of.finditer(line)]
    for match in NUMBER.finditer(line):
        if any(start <= match.start() < end for start, end in sizes):
            continue
        value = int(match[0])
        yield "constant off by one", *match.span(), str(value + 1)
        if value > 1:
            yield "constant off by one", *match.span(), str(value - 1)
        if value >= 8 and value & value - 1 == 0:
            yield "constant halved", *match.span(), str(value // 2)
    if match := CALL.match(line):
        yield "statement dropped", *match.span(1), ";"
    if match := CONDITION.search(line):
        yield "condition negated", *match.span(1), f"!({match[1]})"
