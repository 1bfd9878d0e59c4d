"""The ledger: what goes in comes out, what is wrong is named, what is there stays."""

import copy
import json
import math
from pathlib import Path

import pytest

from fusedmlp.bench.report import ledger as book
from fusedmlp.bench.report.ledger import Ledger, LedgerError

SAMPLE = Path(__file__).parents[2] / "data" / "synthetic.json"


def empty() -> Ledger:
    return Ledger({"gpu": "Synthetic GPU 1"}, "0123456789abcdef", "2000-01-01")


def first(kind: str) -> dict:
    return copy.deepcopy(book.load(SAMPLE).of_kind(kind)[0])


def test_round_trip(tmp_path):
    sample = book.load(SAMPLE)
    assert {r["kind"] for r in sample.records} == set(book._FIELDS)
    path = book.create(sample, tmp_path)
    again = book.load(path)
    assert (again.machine, again.commit, again.date) == (
        sample.machine,
        sample.commit,
        sample.date,
    )
    assert (again.steps, again.records) == (sample.steps, sample.records)


def test_the_text_is_json_with_one_line_a_record():
    sample = book.load(SAMPLE)
    text = sample.text()
    assert json.loads(text)["records"] == sample.records
    kinds = [line for line in text.splitlines() if line.strip().startswith('{"kind"')]
    assert len(kinds) == len(sample.records)
    assert json.loads(empty().text())["steps"] == []


def test_the_name_says_gpu_date_and_commit(tmp_path):
    assert book.create(empty(), tmp_path).name == "synthetic-gpu-1-2000-01-01-0123456789ab.json"
    dirty = Ledger({"gpu": "Synthetic"}, 40 * "a" + "-dirty", "2000-01-01")
    assert book.create(dirty, tmp_path).name == "synthetic-2000-01-01-aaaaaaaaaaaa-dirty.json"


def test_a_second_run_overwrites_nothing(tmp_path):
    paths = []
    for seconds in range(12):
        one = empty()
        one.add_step("tests", "ok", seconds, "")
        paths.append(book.create(one, tmp_path))
    assert len(set(paths)) == 12
    assert [book.load(p).steps[0]["seconds"] for p in paths] == list(range(12))
    # Oldest first, although "-10" sorts before "-2" as text.
    assert [one.steps[0]["seconds"] for one in book.load_all(tmp_path)] == list(range(12))


def test_save_replaces_its_own_file_and_leaves_no_other(tmp_path):
    one = empty()
    path = book.create(one, tmp_path)
    one.add_record(first("peak"))
    book.save(one)
    assert len(book.load(path).records) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    one = empty()
    path = book.create(one, tmp_path)
    before = path.read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(book.os, "replace", full)
    one.add_record(first("peak"))
    with pytest.raises(OSError, match="no space"):
        book.save(one)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_of_the_same_thing_replaces():
    one, record = empty(), first("time")
    one.add_record(record)
    one.add_record({**record, "median_ms": record["q80_ms"]})
    one.add_record({**record, "M": record["M"] + 1})
    assert [r["median_ms"] for r in one.records] == [record["q80_ms"], record["median_ms"]]


CHANGES = [
    ("time", {"median_ms": "1"}, "median_ms: expected int or float or null, got '1'"),
    ("time", {"median_ms": True}, "median_ms: expected int or float or null, got True"),
    ("time", {"median_ms": math.nan}, "median_ms: expected"),
    ("time", {"tflops": math.inf}, "tflops: expected a finite number, got inf"),
    ("time", {"median_ms": None}, "median_ms: expected a number > 0, as skipped is null"),
    ("time", {"skipped": "no time"}, "median_ms: expected null, as it was skipped"),
    ("time", {"q20_ms": 1e9}, "median_ms: expected between"),
    ("time", {"M": -1}, "M: expected a number >= 0, got -1"),
    ("time", {"M": 1.5}, "M: expected int, got 1.5"),
    ("time", {"phase": "sideways"}, "phase: expected forward or backward or both"),
    ("time", {"kind": "tmie"}, "kind: expected check or time or peak or sanitizer or tune"),
    ("check", {"tensors": {}}, "passed: expected false, as its tensors, got True"),
    ("peak", {"name": "ruler"}, "name: expected cublas or copy, got 'ruler'"),
    ("peak", {"gbps": None}, "gbps: expected int or float, got None"),
    ("sanitizer", {"status": "fine"}, "status: expected ok or failed or killed or skipped"),
    ("tune", {"tile": "128"}, "tile: expected dict, got '128'"),
]


@pytest.mark.parametrize(("kind", "change", "message"), CHANGES)
def test_a_bad_record_is_refused_by_name(tmp_path, kind, change, message):
    record = {**first(kind), **change}
    with pytest.raises(LedgerError, match=message.replace("(", r"\(")):
        empty().add_record(record)
    # The same from a file, with the file's name and the record's place.
    path = book.create(empty(), tmp_path)
    fields = json.loads(path.read_text())
    fields["records"] = [first("peak"), record]
    path.write_text(json.dumps(fields))
    with pytest.raises(LedgerError) as error:
        book.load(path)
    assert str(error.value).startswith(f"{path}: records[1].")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", sorted(book._FIELDS))
def test_every_field_of_a_kind_is_required(kind):
    for name in book._FIELDS[kind]:
        record = first(kind)
        del record[name]
        with pytest.raises(LedgerError, match=f"{name}: expected the field, got nothing"):
            empty().add_record(record)


def test_what_the_timing_session_makes_is_a_valid_record():
    from fusedmlp.bench.timing.session import Peaks, record_of
    from fusedmlp.bench.work import Work, case_of

    work = Work(case_of("gated_linear"), "silu", "bfloat16", 16, 32, 48)
    one = empty()
    one.add_record(record_of(work, "fusedmlp", "both", [1.0, 2.0, 4.0], 5, Peaks(7.0, 3.0), None))
    one.add_record(record_of(work, "quack", "both", None, None, Peaks(None, None), "not here"))
    assert [r["skipped"] for r in one.records] == [None, "not here"]


def test_an_infinite_error_stays_on_record(tmp_path):
    one, record = empty(), first("check")
    record["tensors"]["out"] |= {"max": math.inf, "passed": False}
    with pytest.raises(LedgerError, match="passed: expected false"):
        one.add_record(record)
    one.add_record({**record, "passed": False})
    assert book.load(book.create(one, tmp_path)).records[0]["tensors"]["out"]["max"] == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: expected 1, got 2"),
        ({"date": "yesterday"}, "date: expected YYYY-MM-DD, got 'yesterday'"),
        ({"machine": {"gpu": None}}, "machine.gpu: expected a name, got None"),
        ({"machine": {}}, "machine.gpu: expected a name, got None"),
        ({"steps": [{"name": "tests"}]}, r"steps\[0\].status: expected the field, got nothing"),
        ({"commit": 7}, "commit: expected str, got 7"),
        ({"surplus": 1}, "expected .*, got .*surplus"),
    ],
)
def test_a_bad_ledger_is_refused_by_name(tmp_path, change, message):
    path = book.create(empty(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LedgerError, match=message) as error:
        book.load(path)
    assert str(path) in str(error.value)


def test_what_is_no_json_is_refused_by_name(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"schema": 1,')
    with pytest.raises(LedgerError, match="half.json: expected JSON"):
        book.load(path)
