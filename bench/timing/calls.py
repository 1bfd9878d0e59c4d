"""From a piece of work to calls that can be timed: random arguments, enough copies to leave L2
behind, one call per copy and phase; and whether a rival computes the op at all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...testing import error_of, floating, yardsticks
from ..check import inputs_of
from ..rivals import Rival
from ..work import DGLU, Work
from .clock import Call

# A check needs no more rows than fill the GPU; float64 copies of more would fill its memory.
CHECKED_ROWS = 2048
# How far past eager's own error a rival may be before it is taken to compute something else.
RIVAL_SLACK = 4.0


def draw(work: Work, device: str, seed: int, phase: str = "forward") -> dict[str, Tensor]:
    """Random normal arguments, made on the device; weights scaled so that results stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in work.case.draws:
            return work.case.draws[name](shape, generator)
        t = torch.randn(shape, device=device, dtype=work.torch_dtype, generator=generator)
        t = t.mul_(work.case.scales[name]) if name in work.case.scales else t
        return t.div_(math.sqrt(shape[-1])) if name.startswith("w") else t

    return {name: one(name, shape) for name, shape in work.shapes(phase).items()}


def refuse_zeros(tensors: Mapping[str, Tensor]) -> None:
    """Zeros make a GEMM up to 13% faster than real data: no speed is taken on them."""
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel() and not t.any():
            raise ValueError(f"time: {name} is all zero; speeds are taken on random data only")


def rotated(
    work: Work, device: str, l2_bytes: int, phase: str = "forward"
) -> list[dict[str, Tensor]]:
    """As many sets of arguments as leave L2 behind: over three times its size together."""
    first = draw(work, device, 0, phase)
    size = sum(t.numel() * t.element_size() for t in first.values())
    count = 3 * l2_bytes // max(size, 1) + 1
    sets = [first, *(draw(work, device, seed, phase) for seed in range(1, count))]
    for each in sets:
        refuse_zeros(each)
    return sets


def calls_of(
    rival: Rival, work: Work, phase: str, sets: Sequence[Mapping[str, Tensor]]
) -> list[Call]:
    """One call to time for each set of arguments."""
    function: Any = rival.dglu(work) if phase == DGLU else rival.function(work)
    out = work.case.fake_output(work.M, work.D, work.H)

    def call_on(i: int, inputs: Mapping[str, Tensor]) -> Call:
        arguments = dict(inputs) if phase == DGLU else rival.arguments(work, inputs)
        if phase in ("forward", DGLU):
            return lambda: _forward(function, arguments)
        leaves = {
            name: t.detach().requires_grad_(t.is_floating_point()) for name, t in arguments.items()
        }
        wanted = list(floating(leaves).values())
        device = wanted[0].device
        generator = torch.Generator(device).manual_seed(i)
        dy = torch.randn(out.shape, device=device, dtype=work.torch_dtype, generator=generator)
        if phase == "both":
            return lambda: torch.autograd.grad(function(leaves), wanted, dy)
        made = function(leaves)
        return lambda: torch.autograd.grad(made, wanted, dy, retain_graph=True)

    with rival.in_force():
        return [_in_force(rival, call_on(i, inputs)) for i, inputs in enumerate(sets)]


def _in_force(rival: Rival, call: Call) -> Call:
    def run() -> object:
        with rival.in_force():
            return call()

    return run


@torch.no_grad()
def _forward(
    function: Callable[[Mapping[str, Tensor]], Any], arguments: Mapping[str, Tensor]
) -> Any:
    return function(arguments)


def checked(work: Work) -> Work:
    """What is checked before `work` is timed: the same with no more rows than a check needs."""
    return dataclasses.replace(work, M=min(work.M, CHECKED_ROWS), model=None)


@functools.lru_cache(maxsize=1)
def _expected(work: Work, device: str) -> Any:
    """What a rival's result is judged by; kept for the next rival."""
    known = yardsticks(
        lambda t: work.case.run_reference(t, **work.options), inputs_of(work, device)
    )
    return known["out"]


def disagreement(rival: Rival, work: Work, device: str) -> str | None:
    """Why a rival's result is not this op's; None if it is. It may err more than we may."""
    small = checked(work)
    with torch.no_grad():
        out = rival.function(small)(rival.arguments(small, inputs_of(small, device)))
        error = error_of(out, *_expected(small, device))
    if error.rms <= RIVAL_SLACK * error.rms_bound:
        return None
    return f"computes something else: relative L2 error {error.relative_l2:.1e}"
