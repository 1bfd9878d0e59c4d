"""`gate execute`: what it runs, what it says, and what it refuses."""

import executed
import pytest
from compiled import in_compiler

from fusedmlp.bench import cli
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


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["gate", "execute", "--brief"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
