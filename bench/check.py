"""`check`: every case against float64, beside eager PyTorch's own error; one rule decides
(fusedmlp/testing).

On a GPU the kernels run there. Without one they run in Triton's interpreter, which has to be chosen
before Triton is imported: hence a process of its own, at sizes that it can bear.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

import fusedmlp

from ..backends import choice
from ..backends.cuda.gated_linear import forced, variant
from ..kernels.device import capability_of
from ..progress import Progress
from ..testing import CASES, Error, judge, poison
from . import glance, machine, process
from .check_sizes import ON_CUDA, ON_GPU, SMALL, Class
from .lost import not_run, why_lost
from .options import (
    INTERRUPTED,
    PROG,
    Emit,
    Record,
    Refusal,
    add_selection,
    chosen_activations,
    chosen_cases,
    collecting,
    subparser,
    write_json,
)
from .render import number, say, say_command, table
from .variants import VARIANTS
from .work import Work, activations_of, case_of

INTERPRETER_LIMIT_S = 3600


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """What to check. None: the defaults of the device. variants: of the CUDA kernels, each in turn;
    None: the kernels' own choice. brief: of each op one case at every size, the others at one."""

    cases: tuple[str, ...] = tuple(CASES)
    dtypes: tuple[str, ...] | None = None
    activations: tuple[str, ...] | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()
    backend: str = "auto"
    variants: tuple[str | None, ...] = (None,)
    backward: bool = True
    brief: bool = False


# The first case of each op; its others differ in layout, bias or what is kept for backward.
_FIRST = frozenset({case.op: name for name, case in reversed(CASES.items())}.values())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def plan(options: CheckOptions, sizes: Sequence[Class] = ()) -> list[Work]:
    """Every (case, activation, size, dtype) that `run` will judge. sizes: those of a device that is
    not there."""
    classes: Sequence[Class] = sizes or (ON_GPU if _device() == "cuda" else SMALL)
    cases = list(map(case_of, options.cases))
    if options.backend == "cuda":
        classes, cases = ON_CUDA, [case for case in cases if case.fits_cuda]
        if not cases:
            raise Refusal("the CUDA kernels take no interleaved halves; --backend triton does")
    if options.shapes:
        classes = [("given", shape, "bfloat16") for shape in options.shapes]
    if options.dtypes is not None:
        named = dict.fromkeys((label, shape) for label, shape, _ in classes)
        classes = [(*size, dtype) for size in named for dtype in options.dtypes]
    return [
        Work(case, activation, dtype, *shape, label=label)
        for i, (label, shape, dtype) in enumerate(classes)
        for j, case in enumerate(cases)
        if not options.brief or case.name in _FIRST or (i - j) % len(classes) == 0
        for activation in activations_of(case, options.activations)
    ]


def _in_force(asked: str) -> AbstractContextManager[None]:
    """The backend to check: what was asked for, here or by FUSEDMLP_BACKEND; and in a process that
    interprets Triton, the kernels, which `auto` would leave aside for CPU tensors."""
    if asked != "auto":
        return fusedmlp.backend(asked)
    if choice.chosen() == "auto" and choice.INTERPRETED and _device() == "cpu":
        return fusedmlp.backend("triton")
    return nullcontext()


def _backend_name(work: Work) -> str:
    """The backend, and whether it is interpreted: such a result says nothing of a GPU; "none" where
    what was asked for cannot run it."""
    try:
        name = choice.pick(work.case.op, torch.empty(0, dtype=work.torch_dtype, device=_device()))
    except (RuntimeError, TypeError):  # the call itself will say why
        return "none"
    return "triton (interpreter)" if name == "triton" and _device() == "cpu" else name


@functools.lru_cache(maxsize=1)
def inputs_of(work: Work, device: str) -> dict[str, Tensor]:
    """Kept for the next provider, variant or rival; `inputs_of.cache_clear()` frees them."""
    return work.case.inputs(
        work.M, work.D, work.H, work.torch_dtype, device, activation=work.activation
    )


def _numbers(error: Error) -> Record:
    fields = dataclasses.asdict(error)
    return {**fields, "worst": list(error.worst), "passed": error.passed}


def unchecked(work: Work) -> Record:
    """The check record of one piece of work on the backend in force, before anything has run."""
    return {
        "kind": "check", **work.identity(), "label": work.label, "backend": _backend_name(work),
        "variant": forced(), "device": machine.device_name(), "tensors": {}, "passed": False,
    }  # fmt: skip


def check_one(work: Work, backward: bool = True) -> Record:
    """The check record of one piece of work on the backend in force; one that raises fails.

    Results lie in memory that was filled with NaN: what a kernel does not write shows.
    """
    record = unchecked(work)
    try:
        inputs = inputs_of(work, _device())
        with poison():
            errors = judge(work.case, inputs, backward=backward, **work.options)
    except Exception as error:  # whatever it is, the next case must still be checked
        return {**record, "error": f"{type(error).__name__}: {error}"}
    tensors = {name: _numbers(error) for name, error in errors.items()}
    return {**record, "tensors": tensors, "passed": all(t["passed"] for t in tensors.values())}


def run(options: CheckOptions, emit: Emit) -> bool:
    """Judge everything in this process, one record each; True if all passed."""
    works = [(name, work) for work in plan(options) for name in options.variants]
    passed, lost = True, None
    with _in_force(options.backend), Progress("check", len(works)) as progress:
        for name, work in works:
            with variant(name):
                if lost is None:
                    record = check_one(work, options.backward)
                else:
                    record = {**unchecked(work), "error": not_run(lost)}
            if lost is None and not record["passed"] and (lost := why_lost(_device())):
                lost = f"{lost}, at {work.case.name} {work.dtype} {work.size}"
            passed = passed and record["passed"]
            emit(record)
            progress.step(f"{work.case.name} {work.dtype}")
    return passed


def judged(work: Callable[[], bool]) -> int:
    """The exit code of work that says whether all is right, and may be interrupted meanwhile: what
    is done by then is still shown."""
    try:
        return 0 if work() else 1
    except KeyboardInterrupt:
        return INTERRUPTED


def needs_interpreter(backend: str) -> bool:
    """Are the kernels asked for where only a process that interprets them can run them?"""
    asked = backend if backend != "auto" else choice.chosen()
    return _device() == "cpu" and asked in ("auto", "triton") and not choice.INTERPRETED


def run_interpreted(options: CheckOptions, emit: Emit) -> bool:
    """`run` on Triton's interpreter, in a process of its own; True if all passed.

    Raises Refusal, with the end of its output, if that process ends early.
    """
    works = plan(options)
    failed = 0
    log = Path(tempfile.mkdtemp(prefix="fusedmlp-bench-")) / "check.log"
    with Progress("check (interpreter)", len(works)) as progress:

        def receive(records: list[Record]) -> None:
            nonlocal failed
            for record in records:
                failed += not record["passed"]
                emit(record)
                progress.step(f"{record['case']} {record['dtype']}")

        try:
            outcome = process.run(
                [sys.executable, "-m", "fusedmlp.bench", *_arguments(options)],
                INTERPRETER_LIMIT_S, receive, log, env=interpreter_env(), cwd=machine.ROOT,
            )  # fmt: skip
        except KeyboardInterrupt:
            shutil.rmtree(log.parent)
            raise
        done = progress.done
    if done != len(works):
        raise Refusal(
            f"the interpreted check ended after {done} of {len(works)} cases "
            f"({outcome.status}); its output is in {log}:\n{outcome.detail}"
        )
    shutil.rmtree(log.parent)
    return failed == 0


def interpreter_env() -> dict[str, str]:
    """The environment of a child that runs Triton's interpreter on this very package; it starts in
    machine.ROOT, since a child's own folder comes before PYTHONPATH."""
    path = [str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}


def _arguments(options: CheckOptions, backend: str = "triton") -> Iterator[str]:
    yield from ("check", "--backend", backend, "--case", *options.cases)
    if options.dtypes is not None:
        yield from ("--dtype", *options.dtypes)
    if options.activations is not None:
        yield from ("--activation", *options.activations)
    if options.shapes:
        yield from ("--shape", *("x".join(map(str, shape)) for shape in options.shapes))
    if not options.backward:
        yield "--forward-only"
    if options.brief:
        yield "--brief"


def check(options: CheckOptions, emit: Emit) -> bool:
    """Check the kernels where they can run: here, or in an interpreting child."""
    if "cuda" in (options.backend, choice.chosen()) and not capability_of(torch.device(_device())):
        raise Refusal("the backend cuda needs a GPU; tests/simt runs its kernels on the host")
    if needs_interpreter(options.backend):
        return run_interpreted(options, emit)
    return run(options, emit)


HEADER = (
    "case", "activation", "dtype", "M x D x H", "worst", "of bound", "rel. L2", "max", "eager max",
    "max allowed", "rms", "eager rms", "",
)  # fmt: skip
# What a narrow terminal does without, the least needed first.
DROP = ("eager rms", "rms", "max allowed", "activation", "rel. L2", "eager max", "max", "worst",
        "M x D x H")  # fmt: skip


def go_on(options: CheckOptions, records: Sequence[Record]) -> None:
    """Print the command that checks what an interrupt left unchecked, whole cases at a time."""
    keys = ("case", "activation", "dtype", "M", "D", "H")
    done = Counter(tuple(r[key] for key in keys) for r in records if r["kind"] == "check")
    left = []
    for work in plan(options):
        who = work.identity()
        if done[tuple(who[key] for key in keys)] < len(options.variants):
            left.append(work.case.name)
    if not left:
        return
    cases = tuple(dict.fromkeys(left))
    words = [*_arguments(dataclasses.replace(options, cases=cases), options.backend)]
    if options.variants != (None,):
        words += ["--variant", *map(str, options.variants)]
    say_command("Go on with:", [*PROG.split(), *words])


def show(records: Sequence[Record], complete: bool = True) -> None:
    """The error table: of each record the tensor nearest to its bound, or furthest past it; then
    what failed and how many."""
    if records:
        backends = ", ".join(dict.fromkeys(r["backend"] for r in records))
        devices = ", ".join(dict.fromkeys(r["device"] for r in records))
        table(
            f"Errors against float64; backend {backends}, device {devices}",
            HEADER, [_row(r) for r in records], drop=DROP,
        )  # fmt: skip
        for line in glance.failures(records):
            say(line)
        if backends == "reference":
            print("The reference is eager PyTorch itself: this says nothing of the kernels.")
    say(glance.count(records, complete))


def _row(r: Record) -> list[str]:
    worst = max(r["tensors"], key=lambda name: glance.strain(r["tensors"][name]), default=None)
    tensor = {} if worst is None else r["tensors"][worst]
    figures = [
        number(tensor.get(field))
        for field in ("relative_l2", "max", "eager_max", "max_bound", "rms", "eager_rms")
    ]
    shape = f"{r['M']}x{r['D']}x{r['H']}"
    where = f"{r['label']} {shape}" if r.get("label") else shape
    where += f", {r['variant']}" if r.get("variant") else ""
    share = glance.percent(glance.strain(tensor)) if tensor else "-"
    verdict = "pass" if r["passed"] else "FAIL"
    return [r["case"], r["activation"], r["dtype"], where, worst or "-", share, *figures, verdict]


def options_of(args: argparse.Namespace) -> CheckOptions:
    cases = chosen_cases(args)
    shapes = list(args.shape)
    for model in args.model:
        shapes += [(2048, model.D, model.H), (16, model.D, model.H)]
    return CheckOptions(
        cases=tuple(CASES) if cases is None else cases,
        dtypes=tuple(args.dtype) if args.dtype else None,
        activations=chosen_activations(args),
        shapes=tuple(shapes),
        backend=args.backend,
        variants=tuple(args.variant or (None,)),
        backward=not args.forward_only,
        brief=args.brief,
    )


def main(args: argparse.Namespace) -> int:
    options = options_of(args)
    if args.variant and args.backend != "cuda":
        raise Refusal("check --variant is of the CUDA kernels: it needs --backend cuda")
    if args.model and _device() == "cpu":
        raise Refusal("check --model needs a GPU for such widths; --shape takes smaller ones")
    records: list[Record] = []
    code = judged(lambda: check(options, collecting(records)))
    show(records, code != INTERRUPTED)
    if code == INTERRUPTED:
        go_on(options, records)
    # Whoever asks a machine what it is waits for nvidia-smi.
    write_json(args.json, machine.describe() if args.json else {}, records)
    return code


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparser(
        subparsers, "check", "errors against float64 beside eager's, pass or fail by one rule",
        (
            "check",
            "check --op gated_linear gated_mlp --activation all",
            "check --case gated_mlp --shape 64x64x96 --dtype float32 bfloat16",
            "check --model llama3-8b --json errors.json",
            f"check --backend cuda --op gated_linear --variant {VARIANTS[0]}",
        ),
        main,
    )  # fmt: skip
    add_selection(parser)
    parser.add_argument(
        "--backend", choices=choice.BACKENDS, default="auto",
        help="default: the GPU's kernels, or without a GPU the kernels in Triton's interpreter",
    )  # fmt: skip
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, metavar="NAME",
        help=f"of the CUDA kernels; default: their own choice. On sm_90a: {', '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--forward-only", action="store_true", help="no gradients")
    parser.add_argument(
        "--brief", action="store_true",
        help="of each op one case at every size, each other case at one of them",
    )  # fmt: skip
