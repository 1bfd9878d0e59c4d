"""`gate execute`: what it runs, what it says, and what it refuses."""

import json
import os
import re

import executed
import pytest
from compiled import in_compiler

from fusedmlp.bench import cli
from fusedmlp.bench.gate.execute import kept
from fusedmlp.testing import CASES

JOB = "sm_80 gated_act bfloat16 aligned chosen"


def test_a_row_says_what_was_run_and_how_well():
    code, text, written = in_compiler(executed.main, "--arch", "sm_80", "--match", f"{JOB}$")
    assert code == 0, text
    (row,) = written["records"]
    assert (row["kernel"], row["arch"], row["dtype"], row["tile"]) == (
        "gated_act", "sm_80", "bfloat16", "chosen",
    )  # fmt: skip
    assert 0 < row["error"] <= row["bound"]
    assert row["findings"] == []
    assert row["launched"] == ["gated_act._bwd_kernel", "gated_act._fwd_kernel"]
    assert row["instructions"] > 0
    assert any("gated_linear_fwd" in line for line in written["not_executed"])
    assert "1 rows executed, 0 with findings" in text


def test_every_case_and_every_tile_has_a_job():
    names = in_compiler(executed.job_names, "sm_90", False)
    assert len(set(names)) == len(names)
    for case in CASES:
        assert any(f" {case} bfloat16 aligned" in name for name in names)
    assert in_compiler(executed.uncovered_without, "sm_90", "") == []
    left = in_compiler(executed.uncovered_without, "sm_90", "moe_down")
    assert left
    assert all("moe_down" in line for line in left)


def test_brief_has_a_job_for_every_kernel_of_the_tables():
    every = in_compiler(executed.job_names, "sm_100", False)
    assert set(in_compiler(executed.job_names, "sm_100", True)) < set(every)
    tables = in_compiler(executed.kernels_of, "sm_100", False)
    assert in_compiler(executed.kernels_of, "sm_100", True) == tables


def test_an_unknown_instruction_fails_its_row_and_names_the_line():
    row = in_compiler(executed.with_edited_ptx, JOB, "mul.f32", "mul.rz.f32")
    (found,) = row["findings"]
    assert "Unknown" in found
    assert "PTX line" in found
    assert "mul.rz.f32" in found


@pytest.mark.parametrize(
    ("argv", "said"),
    [(("--match", "no such job"), "no job matches 'no such job'"), (("--match", "("), "regular")],
)
def test_bad_input(argv, said, capsys):
    try:
        code, text, written = in_compiler(executed.main, "--arch", "sm_80", *argv)
    except SystemExit as stopped:
        code, text, written = stopped.code, "regular", {}
    assert code == 2
    assert said in text
    assert written == {}


# ---- the file of a run that ended early

TWO = ("--arch", "sm_80", "--match", "gated_act bfloat16 (aligned|no rows) ")


def one_row():
    code, text, written = in_compiler(executed.main, "--arch", "sm_80", "--match", f"{JOB}$")
    assert code == 0, text
    return written


def test_resume_executes_what_is_left():
    before = one_row()
    before["records"][0]["run_s"] = 1234.5
    code, text, written = in_compiler(executed.resumed, before, *TWO, "--resume")
    assert code == 0, text
    assert "1 of 2 jobs passed" in text
    assert "2 rows executed, 0 with findings" in text
    assert written["records"][0] == before["records"][0]
    assert [row["what"] for row in written["records"]] == ["aligned", "no rows"]
    # Without it all is executed anew, and what a part does not ask for stays.
    _, _, written = in_compiler(executed.resumed, before, *TWO)
    assert written["records"][0]["run_s"] < 1000
    before = written
    only = (*TWO[:3], "gated_act bfloat16 one row")
    _, text, written = in_compiler(executed.resumed, before, *only, "--resume")
    assert "1 rows executed" in text
    assert written["records"][:2] == before["records"]


@pytest.mark.parametrize("change", ["findings", "orders"])
def test_resume_executes_again_what_failed_or_had_fewer_orders(change):
    before = one_row()
    (row,) = before["records"]
    row["run_s"] = 1234.5
    if change == "findings":
        row["findings"] = ["a fault"]
    else:
        del row["orders"][1]
    args = ("--arch", "sm_80", "--match", f"{JOB}$", "--resume")
    code, text, written = in_compiler(executed.resumed, before, *args)
    assert code == 0, text
    assert "0 of 1 jobs passed" in text
    (row,) = written["records"]
    assert row["run_s"] < 1000
    assert row["findings"] == []
    assert len(row["orders"]) == 4


def test_the_verdict_is_of_old_rows_and_new_ones():
    args = ("--arch", "sm_80", "--resume")
    before = in_compiler(executed.whole, "sm_80", JOB)
    code, text, written = in_compiler(executed.resumed, before, *args)
    assert code == 0, text
    assert written["not_executed"] == []
    assert len(written["records"]) == len(before["records"]) + 1
    for row in before["records"]:
        row["launched"] = []
    code, text, written = in_compiler(executed.resumed, before, *args)
    assert code == 1
    assert "not executed: sm_80 gated_linear" in text
    assert not any("gated_act" in line for line in written["not_executed"])


def test_what_was_executed_is_kept_at_sigterm():
    code, text, written = in_compiler(executed.interrupted, *TWO)
    assert code == 130
    assert "--resume goes on" in text
    assert [row["what"] for row in written["records"]] == ["aligned"]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("no JSON", "is no file that `gate execute --json` wrote"),
        ("[]", "is no file that `gate execute --json` wrote"),
        ('{"records": []}', "sources None there"),
        ({"stamp": {"triton": "3.0.0"}}, "triton 3.0.0 there"),
    ],
)
def test_a_file_of_others_is_refused_and_left_as_it_is(before, said):
    text = before if isinstance(before, str) else json.dumps(before)
    code, printed, after = in_compiler(executed.resumed, text, *TWO, "--resume")
    assert code == 2
    assert said in printed
    assert after == text


def test_resume_needs_a_file_and_a_file_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert cli.main(["gate", "execute", "--resume"]) == 2
    assert "the FILE of --json, which is not given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["gate", "execute", "--json", os.devnull])
    assert "must be a file that can be replaced" in capsys.readouterr().err


def test_a_stamp_is_of_what_decides_a_row():
    found = in_compiler(executed.sources)
    assert {
        "bench/gate/execute/jobs.py", "bench/gate/ptx/lower.py", "bench/gate/ptx/machine/lanes.h",
        "fusedmlp/testing/rule.py", "fusedmlp/packing.py", "kernels/dense/gated_linear.py",
    } <= set(found)  # fmt: skip
    # What it leaves out is reached by the package's face alone.
    apart = rf"^\s*(from|import) [.\w]*\b({'|'.join(kept.APART)})\b"
    faces = {"fusedmlp/_api.py", "fusedmlp/cli.py", "fusedmlp/explaining.py"}
    inside = {path for path in found if path.endswith(".py")} - faces
    assert [path for path in inside if re.search(apart, found[path], re.M)] == []
    assert any(re.search(apart, found[path], re.M) for path in faces)
    assert not any(path.startswith("fusedmlp/layers") for path in found)


def test_a_group_has_one_process_and_a_death_is_an_error():
    found = in_compiler(executed.groups, [1, 2], [3, 4])
    assert found[1] == found[2] != found[3] == found[4]
    assert in_compiler(executed.death) == "a process that executes jobs ended with code 7"


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["gate", "execute", "--brief"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
