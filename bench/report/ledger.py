"""The ledger: one JSON file per campaign in bench/results/, the source of every published number.

    <gpu>-<date>-<commit>[-<n>].json = {"schema", "machine", "commit", "date", "steps", "records"}

| kind of record | says |
|---|---|
| check | errors of one case's output and gradients against the tolerance rule |
| time | one provider's median for one case and phase, or why it was not timed |
| peak | what the same GPU reached in cuBLAS and in a device copy, in the same run |
| sanitizer | what one tool said of one case |
| tune | the fastest tile found for one kernel and shape, against the table's |
| tile | one tile that a search timed, or why it could not |
| answer | what the GPU said to one question of bench/campaign/questions.py |

A ledger is validated when it is loaded, and what is added to it before it is added. A file is
replaced by its own campaign alone. Numbers may be infinite in check records (as JSON's common
extension `Infinity`): a kernel that returned NaN has an infinite error, which must stay on record.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
# The name of the GPU in ledgers made up for tests.
MADE_UP = "Synthetic"
RESULTS = Path(__file__).resolve().parents[1] / "results"
STATUSES = ("ok", "failed", "killed", "skipped")
PHASES = ("forward", "backward", "both", "dglu")

Record = dict[str, Any]

_TEXT = (str,)
_COUNT = (int,)
_NUMBER = (int, float)
_NULL = (type(None),)
_SIZES = {"M": _COUNT, "D": _COUNT, "H": _COUNT}
_MEASURED = ("median_ms", "q20_ms", "q80_ms", "tflops", "gbps", "of_cublas", "of_copy")
_TENSOR = ("max", "rms", "relative_l2", "eager_max", "eager_rms", "max_bound", "rms_bound")

# kind -> field -> types. A field that a kind does not name here is kept and not looked at.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "check": {
        "case": _TEXT, "op": _TEXT, "activation": _TEXT, "dtype": _TEXT, **_SIZES,
        "backend": _TEXT, "device": _TEXT, "tensors": (dict,), "passed": (bool,),
    },
    "time": {
        "case": _TEXT, "op": _TEXT, "provider": _TEXT, "phase": _TEXT, "activation": _TEXT,
        "dtype": _TEXT, **_SIZES, "model": _TEXT + _NULL, "flops": _NUMBER + _NULL,
        "bytes": _NUMBER + _NULL, **dict.fromkeys(_MEASURED, _NUMBER + _NULL),
        "peak_memory_bytes": _NUMBER + _NULL, "skipped": _TEXT + _NULL,
    },
    "peak": {"name": _TEXT, "dtype": _TEXT, "tflops": _NUMBER + _NULL, "gbps": _NUMBER + _NULL},
    "sanitizer": {"tool": _TEXT, "case": _TEXT, "status": _TEXT, "detail": _TEXT},
    "tune": {
        "arch": _TEXT, "kernel": _TEXT, "dtype": _TEXT, **_SIZES, "tile": (dict,),
        "median_ms": _NUMBER, "table_ms": _NUMBER,
    },
    "tile": {
        "arch": _TEXT, "kernel": _TEXT, "dtype": _TEXT, "shapes": (list,), "tile": (dict,),
        "median_ms": _NUMBER + _NULL, "skipped": _TEXT + _NULL,
    },
    "answer": {"question": _TEXT, "text": _TEXT, "answer": _TEXT, "detail": _TEXT},
}  # fmt: skip

# kind -> the fields that tell two records apart; a later record with the same values replaces.
# Ledgers from before the CUDA kernels name no variant, and no backend of a sanitizer.
_IDENTITY: dict[str, tuple[str, ...]] = {
    "check": ("case", "activation", "dtype", "M", "D", "H", "backend", "device", "variant"),
    "time": ("case", "provider", "phase", "activation", "dtype", "M", "D", "H"),
    "peak": ("name", "dtype", "M", "N", "K", "bytes"),
    "sanitizer": ("tool", "case", "backend"),
    "tune": ("arch", "kernel", "dtype", "M", "D", "H"),
    "tile": ("arch", "kernel", "dtype", "shapes", "tile"),
    "answer": ("question",),
}


class LedgerError(ValueError):
    """One fault of one ledger: file, field, expected, got."""


@dataclasses.dataclass
class Ledger:
    """machine: what machine.py found, "gpu" at least. steps, records: as they ended."""

    machine: dict[str, Any]
    commit: str
    date: str
    steps: list[Record] = dataclasses.field(default_factory=list)
    records: list[Record] = dataclasses.field(default_factory=list)
    path: Path | None = None

    @property
    def gpu(self) -> str:
        return str(self.machine["gpu"])

    def of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind]

    def add_record(self, record: Record) -> None:
        """Append, in place of an earlier record of the same thing (a step that was run again)."""
        check_record(record, "record")
        key = identity(record)
        self.records = [r for r in self.records if identity(r) != key]
        self.records.append(record)

    def add_step(self, name: str, status: str, seconds: float, detail: str) -> None:
        self.steps = [s for s in self.steps if s["name"] != name]
        step = {"name": name, "status": status, "seconds": round(seconds, 2), "detail": detail}
        _check_step(step, "step")
        self.steps.append(step)

    def text(self) -> str:
        fields = {
            "schema": SCHEMA,
            "machine": self.machine,
            "commit": self.commit,
            "date": self.date,
            "steps": self.steps,
            "records": self.records,
        }
        # A line per record keeps diffs and greps usable without an indent per number.
        head = {k: fields[k] for k in ("schema", "machine", "commit", "date")}
        lists = (
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]"
            for name, items in (("steps", self.steps), ("records", self.records))
        )
        return json.dumps(head, indent=1)[:-2] + ",\n" + ",\n".join(lists) + "\n}\n"


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the record is about, without what it found."""
    kind = record["kind"]
    return (kind, *(record.get(name) for name in _IDENTITY[kind]))


def _must(good: bool, where: str, expected: str, got: Any) -> None:
    if not good:
        raise LedgerError(f"{where}: expected {expected}, got {got!r}")


def _typed(value: Any, types: tuple[type, ...]) -> bool:
    """isinstance, but a bool is no number, and NaN is nothing."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) and not (isinstance(value, float) and math.isnan(value))


def _check_fields(item: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    _must(isinstance(item, dict), where, "an object", item)
    for name, types in fields.items():
        if name not in item:
            raise LedgerError(f"{where}.{name}: expected the field, got nothing")
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        _must(_typed(item[name], types), f"{where}.{name}", expected, item[name])
        if isinstance(item[name], (int, float)):
            _must(item[name] >= 0, f"{where}.{name}", "a number >= 0", item[name])


def _check_step(step: Any, where: str) -> None:
    fields = {"name": _TEXT, "status": _TEXT, "seconds": _NUMBER, "detail": _TEXT}
    _check_fields(step, fields, where)
    _must(step["status"] in STATUSES, f"{where}.status", " or ".join(STATUSES), step["status"])


def check_record(record: Any, where: str) -> None:
    """Raise LedgerError unless `record` has every field of its kind, typed and in range."""
    _must(isinstance(record, dict), where, "an object", record)
    kind = record.get("kind")
    _must(kind in _FIELDS, f"{where}.kind", " or ".join(_FIELDS), kind)
    _check_fields(record, _FIELDS[kind], where)
    if kind == "check":
        _check_tensors(record["tensors"], f"{where}.tensors")
        # A case that raised has no tensors and did not pass.
        earned = bool(record["tensors"]) and all(t["passed"] for t in record["tensors"].values())
        _must(earned or not record["passed"], f"{where}.passed", "false, as its tensors", True)
    elif kind == "time":
        _check_time(record, where)
    elif kind == "peak":
        sizes = ("M", "N", "K") if record["name"] == "cublas" else ("bytes",)
        rate = "tflops" if record["name"] == "cublas" else "gbps"
        known = record["name"] in ("cublas", "copy")
        _must(known, f"{where}.name", "cublas or copy", record["name"])
        _check_fields(record, dict.fromkeys(sizes, _COUNT) | {rate: _NUMBER}, where)
    elif kind == "sanitizer":
        good = record["status"] in STATUSES
        _must(good, f"{where}.status", " or ".join(STATUSES), record["status"])
    if kind != "check":
        for name, value in record.items():
            _must(value != math.inf, f"{where}.{name}", "a finite number", value)


def _check_tensors(tensors: dict[str, Any], where: str) -> None:
    fields: dict[str, tuple[type, ...]] = {**dict.fromkeys(_TENSOR, _NUMBER), "passed": (bool,)}
    for name, tensor in tensors.items():
        _check_fields(tensor, fields, f"{where}.{name}")


def _check_time(record: Record, where: str) -> None:
    phase = record["phase"]
    _must(phase in PHASES, f"{where}.phase", " or ".join(PHASES), phase)
    timed = record["skipped"] is None
    if timed:
        for name in ("median_ms", "q20_ms", "q80_ms"):
            good = record[name] is not None and record[name] > 0
            _must(good, f"{where}.{name}", "a number > 0, as skipped is null", record[name])
        low, mid, high = record["q20_ms"], record["median_ms"], record["q80_ms"]
        _must(low <= mid <= high, f"{where}.median_ms", f"between {low} and {high}", mid)
    else:
        for name in _MEASURED:
            _must(record[name] is None, f"{where}.{name}", "null, as it was skipped", record[name])


def _check_ledger(fields: Any, where: str) -> None:
    _must(isinstance(fields, dict), where, "an object", fields)
    _must(fields.get("schema") == SCHEMA, f"{where}: schema", str(SCHEMA), fields.get("schema"))
    top: dict[str, tuple[type, ...]] = {
        "machine": (dict,), "commit": _TEXT, "date": _TEXT, "steps": (list,), "records": (list,),
    }  # fmt: skip
    _check_fields(fields, top, f"{where}: ledger")
    dated = re.fullmatch(r"\d{4}-\d\d-\d\d", fields["date"]) is not None
    _must(dated, f"{where}: date", "YYYY-MM-DD", fields["date"])
    gpu = fields["machine"].get("gpu")
    _must(isinstance(gpu, str) and gpu != "", f"{where}: machine.gpu", "a name", gpu)
    for i, step in enumerate(fields["steps"]):
        _check_step(step, f"{where}: steps[{i}]")
    for i, record in enumerate(fields["records"]):
        check_record(record, f"{where}: records[{i}]")


def load(path: Path) -> Ledger:
    """The ledger at `path`; LedgerError names file, field, what was expected and what is there."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LedgerError(f"{path}: expected JSON, got {error}") from None
    _check_ledger(fields, str(path))
    del fields["schema"]
    known = {f.name for f in dataclasses.fields(Ledger)} - {"path"}
    _must(set(fields) <= known, f"{path}: ledger", ", ".join(sorted(known)), sorted(fields))
    return Ledger(**fields, path=path)


def load_own(path: Path) -> Ledger:
    """What --json of another command wrote, as a ledger of its times, errors and peaks."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("records"), list):
        raise LedgerError(f"{path}: expected what --json wrote, with records, got none")
    if "steps" in found:
        return load(path)
    machine = dict(found.get("machine") or {})
    machine["gpu"] = machine.get("gpu") or "no GPU"
    records = [r for r in found["records"] if isinstance(r, dict) and r.get("kind") in _FIELDS]
    for i, record in enumerate(records):
        check_record(record, f"{path}: records[{i}]")
    taken = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    return Ledger(machine, machine.get("commit") or "", taken, [], records, path)


def load_all(folder: Path = RESULTS) -> list[Ledger]:
    """Every ledger in `folder`, oldest first."""
    return sorted((load(path) for path in folder.glob("*.json")), key=_age)


def _age(ledger: Ledger) -> tuple[str, int, str]:
    assert ledger.path is not None
    tail = ledger.path.stem.removeprefix(_stem(ledger)).lstrip("-")
    return ledger.date, int(tail) if tail.isdigit() else 1, ledger.path.name


def _stem(ledger: Ledger) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", ledger.gpu.lower()).strip("-")
    dirty = "-dirty" if ledger.commit.endswith("-dirty") else ""
    return f"{gpu}-{ledger.date}-{ledger.commit.removesuffix(dirty)[:12]}{dirty}"


def _names(stem: str) -> Iterator[str]:
    yield f"{stem}.json"
    n = 2
    while True:
        yield f"{stem}-{n}.json"
        n += 1


def create(ledger: Ledger, folder: Path) -> Path:
    """Write a new file for `ledger`, under the first free name, and remember it as ledger.path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ledger.text()
    _check_ledger(json.loads(text), "new ledger")
    for name in _names(_stem(ledger)):
        try:
            # "x" and not a look beforehand: two campaigns may start at once.
            with open(folder / name, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        ledger.path = folder / name
        return ledger.path
    raise AssertionError("unreachable: there is always a next name")


def save(ledger: Ledger) -> None:
    """Replace the ledger's own file in one step: a reader sees the old or the new whole."""
    assert ledger.path is not None, "create() first"
    handle, temporary = tempfile.mkstemp(dir=ledger.path.parent, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(ledger.text())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep others from reading a result
        os.replace(temporary, ledger.path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def collect(folder: Path, made_up: bool = False) -> list[Ledger]:
    ledgers = load_all(folder)
    for ledger in ledgers:
        if not made_up and ledger.gpu.startswith(MADE_UP):
            raise LedgerError(
                f"{ledger.path}: machine.gpu: expected a real GPU, got {ledger.gpu!r}"
            )
    return ledgers
