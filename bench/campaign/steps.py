"""One step of a campaign, and what every plan makes its steps with."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

from ...backends.cuda import loader
from ...testing import CASES
from ..variants import CUDA, DEFAULT, TIMED, VARIANTS, provider, variants_of

COMMAND = "fusedmlp.bench"
WORKER = f"{COMMAND}.campaign.worker"
BUILD = "build"


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    budget_s: how long it may take before it counts as hung; expected_s: how long it should take,
    where that was estimated. worth: what it is good for. stage: steps of one stage that stand
    together run at the same time, `at_once` of them. needs: a step before it that has to end well,
    or this one is skipped. module: a Python package without which it is skipped. without: provider
    -> the step that has to end well, or that provider is left out. again: what it makes may be lost
    with the machine, so a campaign that goes on does it again for those that need it.
    """

    name: str
    argv: tuple[str, ...]
    budget_s: float
    needs: str = ""
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    again: bool = False
    expected_s: float = 0.0
    worth: str = ""
    stage: str = ""
    at_once: int = 1
    module: str = ""


def python_step(name: str, budget_s: float, module: str, *arguments: str) -> Step:
    return Step(name, (sys.executable, "-m", module, *arguments), budget_s)


def cases() -> dict[str, str]:
    """The fullest call of each op, hence each of its kernels in one small case."""
    ops = dict.fromkeys(case.op for case in CASES.values())
    fullest = (
        max((c for c in CASES.values() if c.op == op), key=lambda c: len(c.shapes(1, 1, 1)))
        for op in ops
    )
    return {case.op: case.name for case in fullest}


def needing(name: str, steps: Sequence[Step]) -> Iterator[Step]:
    return (dataclasses.replace(s, needs=name) for s in steps)


def _decoding(*names: str) -> tuple[str, ...]:
    shapes = ("1x4096x14336", "16x2048x8192", "3x256x128")
    dtypes = ("bfloat16", "float16")
    return ("--case", *names, "--shape", *shapes, "--dtype", *dtypes, "--forward-only")


# Ops with kernels for one architecture alone: they come first.
OWN = loader.ops_with_kernels(portable=False)
# op -> what checks the kernels of every architecture that it launches, all of them among these; and
# of masks the case that exercises them: as bits they are decoded.
MASKED = "masked_gated_linear"
OF_LOGITS = tuple(name for name, c in CASES.items() if c.op == MASKED and not c.draws)
OF_BITS = tuple(name for name, c in CASES.items() if c.op == MASKED and c.draws)
PORTABLE = {
    MASKED: _decoding(*OF_BITS),
    "binary_gated_mlp": _decoding("binary_gated_mlp", "binary_gated_mlp-recompute-bias"),
    "top1_route": ("--op", "top1_route"),
}


def cuda_checks() -> Iterator[Step]:
    """The checks of csrc/'s kernels. A kernel under development may hang: the first check has
    little time, and all that follows needs it."""
    first, *others = (
        python_step(f"check:cuda:{op}", 90, COMMAND, "check", "--backend", "cuda", "--op", op)
        for op in OWN
    )
    yield from needing(BUILD, [first])
    yield from needing(first.name, others)
    for op, argv in PORTABLE.items():
        made = python_step(f"check:cuda:{op}", 90, COMMAND, "check", "--backend", "cuda", *argv)
        yield from needing(first.name, [made])
    for name in VARIANTS:
        ops = [op for kernel, (op, _) in TIMED.items() if name in variants_of(kernel)]
        argv = ("check", "--backend", "cuda", "--variant", name, "--op", *ops)
        yield from needing(first.name, [python_step(f"check:cuda:{name}", 60, COMMAND, *argv)])


def variants(name: str, budget_s: float, kernel: str, *arguments: str) -> Step:
    """Every variant of a kernel, their own choice and what auto takes, in the same rounds."""
    checks = {provider(name): f"check:cuda:{name}" for name in variants_of(kernel)}
    made = python_step(name, budget_s, COMMAND, *arguments, "--provider", DEFAULT, CUDA, *checks)
    return dataclasses.replace(made, needs=f"check:cuda:{TIMED[kernel][0]}", without=checks)


def without_unchecked(step: Step, op: str) -> Step:
    """The step without the provider of csrc/'s kernels of `op` where their check is not ok."""
    without = {CUDA: f"check:cuda:{op}"} if op in (*OWN, *PORTABLE) else {}
    return dataclasses.replace(step, without=without)
