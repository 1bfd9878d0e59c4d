"""`make prove` without its tools: arguments, what a proof is given, and how verdicts are read."""

import importlib
import sys

import prove_command as command
import prove_races as races
import pytest
from compiled import in_compiler
from prove_launches import ARCH, LAUNCHES, jobs, without_barrier


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kernel", "gated_linear"], f"--kernel must be of {next(iter(LAUNCHES))}, "),
        (["--limit", "0"], "--limit must be a number of seconds above 0; got 0.0"),
    ],
)
def test_arguments_are_refused_in_one_line(arguments, said, capsys):
    assert command.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"tests/prove: {said}") and error.count("\n") == 1


def test_a_tool_that_does_not_install_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert command.main(["races", "--kernel", "gated_act_fwd"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("tests/prove: needs sentryward==0.1.1 from PyPI, which did not install")


def test_each_kind_of_tile_is_proved_and_no_call_twice():
    some, every = list(jobs([], False)), list(jobs([], True))
    assert {job.launch.call for job in some} == {launch.call for launch in LAUNCHES.values()}
    kinds = {
        (name, t.loads, t.skinny) for (name, b), ts in ARCH.tiles.items() if b == 2 for t in ts
    }
    tables = [job for job in some if job.tile]
    assert len(tables) == len(kinds)
    assert sum(bool(job.tile) for job in every) == sum(
        len(tiles) for (_, size), tiles in ARCH.tiles.items() if size == 2
    )


def first_input(kernel):
    (call,) = races.caught(next(jobs([kernel], False)), training=True)
    return races.described(call)


def test_a_launch_becomes_an_input():
    given = in_compiler(first_input, "gated_act_fwd")
    assert given["entry"] == "_fwd_kernel" and given["launch"] == {
        "grid_dim": [3, 1, 1], "block_dim": [128, 1, 1], "cluster_dim": [1, 1, 1],
        "dynamic_shared_bytes": 0,
    }  # fmt: skip
    assert [a["value"] for a in given["arguments"]] == [37, 96, 96, 96, 96]  # M, H, strides


def test_a_barrier_is_taken_out():
    ptx = "a; bar.sync \t0; b; @%p1 bar.sync 1, 64;\nc;"
    assert without_barrier(ptx, 0) == "a;  b; @%p1 bar.sync 1, 64;\nc;"
    assert without_barrier("bar.sync 0; b; bar.sync 0; c", 1) == "bar.sync 0; b;  c"
    assert without_barrier(ptx, 2) is None


def race(first, second, space="shared", line=7):
    sides = (("first", first, 7), ("second", second, line))
    located = {
        name: {"mode": mode, "location": {"file": "a/k.py", "line": at, "column": 1}}
        for name, mode, at in sides
    }
    return {"result": "potential_race", "races": [{**located, "region": {"address_space": space}}]}


@pytest.mark.parametrize(
    "report, expected",
    [
        ({"result": "race_free"}, "proved"),
        (race("write", "write"), "copies"),
        (race("read", "write"), "potential_race"),
        (race("write", "write", "global"), "potential_race"),
        (race("write", "write", line=8), "potential_race"),
        ({"result": "timeout", "diagnostics": []}, "timeout"),
        ({"result": "not_wellsynced", "diagnostics": [{"code": "x"}]}, "not_wellsynced"),
    ],
)
def test_a_verdict_is_read(report, expected):
    assert races.verdict(report)[0] == expected


def test_what_fails():
    def row(verdict):
        return races.Row("k", "1x1x1", "", verdict, 0.0, "")

    fine = {v for v in ("proved", "copies", *races.UNABLE) if not races.failed(row(v), None)}
    assert fine == {"proved", "copies", *races.UNABLE}
    assert all(races.failed(row(v), None) for v in (*races.FAULTS, "tool_failure", "invalid_input"))
    # A mutant's proof is the failure, and a race what is wanted.
    assert races.failed(row("proved"), 0) and not races.failed(row("potential_race"), 0)


def test_values_needs_a_python_that_ttsem_takes(monkeypatch):
    floors = importlib.import_module("floors")
    monkeypatch.setattr(floors, "python", lambda minors: sys.executable)
    if sys.version_info[:2] in ((3, 12), (3, 13)):
        assert command.modern_python() == sys.executable
    else:
        with pytest.raises(command.Refusal, match="needs Python 3.12 or 3.13"):
            command.modern_python()
