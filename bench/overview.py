"""No command: whether the kernels are right here and how fast they are or could be, at a glance."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import fusedmlp

from . import check, glance, machine, predict
from .options import INTERRUPTED, PROG, Emit, Record, add_json, add_model, collecting, write_json
from .render import say
from .shapes import DEFAULT_MODEL, DENSE, HYPER, MOE, Model, cases_of
from .timing import command as timing
from .timing.clock import clock_range
from .timing.session import PLAIN_CASES, Options, plan
from .work import PHASES, Work, case_of

TOKENS = 4096
PROVIDERS = ("fusedmlp", "eager", "compile")
# Whose widths a family's computed times have if nobody asks for another's.
STANDARD = (DENSE[DEFAULT_MODEL], MOE["llama4-scout"], HYPER["hyperglu-16"])


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="a row for every check and time as well"
    )
    add_json(parser)
    parser.set_defaults(main=main)


def options_for(model: Model) -> Options:
    """What is timed or computed for one model: its own calls, at its widths, in bf16."""
    return Options(
        cases=None,
        widths=((model.D, model.H, model.name),),
        tokens=(TOKENS,),
        providers=PROVIDERS,
    )


def check_options(models: list[Model]) -> list[check.CheckOptions]:
    """Every case in few sizes; on a GPU the models' own calls as well."""
    chosen = [check.CheckOptions(brief=True)]
    if torch.cuda.is_available():
        chosen += [
            check.CheckOptions(
                cases=cases_of(model),
                dtypes=("bfloat16",),
                activations=(model.activation,),
                shapes=((2048, model.D, model.H),),
            )
            for model in models
        ]
    return chosen


def to_compute(models: list[Model]) -> Iterator[Work]:
    """The models' calls; if there is none, those of STANDARD, and at the dense one's widths the ops
    that no model's MLP calls but that take such widths."""
    for model in models or STANDARD:
        yield from plan(options_for(model))
    if not models:
        served = {case_of(name).op for model in STANDARD for name in cases_of(model)}
        routed = {"logits", "expert"}
        cases = [
            name for name in PLAIN_CASES
            if case_of(name).op not in served and not routed & case_of(name).shapes(8, 8, 8).keys()
        ]  # fmt: skip
        width = (STANDARD[0].D, STANDARD[0].H, STANDARD[0].name)
        yield from plan(Options(cases=tuple(cases), widths=(width,), tokens=(TOKENS,)))


def main(args: argparse.Namespace) -> int:
    records: list[Record] = []
    emit = collecting(records)
    found = machine.describe()
    for line in machine.lines(found):
        say(line)
    code = check.judged(lambda: _check_all(args.model, emit))
    on_gpu = torch.cuda.is_available()
    if code != INTERRUPTED and on_gpu:
        timed = check.judged(lambda: _time_all(args.model, found, emit))
        code = timed if timed == INTERRUPTED else code
    elif code != INTERRUPTED:
        _compute_all(args.model, emit)
    if args.verbose:
        for line in fusedmlp.explain().splitlines():
            say(line)
        check.show([r for r in records if r["kind"] == "check"], code != INTERRUPTED)
        timing.show([r for r in records if r["kind"] not in ("check", "predict")])
        predict.show([r for r in records if r["kind"] == "predict"])
    print()
    glance.show(records, code != INTERRUPTED)
    if not on_gpu:
        print("Nothing was timed: torch finds no GPU.")
    if code == INTERRUPTED:
        for options in check_options(args.model):
            check.go_on(options, records)
    glance.next_steps(_next_steps(on_gpu, args.verbose))
    write_json(args.json, found, records)
    return code


def _check_all(models: list[Model], emit: Emit) -> bool:
    passed = [check.check(options, emit) for options in check_options(models)]
    return all(passed)


def _time_all(models: list[Model], found: Record, emit: Emit) -> bool:
    seen: list[int] = []
    for model in models or STANDARD[:1]:
        seen += timing.run(options_for(model), emit)
    found["sm_clocks_while_timing"] = clock_range(seen)
    return True


def _compute_all(models: list[Model], emit: Emit) -> None:
    for work in to_compute(models):
        for phase in PHASES[:1] if work.case.forward_only else PHASES:
            for record in predict.predict(work, phase):
                emit(record)


def _next_steps(on_gpu: bool, verbose: bool) -> list[tuple[str, str]]:
    steps = [("every case at every size", f"{PROG} check")]
    if on_gpu:
        steps += [
            ("times of one op at your sizes", f"{PROG} time --op gated_mlp --shape MxDxH"),
            ("times at your model's widths", f"{PROG} --model NAME"),
        ]
    else:
        steps += [
            ("times, on a machine with a GPU", PROG),
            ("computed times of your model", f"{PROG} predict --model NAME"),
        ]
    return steps if verbose else [*steps, ("every row of this", f"{PROG} --verbose")]
