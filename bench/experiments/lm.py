"""`lm`: how well MLPs learn, at equal weights and equal tokens, in a language model over bytes.

The text is the source of Python's own standard library, which is on every machine. `--out` holds
results.json, its page and plots, and in checkpoints/ a file a run: what was stopped, by --minutes
or otherwise, goes on from its file when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...progress import Progress
from .. import machine, process, render
from ..options import (
    INTERRUPTED,
    SCHEMA,
    Refusal,
    add_device,
    check_device,
    count,
    need,
    positive,
    subparser,
    write_text,
)
from ..report import plots
from . import lm_page
from .lm_attention import MIXERS
from .lm_models import MLPS, ModelPlan, names
from .lm_train import Record, Run, digest, text

TITLE = "Held-out loss"
# What a narrow terminal does without, the least needed first.
DROP = ("mask logits", "by seed", "lower in", "MLP weights")
GO_ON = "the same command goes on from the checkpoints"


def read(folder: Path) -> list[Record]:
    path = folder / "results.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from error
    records = found.get("records") if isinstance(found, dict) else None
    if isinstance(records, list) and all(map(_is_own, records)):
        return records
    raise Refusal(f"{path}: expected a file that `lm` wrote")


def _is_own(record: object) -> bool:
    return (
        isinstance(record, dict) and record.get("kind") == "lm" and record.keys() >= lm_page.NEEDED
    )


def _identity(record: Record) -> tuple[Any, ...]:
    plan = tuple(record.get(field.name) for field in dataclasses.fields(ModelPlan))
    return (*plan, record.get("hidden"), record["text"], record["device"] == "cpu")


def add(folder: Path, record: Record) -> None:
    """Into results.json, in place of an earlier record of the same run; ordered by model."""
    kept = [r for r in read(folder) if _identity(r) != _identity(record)]
    order = names(MLPS)
    place = lambda r: order.index(r["mlp"]) if r["mlp"] in order else -1  # noqa: E731
    records = sorted([*kept, record], key=lambda r: (place(r), r["mlp"], r["mixer"], r["seed"]))
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "results.json.part"
    lines = ",\n".join(json.dumps(r) for r in records)
    unfinished.write_text(f'{{"schema": {SCHEMA}, "records": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(unfinished, folder / "results.json")


def checkpoint(folder: Path, plan: ModelPlan) -> Path:
    """The file of one run: its name tells the plan's other fields by a digest."""
    fields = json.dumps(dataclasses.asdict(plan), sort_keys=True)
    number = digest(torch.frombuffer(bytearray(fields.encode()), dtype=torch.uint8))[:8]
    return folder / "checkpoints" / f"{plan.model}-{plan.seed}-{number}.safetensors"


def plans(args: argparse.Namespace) -> list[ModelPlan]:
    fields = {f.name for f in dataclasses.fields(ModelPlan)} & vars(args).keys()
    shared = {name: getattr(args, name) for name in fields - {"mlp"}}
    if args.dim % (2 * args.heads):
        raise Refusal(f"--dim must be a multiple of 2 * --heads, got {args.dim} and {args.heads}")
    return [ModelPlan(mlp=mlp, seed=s, **shared) for s in range(args.seeds) for mlp in args.mlp]


def train(wanted: Sequence[ModelPlan], args: argparse.Namespace) -> int:
    """Run what results.json does not have; how many runs the deadline left unfinished."""
    check_device(args.device)
    need("safetensors", "checkpoints")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--out {args.out}: {error.strerror}") from error
    commit = machine.commit()  # before results are written, which would make the checkout dirty
    data = text()
    about = {"text": digest(data), "device": args.device}
    done = {_identity(record) for record in read(args.out)}
    left = [p for p in wanted if _identity(dataclasses.asdict(p) | about) not in done]
    deadline = time.monotonic() + 60 * args.minutes
    steps = sum(plan.steps for plan in left)
    with process.interrupt_asked() as asked, Progress("lm", steps) as progress:
        for i, plan in enumerate(left):
            path = checkpoint(args.out, plan)
            here = data, args.device
            run = Run.load(path, *here) if path.exists() else Run(plan, *here)
            if commit is not None and commit not in run.commits:
                run.commits.append(commit)
            name = f"{plan.model}, seed {plan.seed}"
            for _ in range(run.step):
                progress.step(name)
            over = lambda: asked.is_set() or time.monotonic() > deadline  # noqa: E731
            run.go_on(over, lambda run, path=path: run.save(path),  # type: ignore[misc]
                      lambda name=name: progress.step(name))  # type: ignore[misc]  # fmt: skip
            if run.finished:
                add(args.out, run.record())
            if asked.is_set():
                raise KeyboardInterrupt
            if not run.finished:
                return len(left) - i
    return 0


def report(folder: Path) -> None:
    records = read(folder)
    for _, models in lm_page.comparisons(records):
        render.table(TITLE, *lm_page.cells(models), drop=DROP)
    if not records:
        return
    write_text(folder / "table.md", lm_page.markdown(records))
    drawn = lm_page.plots(records)
    plots.write(drawn, folder)
    print(*(f"wrote {folder / plot.name}.svg" for plot in drawn), sep="\n")


def main(args: argparse.Namespace) -> int:
    wanted = plans(args)
    need("matplotlib", "plots")
    if args.report and not (args.out / "results.json").exists():
        raise Refusal(f"{args.out}: expected a folder with a results.json that `lm` wrote")
    try:
        unfinished = 0 if args.report else train(wanted, args)
    except KeyboardInterrupt:
        report(args.out)
        kept = [f"  {path}" for path in map(functools.partial(checkpoint, args.out), wanted)
                if path.exists()]  # fmt: skip
        print(f"interrupted: {GO_ON}" if kept else "interrupted before the first step")
        print(*kept, sep="\n")
        return INTERRUPTED
    report(args.out)
    if not args.report:
        print(f"results: {args.out / 'results.json'}, checkpoints: {args.out / 'checkpoints'}")
    if unfinished:
        print(f"{unfinished} of {len(wanted)} runs unfinished: {GO_ON}")
    return 0


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "lm",
        "train a small language model with one MLP after another, at equal weights",
        (
            "lm --minutes 30   # the first four; again to go on",
            "lm --mlp swiglu mswiglu-1 switch-4 --seeds 1 --steps 500 --out /tmp/lm",
            "lm --device cuda --dim 384 --heads 6 --layers 6 --batch 64 --dtype bfloat16",
            "lm --report --out bench/results/lm   # no training",
        ),
        main,
    )
    parser.add_argument(
        "--mlp", nargs="+", choices=names(MLPS), default=names(MLPS)[:4], metavar="NAME",
        help=f"of {', '.join(names(MLPS))}; default: the first four",
    )  # fmt: skip
    parser.add_argument("--mixer", choices=names(MIXERS), default=ModelPlan.mixer)
    parser.add_argument("--seeds", type=count, default=3, help="runs of each; default: 3")
    for name in ("layers", "dim", "heads", "context", "batch", "steps"):
        value = getattr(ModelPlan, name)
        parser.add_argument(f"--{name}", type=count, default=value, help=f"default: {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=ModelPlan.dtype,
                        help="bfloat16: by autocast")  # fmt: skip
    add_device(parser)
    parser.add_argument("--minutes", type=positive, default=math.inf, help="stop after so many")
    parser.add_argument("--out", type=Path, default=Path("lm"), metavar="DIR",
                        help="of results, page, plots and checkpoints; default: lm, in the "
                        "current folder")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="train nothing: page and plots")
