"""The plans `brief` and `rerun`, for a GPU that is lent for minutes: the first speed at once, then
everything checked at the same time, then the speeds that decide the targets, alone on the GPU.

Expected seconds are estimates for one H200 with 16 cores, a filled cache and a carried extension;
they order the plan and size its box, and no result depends on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from ..variants import CUDA, DEFAULT, TIMED
from .questions import QUESTIONS
from .steps import (
    BUILD,
    COMMAND,
    MASKED,
    OF_BITS,
    WORKER,
    Step,
    cases,
    cuda_checks,
    python_step,
    variants,
    without_unchecked,
)

WIDE, NARROW = "8192x4096x14336", "8192x2048x8192"
# One process an H200's core, but for those that its driver and this program need.
CHECKED_AT_ONCE = 7
SANITIZED_AT_ONCE = 4
ROUNDS = ("--rounds", "15")
# op -> expected seconds of its check; most of it are processes that start and kernels that load.
_CHECK_S = {
    "gated_linear": 22, "gated_mlp": 26, "masked_gated_linear": 28, "masked_gated_mlp": 22,
    "moe_mlp": 28, "hyper_attention": 30, "binary_gated_mlp": 22, "mlp": 20,
}  # fmt: skip
_LIGHT_CHECK_S = 16

# What is timed, the most wanted first: name, op, expected seconds, worth, and the arguments of
# `time`. Rivals here need no compiler.
_OURS = (DEFAULT, CUDA)
_TIMED = (
    ("block", "gated_mlp", 22, "a block against eager and cuBLAS",
     ("--case", "gated_mlp", "--phase", "forward", "both", "--shape", NARROW, WIDE,
      "--provider", *_OURS, "eager", "eager-packed", "liger-elementwise")),
    ("few", "gated_linear", 10, "decoding against the copy",
     ("--case", "gated_linear", "--phase", "forward", "--shape", "16x4096x14336", "1x4096x14336",
      "--provider", DEFAULT, "eager")),
    ("act", "gated_act", 8, "the elementwise kernel against the copy",
     ("--case", "gated_act", "--phase", "forward", "backward", "--shape", WIDE,
      "--provider", DEFAULT, "eager")),
    ("bits", "binary_linear", 10, "one-bit weights, decoding and prefill",
     ("--case", "binary_linear", "--phase", "forward", "--shape", "1x4096x14336", "16x4096x14336",
      "2048x4096x14336", "--provider", DEFAULT, "dequantised")),
    ("decode", MASKED, 10, "packed masks against the copy and two matrices",
     ("--case", *OF_BITS, "--phase", "forward", "--shape", "1x4096x14336",
      "--provider", *_OURS, "two-matrix-glu")),
    ("masks", MASKED, 10, "masks that are trained, against two matrices",
     ("--case", "masked_gated_linear-1", "masked_gated_linear-4", "--phase", "forward", "both",
      "--shape", "4096x4096x14336", "--provider", DEFAULT, "two-matrix-glu")),
    ("experts", "moe_mlp", 13, "experts against torch's grouped GEMMs",
     ("--case", "moe_mlp-16-uniform", "--phase", "forward", "both", "--shape", "8192x2048x2048",
      "--provider", DEFAULT, "grouped-mm")),
    ("hyper", "hyper_attention", 13, "HyperGLU against upstream's chunks, dense and attention",
     ("--case", "hyper_attention-layer", "--phase", "forward", "both", "--model", "hyperglu-16",
      "--m", "16384", "--provider", DEFAULT, "chunked", "sdpa", "eager")),
    ("step", "hyper_attention_step", 9, "a decoding step against the copy",
     ("--case", "hyper_attention_step-layer", "--phase", "forward", "--model", "hyperglu-16",
      "--m", "65536", "--provider", DEFAULT, "eager")),
)  # fmt: skip
# tool, case, backend.
_SANITIZED = (
    ("memcheck", "gated_mlp-bias", "cuda"), ("racecheck", "gated_mlp-bias", "cuda"),
    ("memcheck", "gated_mlp-bias", "triton"), ("memcheck", "moe_mlp-bias", "triton"),
    ("memcheck", "hyper_attention", "triton"), ("synccheck", "gated_mlp-bias", "cuda"),
    ("memcheck", "masked_gated_linear-1-bits", "cuda"), ("memcheck", "top1_route", "cuda"),
    ("memcheck", "masked_gated_linear-4", "triton"), ("memcheck", "mlp-bias", "cuda"),
)  # fmt: skip
_SANITIZE_S = 28
# Baselines that compile or tune when they are first called: name, Python package, expected seconds
# where it is installed, and the arguments of `time`.
_COMPILING = (
    ("compile", "", 50, ("--case", "gated_mlp", "--phase", "both", "--shape", NARROW,
                         "--provider", DEFAULT, "compile", "compile-packed")),
    ("compile-forward", "", 18, ("--case", "gated_linear", "--phase", "forward", "--shape", NARROW,
                                 "--provider", DEFAULT, "compile", "compile-packed")),
    ("quack", "quack", 0, ("--case", "gated_linear", "gated_mlp", "--phase", "forward", "both",
                           "--shape", NARROW, "--provider", DEFAULT, "quack")),
    ("sonicmoe", "sonicmoe", 0, ("--case", "moe_mlp-16-uniform", "--phase", "forward",
                                 "--shape", "8192x2048x2048", "--provider", DEFAULT, "sonicmoe")),
    ("sonicmoe-8", "sonicmoe", 0, ("--case", "moe_mlp-128-top8-uniform", "--phase", "both",
                                   "--shape", "8192x2048x768", "--provider", DEFAULT, "sonicmoe")),
    ("liger", "liger_kernel", 0, ("--case", "gated_mlp", "--phase", "both", "--shape", NARROW,
                                  "--provider", DEFAULT, "liger")),
    ("flash-swiglu", "flash_swiglu_mlp", 0, ("--case", "gated_mlp", "--phase", "both", "--shape",
                                             NARROW, "--provider", DEFAULT, "flash-swiglu")),
    ("chunks", "", 18, ("--case", "hyper_attention-layer", "--phase", "forward", "--model",
                        "hyperglu-16", "--m", "16384", "--provider", DEFAULT, "compile-chunked")),
)  # fmt: skip


def _time(name: str, expected_s: float, worth: str, *arguments: str) -> Step:
    made = python_step(f"time:{name}", 4 * expected_s + 20, COMMAND, "time", *ROUNDS, *arguments)
    return dataclasses.replace(made, expected_s=expected_s, worth=worth)


def _first() -> Step:
    arguments = ("--case", "gated_linear", "--phase", "forward", "--shape", WIDE)
    step = _time("first", 20, "cuBLAS, the copy, and the GEMM that all rests on", *arguments,
                 "--provider", DEFAULT, "eager")  # fmt: skip
    return dataclasses.replace(step, budget_s=60)


def _checks() -> Iterator[Step]:
    """The extension and what it holds, and every op on Triton's kernels; questions that a launch
    answers."""
    build = python_step(BUILD, 150, WORKER, BUILD)
    yield dataclasses.replace(build, again=True, expected_s=8, worth="the extension for this GPU")
    for step in cuda_checks():
        worth = "right numbers of csrc/"
        yield dataclasses.replace(step, budget_s=60, expected_s=15, worth=worth)
    for op in cases():
        expected = _CHECK_S.get(op, _LIGHT_CHECK_S)
        step = python_step(f"check:{op}", 120, COMMAND, "check", "--op", op)
        yield dataclasses.replace(step, expected_s=expected, worth="right numbers of Triton")
    for name, question in QUESTIONS.items():
        step = python_step(f"ask:{name}", 40, WORKER, "ask", name)
        yield dataclasses.replace(step, expected_s=9, worth=question.text)


def _variants() -> Iterator[Step]:
    """Each kernel of csrc/ in each variant, beside Triton's."""
    for kernel, (op, phase) in TIMED.items():
        arguments = ("time", *ROUNDS, "--case", op, "--phase", phase, "--shape", WIDE, NARROW)
        step = variants(f"time:cuda:{kernel}", 80, kernel, *arguments)
        yield dataclasses.replace(step, expected_s=14, worth="which variant wins, by cuBLAS")


def _speeds() -> Iterator[Step]:
    for name, op, expected, worth, arguments in _TIMED:
        yield without_unchecked(_time(name, expected, worth, *arguments), op)


def _sanitizers() -> Iterator[Step]:
    for tool, case, backend in _SANITIZED:
        step = python_step(f"{tool}:{backend}:{case}", 75, WORKER, "sanitize", tool, case, backend)
        needs = "check:cuda:gated_linear" if backend == "cuda" else ""
        yield dataclasses.replace(
            step, needs=needs, expected_s=_SANITIZE_S, worth="sound memory, no race"
        )


def _late() -> Iterator[Step]:
    """What is worth least, or takes whatever time is left."""
    for name, module, expected, arguments in _COMPILING:
        step = _time(f"rival:{name}", expected, "a baseline that compiles", *arguments)
        yield dataclasses.replace(step, budget_s=max(60.0, 2.5 * expected), module=module)
    tests = python_step("tests", 120, WORKER, "tests", "brief")
    yield dataclasses.replace(tests, expected_s=36, worth="graphs, inductor, memory, threads")
    search = ("tune", "--kernel", "gated_linear_fwd", "--shape", WIDE, "--limit", "24")
    tune = python_step("tune:gated_linear_fwd", 400, COMMAND, *search)
    yield dataclasses.replace(tune, expected_s=20, worth="a better tile, while time is left")


def _stage(name: str, at_once: int, steps: Iterable[Step]) -> Iterator[Step]:
    return (dataclasses.replace(step, stage=name, at_once=at_once) for step in steps)


def brief() -> list[Step]:
    return [
        *_stage("first", 1, [_first()]),
        *_stage("checks", CHECKED_AT_ONCE, _checks()),
        *_stage("speed", 1, [*_variants(), *_speeds()]),
        *_stage("memory", SANITIZED_AT_ONCE, _sanitizers()),
        *_stage("late", 1, _late()),
    ]


# What a fix touches most often, and the speeds that show it.
_AGAIN = (
    "time:first", BUILD, "check:cuda:gated_linear", "check:cuda:gated_mlp", "check:gated_linear",
    "check:gated_mlp", "check:masked_gated_linear", "check:moe_mlp", "check:hyper_attention",
    *(f"time:cuda:{kernel}" for kernel in TIMED), "time:block", "time:few", "time:bits",
    "time:experts", "time:hyper",
)  # fmt: skip


def rerun() -> list[Step]:
    """After a fix: its proof and its speed. `--only` names what it was about."""
    return [step for step in brief() if step.name in _AGAIN]
