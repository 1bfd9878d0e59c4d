"""Faults planted in compiled kernels: one line of PTX, or of the Python that Triton compiles."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rewriting import rewritten

from fusedmlp import ops, reference  # noqa: F401
from fusedmlp.backends.op import KERNELS
from fusedmlp.bench.gate.ptx import Finding, Order, emulate, load
from fusedmlp.kernels.arch import ARCHES
from fusedmlp.kernels.launch import Launch, draw
from fusedmlp.testing import doubled, error_of

LAUNCHES: dict[str, Launch] = {
    launch.name: launch for kernel in KERNELS.values() for launch in kernel.launches
}
LAUNCHES["gated_act_fwd"] = dataclasses.replace(
    LAUNCHES["gated_act_fwd"], reference=lambda t: {"h": reference.gated_act(t["g"], t["u"])}
)
# A fault may show in one order alone: a dropped wait not where everything comes at once.
ORDERS = (Order("late"), Order("once"), Order("seed", 7))
SIZE = (150, 208, 144)  # off every block, on 16 elements
BUDGET = 3_000_000  # warp instructions of a block: an endless loop ends here


def places(text: str, pattern: str) -> list[int]:
    """Lines that fit and that were carried out: a fault elsewhere changes nothing."""
    idle = {i.line - 1 for i in load(text).never()}
    found = [k for k, line in enumerate(text.split("\n")) if re.search(pattern, line)]
    return [k for k in found if k not in idle]


def planted(text: str, pattern: str, to: str, line: int) -> str:
    lines = text.split("\n")
    lines[line] = re.sub(pattern, to, lines[line], count=1)
    return "\n".join(lines)


@dataclass
class Bench:
    """One launcher on one architecture: its operands, drawn once, for where two weights lie decides
    which kernel runs; and what must come out."""

    arch: str
    launch: str
    size: tuple[int, int, int] = SIZE

    def __post_init__(self) -> None:
        made = LAUNCHES[self.launch]
        self.operands = draw(made, self.size, torch.bfloat16, torch.device("cpu"))
        assert made.reference is not None
        self.exact = made.reference(doubled(self.operands))
        self.eager = made.reference(self.operands)

    def run(self, order: Order, edit: Callable[[str, str], str] | None = None) -> str:
        """What was found, or nothing."""
        made = LAUNCHES[self.launch]
        assert made.call is not None
        try:
            with emulate(ARCHES[self.arch], order, edit=edit, budget=BUDGET):
                out = made.call(self.operands, True)
        except Finding as found:
            return found.what
        for name, t in out.items():
            exact = self.exact[name].reshape(t.shape)
            error = error_of(t, exact, self.eager[name].to(t.dtype).reshape(t.shape))
            if not error.passed:
                return f"numbers of {name}"
        return ""

    def text(self) -> str:
        """The PTX of the one kernel that the launcher runs."""
        texts: list[str] = []

        def keep(name: str, text: str) -> str:
            texts.append(text)
            return text

        for order in ORDERS:
            assert not self.run(order, keep)
        return texts[0]

    def finds(self, text: str, mutant: str) -> str:
        """What the first order that finds the fault says, or nothing."""

        def edit(name: str, compiled: str) -> str:
            return mutant if compiled == text else compiled

        found = (self.run(order, edit) for order in ORDERS)
        return next(filter(None, found), "")


@functools.cache
def bench(arch: str, launch: str) -> tuple[Bench, str]:
    made = Bench(arch, launch)
    return made, made.text()


def outcomes(arch: str, launch: str, pattern: str, to: str, limit: int) -> list[tuple[str, str]]:
    """(line of PTX, what was found) for up to `limit` places of a fault, spread over the kernel."""
    made, text = bench(arch, launch)
    fit = places(text, pattern)
    chosen = [fit[k * len(fit) // limit] for k in range(limit)] if len(fit) > limit else fit
    lines = text.split("\n")
    return [
        (f"{k + 1}: {lines[k].strip()}", made.finds(text, planted(text, pattern, to, k)))
        for k in chosen
    ]


# What Python is changed under, by name: a launcher at a size, and what judges it.
CHANGED: dict[str, Callable[[], Bench]] = {
    "gated_linear_fwd": lambda: Bench("sm_80", "gated_linear_fwd"),
    "few rows": lambda: Bench("sm_80", "gated_linear_fwd", (13, 1040, 80)),
    "gated_act_fwd": lambda: Bench("sm_80", "gated_act_fwd"),
}


def in_python(launch: str, module: str, kernel: str, old: str, new: str) -> str:
    """What is found where the kernel's Python is changed, in one order on sm_80."""
    fn = getattr(importlib.import_module(f"fusedmlp.kernels.{module}"), kernel)
    made = CHANGED[launch]()
    assert not made.run(ORDERS[0])
    with rewritten(fn, old, new):
        return made.run(ORDERS[0])
