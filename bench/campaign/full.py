"""The plan `full`, for a GPU that one has for hours: right answers, the CUDA kernels proved and
their variants timed, speed, sound memory, better tiles, more sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..shapes import CAMPAIGN, HYPER, HYPER_TOKENS, MOE, MOE_TOKENS
from ..timing.tune import LAUNCHES
from ..variants import TIMED
from .steps import (
    BUILD,
    COMMAND,
    MASKED,
    OF_BITS,
    OF_LOGITS,
    OWN,
    PORTABLE,
    WORKER,
    Step,
    cases,
    cuda_checks,
    needing,
    python_step,
    variants,
    without_unchecked,
)
from .worker import SANITIZERS, SANITIZERS_CUDA

# Tokens of the curves of speed over size, at the widths of shapes.CAMPAIGN.
TOKENS = ("1", "16", "64", "256", "1024", "4096", "16384")
# Where variants are compared first: many tiles, from long main loops to short ones.
VARIANT_SHAPES = ("8192x4096x14336", "8192x2048x8192", "16384x1536x4096", "4096x8192x28672")
_OF_HYPERGLU = ("hyper_attention", "hyper_attention_step")
# Their widths are those of models with experts, or of layers of HyperGLU.
_OTHER_WIDTHS = (*_OF_HYPERGLU, "moe_linear", "moe_mlp", "top1_route")


def _cuda_first() -> Iterator[Step]:
    """Build, check, and time the variants."""
    yield dataclasses.replace(python_step(BUILD, 300, WORKER, BUILD), again=True)
    yield from cuda_checks()
    yield from _sanitizers_cuda(SANITIZERS_CUDA[:1])
    for kernel, (op, phase) in TIMED.items():
        argv = ("time", "--case", op, "--phase", phase, "--shape", *VARIANT_SHAPES)
        yield variants(f"time:cuda:{kernel}", 240, kernel, *argv)
    yield from _sanitizers_cuda(SANITIZERS_CUDA[1:])


def _sanitizers_cuda(tools: Sequence[str]) -> Iterator[Step]:
    """Steps for the ops that launch all kernels there are; each runs every variant."""
    fullest = cases() | {MASKED: PORTABLE[MASKED][1]}
    whole = [op for op in OWN if not any(set(OWN[op]) < set(k) for k in OWN.values())]
    for tool in tools:
        for op in (*whole, *PORTABLE):
            argv = ("sanitize", tool, fullest[op], "cuda")
            made = python_step(f"{tool}:cuda:{op}", 120, WORKER, *argv)
            yield from needing(f"check:cuda:{op}", [made])


def _time(name: str, budget_s: float, op: str, *arguments: str) -> Step:
    return without_unchecked(python_step(name, budget_s, COMMAND, "time", *arguments), op)


def _time_op(op: str) -> Iterator[Step]:
    """Masks that are trained at all sizes, packed ones where they are decoded."""
    if op in _OF_HYPERGLU:
        yield _time_layer(op)
        return
    yield _time(f"time:{op}", 420, op, *(("--case", *OF_LOGITS) if op == MASKED else ("--op", op)))
    if op == MASKED:
        argv = ("--case", *OF_BITS, "--m", "1", "4", "16", "--dtype", "bfloat16", "float16")
        yield _time(f"time:{op}:decode", 420, op, *argv, "--phase", "forward")


def _time_layer(op: str) -> Step:
    """At the sizes of a layer of HyperGLU, whose heads are none of an MLP's widths."""
    tokens = map(str, HYPER_TOKENS)
    argv = ("time", "--case", f"{op}-layer", "--model", *HYPER, "--m", *tokens)
    return python_step(f"time:{op}", 600, COMMAND, *argv)


def plan() -> list[Step]:
    """All steps, by worth: what the time box cuts off is worth least."""
    fullest = cases()
    tokens = tuple(map(str, MOE_TOKENS))
    steps = [python_step(f"check:{op}", 240, COMMAND, "check", "--op", op) for op in fullest]
    steps += _cuda_first()
    steps += [step for op in fullest for step in _time_op(op)]
    steps += [python_step("tests", 600, WORKER, "tests")]
    steps += [
        python_step(f"{tool}:{op}", 180, WORKER, "sanitize", tool, name)
        for tool in SANITIZERS
        for op, name in fullest.items()
    ]
    steps += [
        variants(
            f"time:cuda:{kernel}:sizes", 420, kernel, "time", "--case", op, "--phase", phase,
            "--model", *CAMPAIGN, "--m", *TOKENS[2:],
        )
        for kernel, (op, phase) in TIMED.items()
    ]  # fmt: skip
    steps += [
        python_step(f"time:moe_mlp:{model}", 600, COMMAND, "time", "--model", model, "--m", *tokens)
        for model in MOE
    ]
    steps += [python_step(f"tune:{k}", 420, COMMAND, "tune", "--kernel", k) for k in LAUNCHES]
    steps += [
        _time(f"time:{op}:{model}", 600, op, "--op", op, "--model", model, "--m", *TOKENS)
        for model in CAMPAIGN
        for op in fullest
        if op not in _OTHER_WIDTHS
    ]
    return steps
