"""`patch-sweep`: what patch() does to every model type of transformers, as a page.

Of each type one model is built of its own configuration class, small, on the CPU where that goes
and on the meta device where it does not. Every kind of patched dense block is run beside its own
forward. A row is kept as it is found, so a command that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fusedmlp

from ..options import count, need, subparser, writable, write_text
from .patch_sweep_models import built, difference

ROOT = Path(fusedmlp.__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "patch_sweep.md", ROOT / "build" / "patch_sweep.jsonl"
HEAD = """\
# Model types of transformers, patched

`make patch-sweep` wrote this page with transformers {version}: {all} model types, {fused} of them
with a fused block, {silent} without a line in the report. Of each, one model was built of its own
configuration class, small where its configuration allows, and patched in float32 on a CPU, where
the PyTorch reference runs. [Speed up my model](patch.md) says what the words mean.

* Lines: of the report; fused, in part and left add up to them.
* Error: the largest difference between a patched dense block and its own forward, in eval and in
  training, relative to the largest output or 1. Experts have theirs on [their page](models.md).
  None where a model was too large to have values, or a block needs more than x.
* Left: how many lines and why; one reason may stand for many layers.

| model type | lines | fused | in part | left | error | why left |
|---|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """failed: why no model was built, or why its blocks were not run."""

    kind: str
    lines: int = 0
    fused: int = 0
    partly: int = 0
    left: dict[str, int] = {}  # noqa: RUF012 - never written
    error: float | None = None
    failed: str = ""

    def line(self) -> str:
        why = "; ".join(f"{n} {reason}" for reason, n in self.left.items()) or self.failed
        error = "" if self.error is None else f"{self.error:.0e}"
        cells = (self.kind, self.lines, self.fused, self.partly, sum(self.left.values()), error)
        return f"| {' | '.join(map(str, cells))} | {_cell(why)} |"


def _cell(text: str) -> str:
    """Without what a table or emphasis is made of."""
    return re.sub(r"([_*])", r"\\\1", re.sub(r"\s+", " ", text).replace("|", "/"))


class Late(BaseException):
    """No Exception: whatever suppresses those must not go on."""


def row(kind: str, cls: Any, model_class: Any) -> Row:
    model = built(cls, model_class)
    if model is None:
        return Row(kind, failed="no model could be built of its configuration's defaults")
    report = fusedmlp.patch(model)
    partly = len(report.partly)
    reasons = (f"{e.kind}: {e.detail}" for e in report.left if not e.partly)
    found = Row(kind, len(report.entries), len(report.patched) - partly, partly, Counter(reasons))
    try:
        return found._replace(error=difference(model))
    except Exception:  # a block that cannot be called on x alone
        return found


def _limited(kind: str, seconds: int) -> Row | None:
    """None for a type without a model of its own."""
    from transformers import MODEL_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        cls: Any = CONFIG_MAPPING[kind]
        model_class: Any = MODEL_MAPPING[cls]
    except (KeyError, ValueError):  # some are mapped to names that transformers does not have
        return None
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    torch.manual_seed(0)
    signal.setitimer(
        signal.ITIMER_PROF, seconds
    )  # of this process alone, however loaded the machine
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return row(kind, cls, model_class)
    except Late:
        return Row(kind, failed=f"not done in {seconds} s")
    except Exception as problem:
        return Row(kind, failed=f"{type(problem).__name__}: {problem}".partition("\n")[0][:150])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _digest() -> str:
    """What rows hang on: rows of other sources are found anew."""
    import transformers

    text = f"{transformers.__version__} {torch.__version__}".encode()
    sources = sorted((ROOT / "fusedmlp" / "patching").glob("*.py"))
    return hashlib.sha256(b"".join([text, *(p.read_bytes() for p in sources)])).hexdigest()[:12]


def _kept(digest: str) -> dict[str, Row | None]:
    if not KEPT.exists():
        return {}
    records = map(json.loads, KEPT.read_text(encoding="utf-8").splitlines())
    return {
        r["kind"]: None if r["row"] is None else Row(*r["row"])
        for r in records
        if r["digest"] == digest
    }


def rows(kinds: Sequence[str], seconds: int) -> Iterator[Row]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGPROF, late)
    digest = _digest()
    known = _kept(digest)
    KEPT.parent.mkdir(exist_ok=True)
    for kind in kinds or list(CONFIG_MAPPING):
        if kind not in known:
            known[kind] = _limited(kind, seconds)
            record = {"kind": kind, "digest": digest, "row": known[kind]}
            with KEPT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if (found := known[kind]) is not None:
            yield found


def page(found: Sequence[Row]) -> str:
    import transformers

    head = HEAD.format(
        version=transformers.__version__,
        all=len(found),
        fused=sum(bool(r.fused + r.partly) for r in found),
        silent=sum(not r.lines and not r.failed for r in found),
    )
    return head + "".join(f"{r.line()}\n" for r in found)


def main(args: argparse.Namespace) -> int:
    need("transformers", "patch-sweep's models")
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for r in rows(args.types, args.seconds):
        print(r.line(), flush=True)
        found.append(r)
    if not args.types:
        write_text(args.page, page(found))
    return 0


def register(subparsers: Any) -> None:
    parser = subparser(
        subparsers,
        "patch-sweep",
        "what patch() does to every model type of transformers; writes docs/patch_sweep.md",
        ("patch-sweep", "patch-sweep llama bert"),
        main,
    )
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="model types to print; default: all, and the page"
    )
    parser.add_argument(
        "--seconds", type=count, default=120, help="of CPU time for one type; default: 120"
    )
    parser.add_argument(
        "--page", type=writable, default=str(PAGE), help="default: the page in docs"
    )
