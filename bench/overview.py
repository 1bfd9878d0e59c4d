"""No subcommand: what is here, whether the kernels are right, and how fast they are or could be."""

from __future__ import annotations

import argparse

import torch

import fusedmlp

from . import check, machine, predict
from .options import Record, add_json, add_model, collecting, write_json
from .render import number
from .shapes import DEFAULT_MODEL, DENSE, Model, cases_of
from .timing import command as timing
from .timing.session import Options, plan
from .work import PHASES

TOKENS = 4096
PROVIDERS = ("fusedmlp", "eager", "compile")


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
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


def check_options(models: list[Model]) -> list[check.Options]:
    """Every case at the sizes that try the kernels most; on a GPU the models' own calls as well."""
    chosen = [check.Options()]
    if torch.cuda.is_available():
        chosen += [
            check.Options(
                cases=cases_of(model),
                dtypes=("bfloat16",),
                activations=(model.activation,),
                shapes=((2048, model.D, model.H),),
            )
            for model in models
        ]
    return chosen


def main(args: argparse.Namespace) -> int:
    records: list[Record] = []
    emit = collecting(records)
    found = machine.describe()
    models = args.model or [DENSE[DEFAULT_MODEL]]
    print(*machine.lines(found), sep="\n")
    print(fusedmlp.explain())
    passed = True
    for options in check_options(args.model):
        passed = check.check(options, emit) and passed
    check.show(records)
    if torch.cuda.is_available():
        seen = []
        for model in models:
            seen += timing.run(options_for(model), emit)
        found["sm_clocks_while_timing"] = timing.clock_range(seen)
        timing.show([r for r in records if r["kind"] != "check"])
        _headlines(records)
    else:
        if args.model:
            print("The interpreter bears small sizes only: the models' widths are used below.")
        for model in models:
            for work in plan(options_for(model)):
                for phase in PHASES:
                    for record in predict.predict(work, phase):
                        emit(record)
        predict.show([r for r in records if r["kind"] == "predict"])
        print(
            "\nNothing was timed: torch finds no GPU. The times above are computed from "
            "datasheets: no kernel can beat them, most will not reach them."
        )
    write_json(args.json, found, records)
    return 0 if passed else 1


def _headlines(records: list[Record]) -> None:
    """fusedmlp against the best of the others, one line per case and phase."""
    times = [r for r in records if r["kind"] == "time" and r["skipped"] is None]
    for ours in (r for r in times if r["provider"] == "fusedmlp"):
        same = ("case", "phase", "dtype", "activation", "M", "D", "H")
        rivals = [
            r for r in times
            if r["provider"] != "fusedmlp" and all(r[field] == ours[field] for field in same)
        ]  # fmt: skip
        if rivals:
            best = min(rivals, key=lambda r: r["median_ms"])
            ratio = best["median_ms"] / ours["median_ms"]
            print(
                f"{ours['case']} {ours['phase']}, {ours['M']}x{ours['D']}x{ours['H']}: "
                f"{number(ratio)} times the speed of {best['provider']}"
            )
