"""The steps of a campaign, the most valuable first: right answers, the CUDA kernels proved and
their variants timed, speed, sound memory, better tiles, more sizes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

from ...backends.cuda import loader
from ...testing import CASES
from ..shapes import CAMPAIGN, HYPER, HYPER_TOKENS, TOP1, TOP1_TOKENS
from ..timing.tune import LAUNCHES
from ..variants import CUDA, DEFAULT, TIMED, VARIANTS, provider, variants_of
from .worker import SANITIZERS, SANITIZERS_CUDA

# Tokens of the curves of speed over size, at the widths of shapes.CAMPAIGN.
TOKENS = ("1", "16", "64", "256", "1024", "4096", "16384")
# Where variants are compared first: many tiles, from long main loops to short ones.
VARIANT_SHAPES = ("8192x4096x14336", "8192x2048x8192", "16384x1536x4096", "4096x8192x28672")
COMMAND = "fusedmlp.bench"
WORKER = f"{COMMAND}.campaign.worker"
BUILD = "build"


@dataclasses.dataclass(frozen=True)
class Step:
    """One process. budget_s: how long it may take before it counts as hung. needs: a step before it
    that has to end well, or this one is skipped. without: provider -> the step that has to end
    well, or that provider is left out. again: what it makes may be lost with the machine, so a
    campaign that goes on does it again for those that need it.
    """

    name: str
    argv: tuple[str, ...]
    budget_s: float
    needs: str = ""
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    again: bool = False


def python_step(name: str, budget_s: float, module: str, *arguments: str) -> Step:
    return Step(name, (sys.executable, "-m", module, *arguments), budget_s)


def _cases() -> dict[str, str]:
    """The fullest call of each op, hence each of its kernels in one small case."""
    ops = dict.fromkeys(case.op for case in CASES.values())
    fullest = (
        max((c for c in CASES.values() if c.op == op), key=lambda c: len(c.shapes(1, 1, 1)))
        for op in ops
    )
    return {case.op: case.name for case in fullest}


def _needing(name: str, steps: Sequence[Step]) -> Iterator[Step]:
    return (dataclasses.replace(s, needs=name) for s in steps)


def _decoding(*cases: str) -> tuple[str, ...]:
    shapes = ("1x4096x14336", "16x2048x8192", "3x256x128")
    dtypes = ("bfloat16", "float16")
    return ("--case", *cases, "--shape", *shapes, "--dtype", *dtypes, "--forward-only")


# Ops with kernels for one architecture alone: they come first.
_OWN = loader.ops_with_kernels(portable=False)
# op -> what checks the kernels of every architecture that it launches, all of them among these; and
# of masks the case that exercises them: as bits they are decoded.
_MASKED = "masked_gated_linear"
_OF_LOGITS = tuple(name for name, c in CASES.items() if c.op == _MASKED and not c.draws)
_OF_BITS = tuple(name for name, c in CASES.items() if c.op == _MASKED and c.draws)
_PORTABLE = {
    _MASKED: _decoding(*_OF_BITS),
    "binary_gated_mlp": _decoding("binary_gated_mlp", "binary_gated_mlp-recompute-bias"),
    "top1_route": ("--op", "top1_route"),
}
_OF_HYPERGLU = ("hyper_attention", "hyper_attention_step")
# Their widths are those of models with experts, or of layers of HyperGLU.
_OTHER_WIDTHS = (*_OF_HYPERGLU, "moe_linear", "moe_mlp", "top1_route")


def _cuda_first() -> Iterator[Step]:
    """Build, check, and time the variants. A kernel under development may hang: the first check has
    little time, and all that follows needs it."""
    yield dataclasses.replace(python_step(BUILD, 300, WORKER, BUILD), again=True)
    first, *others = (
        python_step(f"check:cuda:{op}", 90, COMMAND, "check", "--backend", "cuda", "--op", op)
        for op in _OWN
    )
    yield from _needing(BUILD, [first])
    yield from _needing(first.name, others)
    for op, argv in _PORTABLE.items():
        made = python_step(f"check:cuda:{op}", 90, COMMAND, "check", "--backend", "cuda", *argv)
        yield from _needing(first.name, [made])
    for name in VARIANTS:
        ops = [op for kernel, (op, _) in TIMED.items() if name in variants_of(kernel)]
        argv = ("check", "--backend", "cuda", "--variant", name, "--op", *ops)
        yield from _needing(first.name, [python_step(f"check:cuda:{name}", 60, COMMAND, *argv)])
    yield from _sanitizers_cuda(SANITIZERS_CUDA[:1])
    for kernel, (op, phase) in TIMED.items():
        argv = ("time", "--case", op, "--phase", phase, "--shape", *VARIANT_SHAPES)
        yield _variants(f"time:cuda:{kernel}", 240, kernel, *argv)
    yield from _sanitizers_cuda(SANITIZERS_CUDA[1:])


def _variants(name: str, budget_s: float, kernel: str, *arguments: str) -> Step:
    """Every variant of a kernel, their own choice and what auto takes, in the same rounds."""
    checks = {provider(name): f"check:cuda:{name}" for name in variants_of(kernel)}
    made = python_step(name, budget_s, COMMAND, *arguments, "--provider", DEFAULT, CUDA, *checks)
    return dataclasses.replace(made, needs=f"check:cuda:{TIMED[kernel][0]}", without=checks)


def _sanitizers_cuda(tools: Sequence[str]) -> Iterator[Step]:
    """Steps for the ops that launch all kernels there are; each runs every variant."""
    kernels = _OWN
    cases = _cases() | {_MASKED: _PORTABLE[_MASKED][1]}
    whole = [op for op in kernels if not any(set(kernels[op]) < set(k) for k in kernels.values())]
    for tool in tools:
        for op in (*whole, *_PORTABLE):
            argv = ("sanitize", tool, cases[op], "cuda")
            made = python_step(f"{tool}:cuda:{op}", 120, WORKER, *argv)
            yield from _needing(f"check:cuda:{op}", [made])


def _time(name: str, budget_s: float, op: str, *arguments: str) -> Step:
    made = python_step(name, budget_s, COMMAND, "time", *arguments)
    without = {CUDA: f"check:cuda:{op}"} if op in (*_OWN, *_PORTABLE) else {}
    return dataclasses.replace(made, without=without)


def _time_op(op: str) -> Iterator[Step]:
    """Masks that are trained at all sizes, packed ones where they are decoded."""
    if op in _OF_HYPERGLU:
        yield _time_layer(op)
        return
    yield _time(
        f"time:{op}", 420, op, *(("--case", *_OF_LOGITS) if op == _MASKED else ("--op", op))
    )
    if op == _MASKED:
        argv = ("--case", *_OF_BITS, "--m", "1", "4", "16", "--dtype", "bfloat16", "float16")
        yield _time(f"time:{op}:decode", 420, op, *argv, "--phase", "forward")


def _time_layer(op: str) -> Step:
    """At the sizes of a layer of HyperGLU, whose heads are none of an MLP's widths."""
    tokens = map(str, HYPER_TOKENS)
    argv = ("time", "--case", f"{op}-layer", "--model", *HYPER, "--m", *tokens)
    return python_step(f"time:{op}", 600, COMMAND, *argv)


def plan() -> list[Step]:
    """All steps, by worth: what the time box cuts off is worth least."""
    cases = _cases()
    tokens = tuple(map(str, TOP1_TOKENS))
    steps = [python_step(f"check:{op}", 240, COMMAND, "check", "--op", op) for op in cases]
    steps += _cuda_first()
    steps += [step for op in cases for step in _time_op(op)]
    steps += [python_step("tests", 600, WORKER, "tests")]
    steps += [
        python_step(f"{tool}:{op}", 180, WORKER, "sanitize", tool, name)
        for tool in SANITIZERS
        for op, name in cases.items()
    ]
    steps += [
        _variants(
            f"time:cuda:{kernel}:sizes", 420, kernel, "time", "--case", op, "--phase", phase,
            "--model", *CAMPAIGN, "--m", *TOKENS[2:],
        )
        for kernel, (op, phase) in TIMED.items()
    ]  # fmt: skip
    steps += [
        python_step(f"time:moe_mlp:{model}", 600, COMMAND, "time", "--model", model, "--m", *tokens)
        for model in TOP1
    ]
    steps += [python_step(f"tune:{k}", 420, COMMAND, "tune", "--kernel", k) for k in LAUNCHES]
    steps += [
        _time(f"time:{op}:{model}", 600, op, "--op", op, "--model", model, "--m", *TOKENS)
        for model in CAMPAIGN
        for op in cases
        if op not in _OTHER_WIDTHS
    ]
    return steps
