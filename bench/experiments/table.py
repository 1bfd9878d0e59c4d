"""`table`: train every layer on mlp_utils' toy task and print its README's table again.

What a label says is what is built, and the eval loss stands beside the training loss. A loss is the
mean over seeds, +- half the range between the smallest and the largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...progress import Progress
from .. import machine, render
from ..options import (
    INTERRUPTED,
    PROG,
    Refusal,
    add_device,
    add_json,
    check_device,
    count,
    subparser,
    writable,
    write_json,
    write_text,
)
from . import toy
from .toy_rows import Build, Row, count_text, models, rows

TITLE = "Training Verification Summary"
# What a narrow terminal does without, the least needed first.
DROP = ("Status", "Compile", "Runtime (s)", "mlp_utils' Params", "Remarks", "Params",
        "mlp_utils' Loss", "Final Loss", "Configuration")  # fmt: skip
STYLES = {"Success": "green", "FAIL": "red"}

Record = dict[str, Any]


def record_of(
    row: Row,
    runs: Sequence[toy.ToyRun],
    failure: str | None,
    args: argparse.Namespace,
    commit: str | None,
) -> Record:
    published = row.published
    return {
        "kind": "toy",
        "model": row.model,
        "configuration": row.build.label(),
        "params": row.build.count() if failure is None else None,
        "compile": args.compile,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "note": row.note,
        "runs": [dataclasses.asdict(run) for run in runs],
        "failure": failure,
        "published": None if published is None else dataclasses.asdict(published),
    }


def _trained(
    build: Build, args: argparse.Namespace, step: Callable[[], None]
) -> tuple[list[toy.ToyRun], str | None]:
    """All seeds of one configuration, or why it failed."""
    runs: list[toy.ToyRun] = []
    try:
        for seed in range(args.seeds):
            runs.append(toy.train(build, seed, args.steps, args.compile, args.device))
            step()
    except Exception as error:  # one broken layer must not cost the others' rows
        return [], f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return runs, None


def run(
    chosen: Sequence[Row],
    args: argparse.Namespace,
    earlier: Sequence[Record] = (),
    keep: Callable[[list[Record]], None] = lambda records: None,
) -> list[Record]:
    """Train each configuration once, however many rows have it, and none that `earlier` has.

    `keep` gets all records, in the order of mlp_utils' table, whenever there are new ones.
    """
    commit = machine.commit()  # before results are written, which would make the checkout dirty
    done = {_key(record): record for record in earlier if _serves(record, args)}
    builds: list[Build] = []
    for row in chosen:
        if _key_of(row) not in done and row.build not in builds:
            builds.append(row.build)
    with Progress("table", len(builds) * args.seeds) as progress:
        for build in builds:
            step = functools.partial(progress.step, f"{build.layer} {build.label()}")
            outcome = _trained(build, args, step)
            for row in chosen:
                if row.build == build:
                    done[_key_of(row)] = record_of(row, *outcome, args, commit)
            keep(_in_order(done, chosen))
    return _in_order(done, chosen)


def _key(record: Record) -> tuple[object, ...]:
    published = record["published"] or {}
    return record["model"], record["configuration"], published.get("loss")


def _key_of(row: Row) -> tuple[object, ...]:
    return row.model, row.build.label(), row.published and row.published.loss


def _serves(record: Record, args: argparse.Namespace) -> bool:
    """Whether a record is what these arguments would train."""
    same = (record["compile"], record["steps"]) == (args.compile, args.steps)
    return same and len(record["runs"]) == args.seeds and record["failure"] is None


def _in_order(done: dict[tuple[object, ...], Record], chosen: Sequence[Row]) -> list[Record]:
    order = dict.fromkeys(_key_of(row) for row in (*rows(), *chosen))
    return [done[key] for key in dict.fromkeys((*order, *done)) if key in done]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "N/A"
    middle = sum(values) / len(values)
    return f"{middle:.6f} ± {(max(values) - min(values)) / 2:.6f}"


def mean(record: Record, name: str) -> float | None:
    values = [run[name] for run in record["runs"]]
    return sum(values) / len(values) if values else None


def remarks(record: Record, compare: bool) -> str:
    """What a reader of the losses has to know."""
    found = [record["note"]] if record["note"] else []
    loss, of_mean = mean(record, "eval_loss"), mean(record, "mean_loss")
    if loss is not None and of_mean is not None and loss > of_mean:
        found.append(f"worse in eval than predicting the mean ({of_mean:.3f})")
    if compare and record["published"] and record["published"]["note"]:
        found.append(record["published"]["note"])
    return "; ".join([*found, *([record["failure"]] if record["failure"] else [])])


def cells(records: Sequence[Record], compare: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["Model", "Compile", "Params", "Runtime (s)", "Configuration"]
    header += ["Final Loss", "Eval Loss"]
    header += ["mlp_utils' Params", "mlp_utils' Loss", "Difference"] if compare else []
    header += ["Status", "Remarks"]
    return header, [_cells(record, compare) for record in records]


def _cells(record: Record, compare: bool) -> list[str]:
    runs, published = record["runs"], record["published"]
    seconds, final = mean(record, "seconds"), mean(record, "train_loss")
    params = "N/A" if record["params"] is None else count_text(record["params"])
    row = [record["model"], str(record["compile"]), params]
    row += ["N/A" if seconds is None else f"{seconds:.2f}", record["configuration"]]
    row += [_spread([run[name] for run in runs]) for name in ("train_loss", "eval_loss")]
    if compare and published is None:
        row += ["-", "-", "-"]
    elif compare:
        difference = "N/A" if final is None else f"{final - published['loss']:+.6f}"
        if record["steps"] != toy.STEPS:  # theirs is the loss after as many
            difference = "-"
        row += [published["params"], f"{published['loss']:.6f}", difference]
    return [*row, "FAIL" if record["failure"] else "Success", remarks(record, compare)]


def markdown(found: Record, source: str | None) -> str:
    """The whole page of what `table --json` wrote into the file `source`; None: into none."""
    where, records = found["machine"], found["records"]
    header, body = cells(records, compare=True)
    seeds = max((len(record["runs"]) for record in records), default=0)
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    steps = sorted({record["steps"] for record in records})
    recipe, trained = "task and recipe", " or ".join(map(str, steps))
    if steps != [toy.STEPS]:
        recipe = "task"
        trained += f" (its recipe has {toy.STEPS}: only after as many is there a difference)"
    made = f"--from {source}`" if source else "--markdown FILE`, and its records were not kept"
    lines = [
        "# The toy table",
        "",
        f"Generated by `{PROG} table {made}; do not edit. The {recipe} of mlp_utils' "
        f"README: {trained} steps of Adam on y = sin(x) + cos(2 x) / 2 + noise. "
        f"Losses are means of {seeds} seeds ± half their range; mlp_utils' are of one run. Final "
        "Loss is the last training step's, in training mode, with dropout and auxiliary losses; "
        "Eval Loss is the squared error alone in eval mode on new data. Runtime includes compiling "
        "and says nothing of kernels: these layers are tiny.",
        "",
        f"{where['gpu'] or 'CPU only'}, torch {where['torch']}, fusedmlp {where['fusedmlp']}, "
        f"commit {commits}.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body),
        "",
    ]
    return "\n".join(lines)


SOURCE = "bench/results/toy/table.json"


def read(path: str) -> Record:
    try:
        found: Record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: {error}") from error
    records = found.get("records", []) if isinstance(found, dict) else []
    if {record.get("kind") for record in records} != {"toy"}:
        raise Refusal(f"{path}: expected a file that `table --json` wrote")
    return found


def _trained_table(args: argparse.Namespace) -> Record:
    check_device(args.device)
    if args.resume and args.json is None:
        raise Refusal("--resume needs --json FILE, the file to go on with")
    chosen = [row for row in rows(args.published) if args.model is None or row.model in args.model]
    earlier = read(args.json)["records"] if args.resume and Path(args.json).exists() else []
    found: Record = {"machine": machine.describe(), "records": earlier, "interrupted": False}

    def keep(records: list[Record]) -> None:
        found["records"] = records
        write_json(args.json, found["machine"], records, say=False)

    try:
        found["records"] = run(chosen, args, earlier, keep)
    except KeyboardInterrupt:
        found["interrupted"] = True
    if args.json is not None:
        print(f"wrote {args.json}")
    return found


def main(args: argparse.Namespace) -> int:
    found = _trained_table(args) if args.source is None else read(args.source)
    records = found["records"]
    render.table(TITLE, *cells(records, args.compare), styles=STYLES, drop=DROP)
    if args.markdown is not None:
        write_text(args.markdown, markdown(found, args.source or args.json))
    if found.get("interrupted"):
        print("interrupted: --json FILE --resume goes on with what FILE has", file=sys.stderr)
        return INTERRUPTED
    failed = [record for record in records if record["failure"]]
    if failed:
        print(f"{len(failed)} of {len(records)} rows failed", file=sys.stderr)
    return 1 if failed else 0


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "table",
        "train every layer on mlp_utils' toy task and print its README's table again",
        (
            "table --compare",
            "table --model ngpt gmlp --seeds 1 --no-compile",
            f"table --json {SOURCE} --resume   # only what FILE does not have",
            f"table --from {SOURCE} --compare   # no training",
        ),
        main,
    )
    parser.add_argument("--model", nargs="+", choices=models(), help="only these rows")
    parser.add_argument(
        "--published", action="store_true", help="only rows that mlp_utils' README has"
    )
    parser.add_argument("--seeds", type=count, default=3, help="trainings of each row; default: 3")
    parser.add_argument("--steps", type=count, default=toy.STEPS, help="default: mlp_utils' 501")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile each layer, as mlp_utils' table has it; default: yes",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--compare", action="store_true", help="mlp_utils' own figures beside ours")
    parser.add_argument(
        "--markdown", metavar="FILE", type=writable, help="also write the table as Markdown"
    )
    parser.add_argument(
        "--from", metavar="FILE", dest="source", help="train nothing: print what --json wrote"
    )
    add_json(parser)
    parser.add_argument(
        "--resume", action="store_true", help="keep what is in --json's FILE, train the rest"
    )
