"""Where the two ways of a branch meet: its immediate post-dominator.

After K. Cooper, T. Harvey and K. Kennedy, "A Simple, Fast Dominance Algorithm" (2001), on the
reversed graph.
"""

from __future__ import annotations

from .text import Instruction, Kernel, Unknown

__all__ = ["meeting_points"]


def _blocks(kernel: Kernel) -> tuple[list[int], dict[int, int], dict[int, list[int]]]:
    """First instructions of basic blocks, the last of each, and what follows each; the end of the
    kernel is a block too."""
    code, n = kernel.instructions, len(kernel.instructions)
    branches = {k for k in range(n) if code[k].opcode.startswith("bra")}
    ends = {k for k in range(n) if code[k].opcode in ("ret", "exit", "trap") and not code[k].guard}
    blocks = sorted({0, n, *kernel.labels.values(), *(k + 1 for k in branches | ends)})
    last = {b: e - 1 for b, e in zip(blocks, blocks[1:], strict=False)}
    after: dict[int, list[int]] = {n: []}
    for b in blocks[:-1]:
        k = last[b]
        if k in branches:
            to = _target(kernel, code[k])
            after[b] = [to, k + 1] if code[k].guard else [to]
        else:
            after[b] = [n] if k in ends else [k + 1]
    return blocks, last, after


def _target(kernel: Kernel, branch: Instruction) -> int:
    label = branch.operands[0]
    if label not in kernel.labels:
        where = f"{kernel.name}, PTX line {branch.line}: {branch.text}"
        raise Unknown(f"{where} (no label {label})")
    return kernel.labels[label]


def _post_order(root: int, before: dict[int, list[int]]) -> list[int]:
    order: list[int] = []
    seen, stack = {root}, [(root, iter(before[root]))]
    while stack:
        block, rest = stack[-1]
        step = next((p for p in rest if p not in seen), None)
        if step is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(before[step])))
    return order


def meeting_points(kernel: Kernel) -> dict[int, int]:
    """Instruction of every branch -> where its ways meet; the number of instructions is the end."""
    blocks, last, after = _blocks(kernel)
    end = len(kernel.instructions)
    before: dict[int, list[int]] = {b: [] for b in blocks}
    for block, targets in after.items():
        for target in targets:
            before[target].append(block)
    order = _post_order(end, before)
    rank = {b: r for r, b in enumerate(order)}
    meets = {end: end}

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] < rank[b]:
                a = meets[a]
            while rank[b] < rank[a]:
                b = meets[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [t for t in after[block] if t in meets]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            if meets.get(block) != new:
                meets[block] = new
                changed = True
    code = kernel.instructions
    return {
        last[b]: meets.get(b, end) for b in blocks[:-1] if code[last[b]].opcode.startswith("bra")
    }
