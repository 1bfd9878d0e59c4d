"""Runs under ttsem: every launcher at sizes off its tiles, its numbers judged by the rule.

    python -m ttsem.sanitize tests/prove/prove_values.py [NAME ...]

ttsem executes the IR that Triton's frontend makes of a kernel, and stops at an access out of bounds
or a race between programs. It has no model of PTX, so `exp2` and `reciprocal` take the form here
that they have in the interpreter.
"""

from __future__ import annotations

import sys
import time

import torch
import triton.language as tl
from prove_launches import ARCH, LAUNCHES

from fusedmlp.kernels import exponentials
from fusedmlp.kernels.device import pretend
from fusedmlp.kernels.launch import Launch, Size, draw
from fusedmlp.testing import doubled, error_of

# Ragged, with element loads; and rows on 16 bytes, with vector loads.
SIZES = (131, 67, 101), (136, 80, 112)
MULTIPROCESSORS = 3  # few, so that persistent loops do loop


def fault(launch: Launch, size: Size) -> str:
    """What is wrong with the launch, or nothing."""
    operands = draw(launch, size, torch.bfloat16, torch.device("cpu"))
    assert launch.call is not None
    try:
        with pretend(ARCH, MULTIPROCESSORS):
            out = launch.call(operands, True)
    except Exception as error:  # ttsem's own faults have no class in common
        return f"{type(error).__name__}: {error}"
    if launch.reference is None:
        return ", ".join(name for name, t in out.items() if t.isnan().any())
    exact, eager = launch.reference(doubled(operands)), launch.reference(operands)
    wrong = (
        name
        for name, t in out.items()
        if not error_of(
            t, exact[name].reshape(t.shape), eager[name].to(t.dtype).reshape(t.shape)
        ).passed
    )
    return ", ".join(f"numbers of {name}" for name in wrong)


def judge(wanted: list[str]) -> int:
    exponentials.INTERPRETED = tl.constexpr(True)
    rows = faults = 0
    called = set()
    for name in wanted or LAUNCHES:
        launch = LAUNCHES[name]
        of_hyper = any(name == kernel for kernel, _ in ARCH.hyper)
        if launch.call in called:
            continue
        called.add(launch.call)
        for size in (launch.checked,) if of_hyper else SIZES:
            start = time.perf_counter()
            found = fault(launch, size)
            rows, faults = rows + 1, faults + bool(found)
            shape = "x".join(map(str, size))
            verdict = "FAULT" if found else "ok"
            seconds = time.perf_counter() - start
            print(
                f"{verdict:6} {seconds:6.1f} s  {name:32} {shape:12} {found}".rstrip(), flush=True
            )
    print(f"{rows} launches, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    if judge(sys.argv[1:]):
        sys.exit(1)
