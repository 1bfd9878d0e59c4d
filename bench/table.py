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

from . import _render, machine, toy
from ._options import Refusal, add_json, count, subparser, write_json
from .toy_rows import Build, Row, count_text, models, rows

TITLE = "Training Verification Summary"
STYLES = {"Success": "green", "FAIL": "red"}

Record = dict[str, Any]


def record_of(row: Row, runs: Sequence[toy.Run], failure: str | None, compiled: bool) -> Record:
    published = row.published
    return {
        "kind": "toy",
        "model": row.model,
        "configuration": row.build.label(),
        "params": row.build.count() if failure is None else None,
        "compile": compiled,
        "threads": torch.get_num_threads(),
        "note": row.note,
        "runs": [dataclasses.asdict(run) for run in runs],
        "failure": failure,
        "published": None if published is None else dataclasses.asdict(published),
    }


def _trained(
    build: Build, args: argparse.Namespace, step: Callable[[], None]
) -> tuple[list[toy.Run], str | None]:
    """All seeds of one configuration, or why it failed."""
    runs: list[toy.Run] = []
    try:
        for seed in range(args.seeds):
            runs.append(toy.train(build, seed, args.steps, args.compile, args.device))
            step()
    except Exception as error:  # one broken layer must not cost the others' rows
        return [], f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return runs, None


def run(chosen: Sequence[Row], args: argparse.Namespace) -> list[Record]:
    """Train each configuration once, however many rows have it."""
    builds: list[Build] = []
    for row in chosen:
        if row.build not in builds:
            builds.append(row.build)
    outcomes = []
    with _render.Progress("table", len(builds) * args.seeds) as progress:
        for build in builds:
            step = functools.partial(progress.step, f"{build.layer} {build.label()}")
            outcomes.append(_trained(build, args, step))
    return [record_of(row, *outcomes[builds.index(row.build)], args.compile) for row in chosen]


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
        row += [published["params"], f"{published['loss']:.6f}", difference]
    return [*row, "FAIL" if record["failure"] else "Success", remarks(record, compare)]


def markdown(found: Record) -> str:
    """The whole page for a file that `table --json` wrote."""
    where, records = found["machine"], found["records"]
    header, body = cells(records, compare=True)
    seeds = max((len(record["runs"]) for record in records), default=0)
    lines = [
        "# The toy table",
        "",
        f"Generated by `python -m fusedmlp.bench table --from {SOURCE}`; do not edit. The task and "
        "recipe of mlp_utils' README: 501 steps of Adam on y = sin(x) + cos(2 x) / 2 + noise. "
        f"Losses are means of {seeds} seeds ± half their range; mlp_utils' are of one run. Final "
        "Loss is the last training step's, in training mode, with dropout and auxiliary losses; "
        "Eval Loss is the squared error alone in eval mode on new data. Runtime includes compiling "
        "and says nothing of kernels: these layers are tiny.",
        "",
        f"{where['gpu'] or 'CPU only'}, torch {where['torch']}, fusedmlp {where['fusedmlp']}, "
        f"commit {where['commit']}.",
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
    if {record.get("kind") for record in found.get("records", [])} != {"toy"}:
        raise Refusal(f"{path}: expected a file that `table --json` wrote")
    return found


def main(args: argparse.Namespace) -> int:
    if args.source is not None:
        found = read(args.source)
    else:
        chosen = [
            row for row in rows(args.published) if args.model is None or row.model in args.model
        ]
        found = {"machine": machine.describe(), "records": run(chosen, args)}
        write_json(args.json, found["machine"], found["records"])
    records = found["records"]
    _render.table(TITLE, *cells(records, args.compare), styles=STYLES)
    if args.markdown is not None:
        Path(args.markdown).write_text(markdown(found), encoding="utf-8")
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
            f"table --json {SOURCE} --markdown table.md",
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
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--compare", action="store_true", help="mlp_utils' own figures beside ours")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    parser.add_argument(
        "--from", metavar="FILE", dest="source", help="train nothing: print what --json wrote"
    )
    add_json(parser)
