"""What the default command says: a line an op that fits the terminal, what is wrong, what next."""

import io
import itertools
import json
import re
import shlex

import pytest

from fusedmlp.bench import check, cli, glance, overview, predict, render
from fusedmlp.bench.options import Refusal, write_json
from fusedmlp.bench.work import Work
from fusedmlp.testing import CASES

GOOD = {"max": 1.0, "max_bound": 4.0, "rms": 0.5, "rms_bound": 1.0, "worst": [0, 1]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def checked(case, dtype="bfloat16", passed=True, **tensors):
    tensors = {name: {**GOOD, "passed": passed} | t for name, t in tensors.items()}
    return {
        "kind": "check", "case": case, "op": CASES[case].op, "activation": "silu", "dtype": dtype,
        "M": 2, "D": 3, "H": 4, "backend": "triton", "device": "cpu", "variant": None,
        "passed": passed, "tensors": tensors,
    }  # fmt: skip


@pytest.fixture
def records():
    """Every case right but one: gated_mlp-bias, in one gradient."""
    found = [checked(name, dtype, out={}) for name in CASES for dtype in ("bfloat16", "float32")]
    found.append(checked("gated_mlp-bias", "float16", False, dx={"max": 5.0, "worst": [1, 7]}))
    for work in overview.to_compute([]):
        found += predict.predict(work, "forward" if work.case.forward_only else "both")
    return found


def shown(monkeypatch, records, columns=None):
    out = io.StringIO() if columns is None else Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", str(columns))
    glance.show(records)
    glance.next_steps([("every case at every size", "fusedmlp bench check")])
    return out.getvalue()


@pytest.mark.parametrize("with_rich", [True, False])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_it_fits_the_terminal(monkeypatch, records, columns, with_rich):
    if not with_rich:
        monkeypatch.setattr(render, "rich", None)
    text = shown(monkeypatch, records, columns)
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours take no room
    lines = [line for line in text.splitlines() if not line.startswith("FAIL ")]
    assert max(map(len, lines)) <= columns
    assert all(case.op in text for case in CASES.values())
    assert ("llama4-scout" in text) == (columns > 60)
    assert ("Left out, for want of columns: model" in text) == (columns == 60)


def test_what_is_wrong_is_named_with_its_coordinate(monkeypatch, records):
    text = shown(monkeypatch, records)
    (line,) = [line for line in text.splitlines() if line.startswith("gated_mlp ")]
    # Half of what the root mean square may be, a quarter of the largest; then five quarters.
    assert line.split()[1:5] == ["50%", "125%", "50%", "FAIL"]
    assert (
        "FAIL gated_mlp-bias silu float16 2x3x4: dx at [1, 7]: error 5, allowed 4; rms 0.5, "
        "allowed 1\n"
    ) in text
    assert f"{2 * len(CASES) + 1} checked, 1 failed: {2 * len(CASES) + 1} tensors" in text
    assert "computed from H100's datasheet, not measured" in text


def test_a_share_is_never_rounded_down():
    assert glance.percent(1.001) == "101%"
    assert glance.percent(1.0) == "100%"
    assert glance.percent(float("inf")) == "inf"


def test_what_may_have_no_error_at_all_failed_by_any():
    none = {"max": 0.0, "max_bound": 0.0, "rms": 0.0, "rms_bound": 0.0}
    assert glance.strain(none) == 0
    for field in ("max", "rms"):
        assert glance.strain({**none, field: 1e-30}) == 1


def test_computed_times_are_the_first_gpus_with_a_model_or_without(monkeypatch):
    work = Work(CASES["gated_mlp"], "silu", "bfloat16", 8, 128, 256)
    found = [r for phase in ("both", "forward") for r in predict.predict(work, phase)]
    assert len({r["gpu"] for r in found}) > 1 and found[0]["gpu"] == "H100"
    text = shown(monkeypatch, [checked("gated_mlp", out={}), *found])
    (line,) = [line for line in text.splitlines() if line.startswith("gated_mlp ")]
    own = [render.number(found[0]["roofline_ms"]), found[0]["bound"], "-"]
    assert line.split()[-3:] == own


def test_measured_times_stand_beside_the_fastest_other(monkeypatch):
    common = {"kind": "time", "case": "gated_mlp", "op": "gated_mlp", "dtype": "bfloat16",
              "activation": "silu", "M": 1, "D": 2, "H": 3, "model": None}  # fmt: skip
    times = {"fusedmlp": 1.0, "eager": 2.0, "compile": 1.5}
    records = [
        {**common, "phase": phase, "provider": name, "median_ms": scale * ms, "skipped": None}
        for phase, scale in (("forward", 1), ("both", 3), ("backward", 2))
        for name, ms in times.items()
    ]
    records.append({**common, "phase": "both", "provider": "liger", "skipped": "not here"})
    text = shown(monkeypatch, [checked("gated_mlp", out={}), *records])
    (line,) = [line for line in text.splitlines() if line.startswith("gated_mlp ")]
    assert line.split()[4:] == ["pass", "3", "1.50x", "compile", "-"]
    assert "Times are measured" in " ".join(text.split())


def test_brief_takes_every_case_and_each_ops_first_in_every_dtype():
    whole, brief = check.plan(check.CheckOptions()), check.plan(check.CheckOptions(brief=True))
    assert {w.case.name for w in brief} == set(CASES) and len(brief) < 0.6 * len(whole)
    assert set(brief) <= set(whole)
    for op in {case.op for case in CASES.values()}:
        assert {w.dtype for w in brief if w.case.op == op} == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize("command", [[], ["check"]])
def test_an_interrupt_shows_what_was_done(monkeypatch, capsys, tmp_path, command):
    def interrupted(options, emit):
        emit(checked("gated_act", out={}))
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", interrupted)
    file = tmp_path / "some.json"
    assert cli.main([*command, "--json", str(file)]) == 130
    text = " ".join(capsys.readouterr().out.split())
    assert "1 checked, 0 failed" in text
    assert "Interrupted: the rest was not checked." in text
    assert len(json.loads(file.read_text())["records"]) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("passed", [True, False])
def test_rows_are_for_the_verbose_and_the_exit_code_for_scripts(monkeypatch, capsys, passed):
    def one(options, emit):
        emit(checked("gated_act", passed=passed, out={}))
        return passed

    monkeypatch.setattr(check, "check", one)
    assert cli.main([]) == int(not passed)
    text = capsys.readouterr().out
    assert "rel. L2" not in text and "Roofline times" not in text
    assert "Nothing was timed" in text
    assert cli.main(["--verbose"]) == int(not passed)
    text = capsys.readouterr().out
    assert "rel. L2" in text and "Roofline times" in text and "ops: " in text


def test_a_narrow_terminal_is_told_which_columns_it_lacks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    cells = [["a" * 10, "b" * 6, "c" * 6]]
    render.table("Title", ("first", "second", "third"), cells, out, drop=("third", "second"))
    assert "second" in out.getvalue() and "third\n" not in out.getvalue().split("Left out")[0]
    assert " ".join(out.getvalue().split()).endswith("Left out, for want of columns: third.")


def test_a_file_that_cannot_be_written_is_one_line():
    with pytest.raises(Refusal, match="/dev/full was not written: No space left on device"):
        write_json("/dev/full", {}, [])


def test_a_command_is_pasted_as_it_is_printed(monkeypatch):
    words = ["fusedmlp", "bench", "check", "--activation", "situ(beta=1, beta_up=2)", "--case", "a"]
    for columns in (200, 80, 40, 10):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = Terminal()
        render.say_command("Go on with:", words, out)
        text = out.getvalue().removeprefix("Go on with:").removesuffix("\n")
        assert text.startswith("\n") == (columns < 80)
        assert shlex.split(text.replace("\\\n", " ")) == words
        if columns in (80, 40):
            assert max(map(len, out.getvalue().splitlines())) <= columns


def test_a_command_takes_as_few_lines_as_fit(monkeypatch):
    words = ["fusedmlp", "bench", "check", "--case", "gated_mlp", "mlp-bias", "--shape", "3x4x5"]
    whole = f"Go on: {' '.join(words)}"
    for columns in range(20, len(whole) + 2):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = Terminal()
        render.say_command("Go on:", words, out)
        first, *lines = out.getvalue().splitlines()
        assert (first == whole) == (columns >= len(whole))
        for line, after in itertools.pairwise(lines):
            assert line.endswith(" \\") and len(line) < columns
            assert len(line) + len(after.split()[0]) + 2 > columns  # it has no room for one more


def test_a_step_stands_beside_its_purpose_where_there_is_room(monkeypatch):
    steps = [("times", "fusedmlp bench time"), ("everything", "fusedmlp")]
    needed = len("  everything  fusedmlp bench time")
    for columns, lines in (
        (needed, ["  times       fusedmlp bench time", "  everything  fusedmlp"]),
        (needed - 1, ["  times:", "    fusedmlp bench time", "  everything:", "    fusedmlp"]),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout", out := Terminal())
        glance.next_steps(steps)
        assert out.getvalue().splitlines() == ["", "Next:", *lines]


def test_many_columns_that_are_left_out_are_counted(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    header = [f"column {i}" for i in range(12)]
    out = Terminal()
    render.table("", header, [["x" * 20] * 12], out, drop=header[1:])
    assert "Left out, for want of columns: column 1, column 2, 7 more." in out.getvalue()
    for gone, told in ((3, "a, b, c."), (4, "a, b, 2 more.")):
        out = Terminal()
        names = "abcd"[:gone]
        render.table("", ("last", *names), [["x" * 20, *(gone * ["y" * 70])]], out, drop=names)
        assert out.getvalue().endswith(f"Left out, for want of columns: {told}\n")
