"""`gate fill-cache`: compile what a campaign will launch, for a GPU that is not there, into a
folder that is carried to it, and an archive of it, DIR.tar.xz.

    fusedmlp bench gate fill-cache DIR [--plan NAME] [--only REGEX] [--extension]

The public functions run at the plan's own sizes on CPU tensors whose memory is never touched:
launches compile under a driver that only compiles, and PyTorch's own operators make empty results.
Tests that need a GPU run as pytest has them, under the same driver; what they assert is not looked
at. Run it with the Python, PyTorch and Triton that the GPU's machine has.

Where a kernel takes two weights, which kernel it is depends on how they lie in memory: one box for
both, in either order, or two boxes. Nobody knows what an allocator will do, so each work is
compiled in every placement that makes a kernel of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...dry.driver import compiling
from ...kernels.arch import ARCHES, Arch
from ...kernels.arch.tile import Tile
from ...kernels.launch import empty
from ...ops import gated_linear
from ...progress import Progress
from ..machine import ROOT
from ..options import Refusal, count
from ..rooms import load
from ..timing.tune import CHECKED_ROWS, LAUNCHES, forced
from ..work import DGLU, DTYPES, Work
from . import cache

# How two weights of one kernel can lie: one box for both, in either order, or two boxes.
PLACEMENTS = ("in order", "reversed", "apart", "padded")
PAIR = ("w_gate", "w_up")
PART = 12  # jobs that a process takes at a time
# Tells the plugin in tests/support for which GPU, and where to write what was compiled.
TESTS = "FUSEDMLP_COMPILED_TESTS"


@dataclasses.dataclass(frozen=True)
class Job:
    """A call that launches kernels of `op`. tried: whether it is a try, which may not compile."""

    op: str
    what: str
    call: Callable[[], None]
    tried: bool = False


def arguments(work: Work, phase: str, placement: str) -> dict[str, Tensor]:
    """The work's arguments, in memory that nobody touches; integers are drawn."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    shapes = work.shapes(phase)
    for name, shape in shapes.items():
        if name in work.case.draws:
            made[name] = work.case.draws[name](shape, generator)
        elif name not in made:
            made[name] = torch.empty(shape, dtype=work.torch_dtype)
    if has_pair(work, phase):
        made |= zip(PAIR, _pair(shapes[PAIR[0]], work.torch_dtype, placement), strict=True)
    return made


def has_pair(work: Work, phase: str) -> bool:
    shapes = work.shapes(phase)
    return all(name in shapes for name in PAIR)


def _pair(shape: Sequence[int], dtype: torch.dtype, placement: str) -> tuple[Tensor, Tensor]:
    """Two tensors whole rows apart, in either order, or 16 bytes more than that, or with rows of
    other strides. Both lie on 16 bytes, as whatever is allocated does, also where that is no whole
    number of rows."""
    if placement == "padded":
        wide = torch.empty(*shape[:-1], shape[-1] + 16, dtype=dtype)
        return torch.empty(shape, dtype=dtype), wide[..., : shape[-1]]
    n, unit = math.prod(shape), 16 // dtype.itemsize
    second = -(-n // unit) * unit + (unit if placement == "apart" else 0)
    memory = torch.empty(second + n, dtype=dtype)
    low, high = memory[:n].view(*shape), memory[second:].view(*shape)
    return (high, low) if placement == "reversed" else (low, high)


def launch(work: Work, phase: str, placement: str) -> None:
    """Make the calls of one phase."""
    inputs = arguments(work, phase, placement)
    if phase == DGLU:
        gated_linear.bwd(
            inputs["dy"], inputs["w_down"], inputs["gu"], work.activation, None, True, False
        )
        return
    if phase == "forward":
        with torch.no_grad():
            work.case.run(inputs, **work.options)
        return
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    out = work.case.run(leaves, **work.options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    torch.autograd.grad(out, wanted, torch.empty_like(out))


def compile_all(arch: Arch, jobs: Sequence[Job]) -> tuple[dict[str, bool], list[str]]:
    """(whether each kernel was in the cache, by its hash; what could not be compiled)."""
    faults = []
    with compiling(arch) as hits:
        for job in jobs:
            try:
                job.call()
            except Exception as error:  # the others must still be compiled
                first = (str(error).splitlines() or [""])[0][:160]
                if not job.tried:
                    faults.append(f"{job.op}, {job.what}: {type(error).__name__}: {first}")
    return hits, faults


# What the processes of `fill` compile: a forked one has it, and no case can be pickled.
_SHARED: list[tuple[Arch, Sequence[Job]]] = []


def _compile_shared(i: int) -> tuple[dict[str, bool], list[str]]:
    return compile_all(*_SHARED[i])


def compile_tests(arch: Arch, selection: Sequence[str]) -> tuple[dict[str, bool], list[str]]:
    """As compile_all, of what the selected tests launch; weights lie as the CPU's allocator has it.
    They have a process of their own, since they are told that there is a GPU."""
    if not (ROOT / "tests").is_dir():
        raise Refusal(f"gate fill-cache: {ROOT} is no checkout, and has no tests to compile for")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        paths = (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", ""))
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            TESTS: f"{arch.name}:{found}",
        }
        argv = [sys.executable, "-m", "pytest", "-p", "gpu_tests_compiled", "-q", *selection]
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        # 1: some failed, as may be on results that nobody computed. More: they did not run.
        if done.returncode > 1 or not found.exists():
            said = f"{done.stdout}\n{done.stderr}".strip()[-2000:]
            raise Refusal(f"gate fill-cache: the tests could not be run:\n{said}")
        hits, faults = json.loads(found.read_text())
        return hits, faults


def jobs_of(launched: Sequence[Any]) -> list[list[Job]]:
    """Jobs in parts of one op each, which share kernels; parts are small, so that processes end at
    the same time."""
    groups: dict[str, dict[str, Job]] = {}
    for one in launched:
        for job in _of_work(one) if hasattr(one, "work") else _of_tile(one):
            groups.setdefault(job.op, {})[job.what] = job
    # The ops with most to do first.
    ordered = sorted((list(group.values()) for group in groups.values()), key=len, reverse=True)
    return [group[i : i + PART] for group in ordered for i in range(0, len(group), PART)]


def _of_work(one: Any) -> Iterator[Job]:
    work: Work = one.work
    name = f"{work.case.name} {work.activation} {work.dtype} {work.size}"
    for phase in dict.fromkeys("both" if p == "backward" else p for p in one.phases):
        for how in PLACEMENTS if has_pair(work, phase) else PLACEMENTS[:1]:
            call = functools.partial(launch, work, phase, how)
            yield Job(work.case.op, f"{name} {phase} {how}", call)


def _of_tile(one: Any) -> Iterator[Job]:
    """As `tune` launches it: to be checked, and to be timed at each shape."""
    m, d, h = one.shapes[0]
    checked = (min(m, CHECKED_ROWS), d, h)
    for shape, training in ((checked, True), *((shape, False) for shape in one.shapes)):
        arguments = (one.kernel, DTYPES[one.dtype], one.tile, shape, training)
        what = f"{one.dtype} {one.tile} {shape} {training}"
        yield Job(f"tune {one.kernel}", what, functools.partial(launch_tile, *arguments), True)


def launch_tile(
    kernel: str, dtype: torch.dtype, tile: Tile, shape: tuple[int, int, int], training: bool
) -> None:
    found = LAUNCHES[kernel]
    assert found.call is not None
    with forced(kernel, dtype, tile, torch.device("cpu")):
        found.call(empty(found, shape, dtype), training)


def fill(folder: Path, arch: Arch, launched: Sequence[Any], processes: int) -> int:
    """Compile everything into `folder`, print what came of it; the exit code."""
    cache.begin(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    tests = [one.selection for one in launched if hasattr(one, "selection")]
    parts = jobs_of([one for one in launched if not hasattr(one, "selection")])
    _SHARED[:] = [(arch, part) for part in parts]
    hits: dict[str, dict[str, bool]] = {}
    faults: list[str] = []
    fork = multiprocessing.get_context("fork")
    steps = len(parts) + len(tests)
    with ProcessPoolExecutor(processes, fork) as pool, Progress("fill-cache", steps) as bar:
        results = pool.map(_compile_shared, range(len(parts)))
        for part, (found, bad) in zip(parts, results, strict=True):
            op = part[0].op
            of_op = hits.setdefault(op, {})
            # One that two parts share was there only if it was for both.
            of_op |= {name: hit and of_op.get(name, True) for name, hit in found.items()}
            faults += bad
            bar.step(op)
        for selection in tests:
            hits["tests"], bad = compile_tests(arch, selection)
            faults += bad
            bar.step("tests")
    for op, found in hits.items():
        print(f"{op:24} {len(found):4} kernels, {sum(found.values()):4} were there")
    every: dict[str, bool] = {}
    for found in hits.values():
        every |= {name: hit and every.get(name, True) for name, hit in found.items()}
    left = cache.prune(folder)
    packed = cache.pack(folder)
    print(
        f"{len(every)} kernels for {arch.name}, {sum(every.values())} were there: "
        f"{left / 1e6:.1f} MB in {folder}, {packed / 1e6:.1f} MB in {cache.archive_of(folder)}"
    )
    for fault in faults:
        print(f"failed: {fault}")
    return 1 if faults else 0


def main(args: argparse.Namespace) -> int:
    if triton.knobs.runtime.interpret:
        raise Refusal("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    plans = load("campaign.plans", "gate fill-cache")
    works = load("campaign.works", "gate fill-cache")
    if args.plan not in plans.PLANS:
        known = ", ".join(plans.PLANS)
        raise Refusal(f"gate fill-cache: --plan must be one of {known}, got {args.plan!r}")
    arch = ARCHES[args.for_arch]
    steps = plans.only(plans.PLANS[args.plan].steps(), args.only)
    if args.extension:
        worker = load("campaign.worker", "gate fill-cache")
        if code := worker.build_for(arch.capability):
            return int(code)
    return fill(args.folder, arch, works.all_launched(steps, arch), args.jobs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or filled before")
    parser.add_argument("--plan", default="brief", help="of the campaign; default: brief")
    parser.add_argument("--only", metavar="REGEX", help="of the plan's steps these")
    parser.add_argument(
        "--for-arch", choices=ARCHES, default="sm_90", metavar="NAME",
        help="the GPU that will run them; default: sm_90",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, metavar="N",
        help="processes; default: one a core",
    )  # fmt: skip
    parser.add_argument(
        "--extension", action="store_true", help="also build fusedmlp._C for it, with nvcc"
    )
