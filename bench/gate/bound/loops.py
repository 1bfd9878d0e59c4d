"""The loops of a kernel: natural ones, by back edges to a block that dominates their source."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sass import Code

_ENDS = ("EXIT", "RET", "BPT", "KILL")


@dataclass
class Loop:
    """One loop: its head, all instructions in it, the loops right inside, by their heads."""

    head: int
    body: frozenset[int]
    inner: list[Loop] = field(default_factory=list)
    depth: int = 0


def _successors(code: Code, k: int) -> list[int]:
    instruction = code.instructions[k]
    after = [k + 1] if k + 1 < len(code.instructions) else []
    if instruction.stem == "BRA" or (instruction.stem == "CALL" and instruction.target is not None):
        goal = [] if instruction.target is None else [instruction.target]
        conditional = instruction.predicate or len(instruction.operands) > 1
        return [*goal, *after] if conditional else goal
    if instruction.stem in _ENDS and not instruction.predicate:
        return []
    return after


def _dominators(following: list[list[int]]) -> tuple[dict[int, int], dict[int, int]]:
    """(immediate dominators of what can be reached, numbers in postorder), by the iteration of
    Cooper, Harvey and Kennedy."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(following[0]))]
    while stack:
        node, rest = stack[-1]
        for child in rest:
            if child not in seen:
                seen.add(child)
                stack.append((child, iter(following[child])))
                break
        else:
            order.append(node)
            stack.pop()
    number = {node: k for k, node in enumerate(order)}
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for child in following[node]:
            before[child].append(node)
    idom = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            new = -1
            for p in before[node]:
                if p not in idom:
                    continue
                other = p
                if new < 0:
                    new = p
                    continue
                while other != new:
                    while number[other] < number[new]:
                        other = idom[other]
                    while number[new] < number[other]:
                        new = idom[new]
            if idom.get(node) != new:
                idom[node] = new
                changed = True
    return idom, number


def loops_of(code: Code) -> list[Loop]:
    """Every loop, outer ones before those inside them. A wait that jumps back to itself is one
    too."""
    if not code.instructions:
        return []
    following = [_successors(code, k) for k in range(len(code.instructions))]
    idom, number = _dominators(following)
    before: dict[int, list[int]] = {}
    for node in idom:
        for child in following[node]:
            before.setdefault(child, []).append(node)
    bodies: dict[int, set[int]] = {}
    for node in idom:
        for head in following[node]:
            if number[head] >= number[node] and _dominates(idom, head, node):
                body = bodies.setdefault(head, {head})
                stack = [node]
                while stack:
                    at = stack.pop()
                    if at not in body:
                        body.add(at)
                        stack += before.get(at, ())
    found = [Loop(head, frozenset(body)) for head, body in bodies.items()]
    found.sort(key=lambda loop: -len(loop.body))
    for k, loop in enumerate(found):
        around = [outer for outer in found[:k] if loop.head in outer.body]
        if around:
            around[-1].inner.append(loop)
            loop.depth = around[-1].depth + 1
    return found


def _dominates(idom: dict[int, int], above: int, node: int) -> bool:
    while node != above and node != idom[node]:
        node = idom[node]
    return node == above
